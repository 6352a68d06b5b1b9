"""What an op is run on: cases, and how the arguments of any op are drawn for them."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops import OPS, Op
from model.ops.attention import AnyScore, KVCache
from model.ops.scores import SCORES, entmax, polynomial
from model.ops.wkv4 import WKV4State
from train.verify.running import Inputs, cut_time, to_dtype

DECAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": torch.zeros_like,
    "weak": lambda u: -0.6 * u,
    "steady": lambda u: torch.full_like(u, -0.6065),
    "wide": lambda u: -(10 ** (4.3 * u - 3)),
    "strong": lambda u: torch.full_like(u, -20.0),
    "mixed": lambda u: torch.where(u < 0.5, -20.0, -0.01),
    "infinite": lambda u: torch.where(u < 0.2, -torch.inf, -2 * u),
    "wiped": lambda u: torch.full_like(u, -torch.inf),
    "beyond": lambda u: torch.where(u < 0.3, -1e30, -0.1),
    "to_fifty": lambda u: torch.where(u < 0.1, -torch.inf, -50 * (u - 0.1).clamp(min=0) ** 4),
}
"""Log-decays from uniform numbers in [0, 1)."""

AnyOp = str | Op
"""A row of `model.ops.OPS`, by name or itself, or one like it."""

OPTIONAL = ("score", "log_decay", "bonus", "normalize", "scale", "eps", "reset", "initial_state")
"""Arguments that a case decides on. What stands beside them and `DRAWN` needs a default."""
DRAWN = ("q", "k", "v", "a", "b")


def spread(scores: Tensor) -> Tensor:
    """A score as a user may write it: no mask, but the length of the row counts."""
    return scores.tanh() * torch.linspace(1, 2, scores.shape[-1], dtype=scores.dtype)


SCORES_TESTED: dict[str, AnyScore] = {
    **{name: name for name in SCORES if name != "softmax"},
    **{f"polynomial_{order}": polynomial(order) for order in (1, 2, 4)},
    **{f"entmax_{alpha}": entmax(alpha) for alpha in (1.1, 1.3)},
    "user": spread,
}
"""All but the default, by name: what the attention ops take as `score`."""


@dataclass(frozen=True)
class Case:
    """What to draw. `decay` is a row of DECAYS."""

    decay: str | None = None
    per_channel: bool = True
    bonus: bool = False
    normalize: bool = False
    state: bool = False
    reset: bool = False
    scale: float = 1.0
    eps: float | None = None
    score: AnyScore | None = None
    batch: int = 2
    time: int = 17
    heads: int = 2
    key_dim: int = 8
    value_dim: int = 12
    seed: int = 0

    def applies_to(self, op: AnyOp) -> bool:
        """Whether the op has every argument that the case needs."""
        return self == self.reduced_to(op)

    def reduced_to(self, op: AnyOp) -> "Case":
        """The same case without the arguments that the op lacks."""
        has = arguments(op)
        return replace(
            self,
            decay=self.decay if "log_decay" in has else None,
            per_channel=self.per_channel or not has_heads(op),
            bonus=self.bonus and "bonus" in has and has_heads(op),
            normalize=self.normalize and "normalize" in has,
            score=self.score if "score" in has else None,
        )


CASES = {
    "plain": Case(),
    "state": Case(state=True, scale=0.35),
    "reset": Case(reset=True),
    "reset_state": Case(reset=True, state=True, scale=0.35),
    "head_decay": Case(decay="weak", per_channel=False, state=True, scale=0.35),
    "head_mixed_reset": Case(decay="mixed", per_channel=False, state=True, reset=True),
    "channel_decay": Case(decay="weak", state=True),
    "steady_reset": Case(decay="steady", state=True, reset=True),
    "wide": Case(decay="wide", state=True),
    "strong": Case(decay="strong", state=True),
    "mixed": Case(decay="mixed", state=True),
    "infinite": Case(decay="infinite", state=True),
    "infinite_reset": Case(decay="infinite", state=True, reset=True),
    "head_wiped": Case(decay="wiped", per_channel=False, state=True),
    "beyond": Case(decay="beyond"),
    "bonus": Case(bonus=True, state=True, scale=0.35),
    "bonus_weak_reset": Case(bonus=True, decay="weak", state=True, reset=True),
    "bonus_strong": Case(bonus=True, decay="strong", state=True),
    "bonus_mixed_reset": Case(bonus=True, decay="mixed", state=True, reset=True),
    "bonus_infinite_reset": Case(bonus=True, decay="infinite", state=True, reset=True),
    "normalize": Case(normalize=True, state=True),
    "normalize_reset": Case(normalize=True, reset=True, eps=1.0),
    "normalize_mixed": Case(normalize=True, decay="mixed", state=True, reset=True, eps=1.0),
    "normalize_bonus_head": Case(
        normalize=True, bonus=True, decay="mixed", per_channel=False, state=True
    ),
} | {
    f"score_{name}": Case(score=score, state=True, reset=True, scale=0.35)
    for name, score in SCORES_TESTED.items()
}


def find_op(op: AnyOp) -> Op:
    """The row."""
    return OPS[op] if isinstance(op, str) else op


def arguments(op: AnyOp) -> Mapping[str, inspect.Parameter]:
    """What the op takes, by name."""
    return inspect.signature(find_op(op).recurrent).parameters


def has_heads(op: AnyOp) -> bool:
    """Whether the op reads with queries, `[B, T, H, K]`; else every one of D is a state apart.

    There the tensors are `[B, T, D]`, and decay and bonus are `[D]` and always given.
    """
    return "q" in arguments(op)


def check_arguments(op: AnyOp) -> None:
    """Refuses an op with arguments that nobody here knows how to draw.

    Raises:
        ValueError: naming the argument.
    """
    for name, parameter in arguments(op).items():
        if name not in (*DRAWN, *OPTIONAL) and parameter.default is inspect.Parameter.empty:
            raise ValueError(
                f"the op needs an argument {name!r}, which cannot be drawn: give it a default, or "
                f"one of the names {', '.join((*DRAWN, *OPTIONAL))}"
            )


def make_inputs(op: AnyOp, case: Case, dtype: torch.dtype = torch.float64) -> Inputs:
    """Arguments of the op, by name. Drawn in float32, so that every dtype holds the same numbers.

    A new op needs nothing here if it names its arguments as the others do.
    """
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    draw = _draw_heads if has_heads(op) else _draw_channels
    inputs = draw(op, case, normal, uniform)
    if case.normalize:
        inputs["normalize"] = True
    if case.state:
        inputs["initial_state"] = _draw_state(op, case, inputs, normal, uniform)
    inputs = {name: to_dtype(x, dtype) for name, x in inputs.items()}
    if case.reset:
        reset = uniform(case.batch, case.time) < 0.06
        reset[-1, 0] = True
        reset[0, case.time // 2] |= case.time > 1  # at least one row keeps its state for a while
        inputs["reset"] = reset
    if case.normalize and case.eps is not None:
        inputs["eps"] = case.eps  # the first token's gradient of q is of the order of eps
    if case.score is not None:
        inputs["score"] = case.score
    return inputs | ({"scale": case.scale} if "scale" in arguments(op) else {})


Draw = Callable[..., Tensor]


def _draw_heads(op: AnyOp, case: Case, normal: Draw, uniform: Draw) -> Inputs:
    """The tensors of an op that reads with queries, but for reset and state."""
    batch, time, heads, key_dim = case.batch, case.time, case.heads, case.key_dim

    def key() -> Tensor:  # a sum of weights must not come near zero
        x = normal(batch, time, heads, key_dim)
        return (x / 2).exp() if case.normalize else x

    inputs: Inputs = {"q": key(), "k": key(), "v": normal(batch, time, heads, case.value_dim)}
    if "a" in arguments(op):  # removes, never amplifies
        removed = F.normalize(key(), dim=-1)
        strength = 2 * uniform(batch, time, heads, 1)
        inputs |= {"a": -removed, "b": strength * removed + 0.1 * key()}
    if case.decay is not None:
        shape = (batch, time, heads, key_dim)[: 4 if case.per_channel else 3]
        inputs["log_decay"] = DECAYS[case.decay](uniform(*shape))
    if case.bonus:
        u = normal(heads, key_dim)
        inputs["bonus"] = u.exp() if case.normalize else u
    return inputs


def _draw_channels(op: AnyOp, case: Case, normal: Draw, uniform: Draw) -> Inputs:
    """The tensors of an op whose channels are `key_dim` states apart, but for reset and state."""
    shape = (case.batch, case.time, case.key_dim)
    return {
        "k": normal(*shape),
        "v": normal(*shape),
        "log_decay": DECAYS[case.decay or "weak"](uniform(case.key_dim)),
        "bonus": normal(case.key_dim),
    }


def _draw_state(op: AnyOp, case: Case, inputs: Inputs, normal: Draw, uniform: Draw) -> Any:
    """A state of the kind that the op returns: random, or what some random tokens leave behind."""
    with torch.no_grad():
        _, state = find_op(op).recurrent(**cut_time(inputs, slice(5)))
    if isinstance(state, KVCache):
        cached = (case.batch, 5, case.heads)
        start = (torch.arange(case.batch) + 1) % 3
        return KVCache(normal(*cached, case.key_dim), normal(*cached, case.value_dim), start)
    if isinstance(state, WKV4State):
        num, den, largest = (x(case.batch, case.key_dim) for x in (normal, uniform, normal))
        return WKV4State(num, 1 + den, largest)
    if not isinstance(state, Tensor):
        return state
    if case.normalize:  # the sum of weights stands in the last column
        *shape, width = state.shape
        return torch.cat([normal(*shape, width - 1), 1 + uniform(*shape, 1)], dim=-1)
    return normal(*state.shape)
