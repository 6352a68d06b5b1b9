"""What the tests of the ops share: inputs for any op, a run with all its gradients, and checks.

A check takes the function under test, so that the tests can also feed it a broken one.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops import OPS
from model.ops.attention import KVCache
from model.ops.scores import SCORES, Score, entmax, polynomial
from model.ops.wkv4 import WKV4State

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Largest difference from the float64 recurrent form, relative to its largest value."""

TIMED = ("q", "k", "v", "a", "b", "log_decay", "reset")
"""Inputs with a time axis, [B, T, ...], but where the op has one for all tokens."""

DECAYS = {
    "zero": torch.zeros_like,
    "weak": lambda u: -0.6 * u,
    "steady": lambda u: torch.full_like(u, -0.6065),
    "wide": lambda u: -(10 ** (4.3 * u - 3)),
    "strong": lambda u: torch.full_like(u, -20.0),
    "mixed": lambda u: torch.where(u < 0.5, -20.0, -0.01),
    "infinite": lambda u: torch.where(u < 0.2, -torch.inf, -2 * u),
    "wiped": lambda u: torch.full_like(u, -torch.inf),
    "beyond": lambda u: torch.where(u < 0.3, -1e30, -0.1),
}
"""Log-decays from uniform numbers in [0, 1)."""


def arguments(op):
    """What the op takes, by name."""
    return inspect.signature(OPS[op].recurrent).parameters


def has_heads(op):
    """Whether the op reads with queries, [B, T, H, K]; else each of its [B, T, D] is a channel.

    There the decay and the bonus are one for all tokens, and always given.
    """
    return "q" in arguments(op)


def spread(scores):
    """A score as a user may write it: no mask, but the length of the row counts."""
    return scores.tanh() * torch.linspace(1, 2, scores.shape[-1], dtype=scores.dtype)


SCORES_TESTED = {
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
    score: str | Score | Callable[[Tensor], Tensor] | None = None
    batch: int = 2
    time: int = 17
    heads: int = 2
    key_dim: int = 8
    value_dim: int = 12
    seed: int = 0

    def applies_to(self, op):
        """Whether the op has every argument that the case needs."""
        return self == self.reduced_to(op)

    def reduced_to(self, op):
        """The same case without the arguments that the op lacks; `scale` only where it has one."""
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


def make_inputs(op, case, dtype=torch.float64):
    """Arguments of the op, by name. Drawn in float32, so that every dtype holds the same numbers.

    A new op needs nothing here if it names its arguments as the others do.
    """
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    def uniform(*shape):
        return torch.rand(shape, generator=generator)

    draw = draw_heads if has_heads(op) else draw_channels
    inputs = {
        name: map_tensors(lambda x: x.to(dtype) if x.is_floating_point() else x, x)
        for name, x in draw(op, case, normal, uniform).items()
    }
    if case.reset:
        reset = uniform(case.batch, case.time) < 0.06
        reset[-1, 0] = True
        reset[0, case.time // 2] |= case.time > 1  # at least one row keeps its state for a while
        inputs["reset"] = reset
    if case.normalize:
        inputs["normalize"] = True
        if case.eps is not None:  # the first token's gradient of q is of the order of eps
            inputs["eps"] = case.eps
    if case.score is not None:
        inputs["score"] = case.score
    return inputs | ({"scale": case.scale} if "scale" in arguments(op) else {})


def draw_heads(op, case, normal, uniform):
    """The tensors of an op that reads with queries, but for `reset`."""
    batch, time, heads, key_dim = case.batch, case.time, case.heads, case.key_dim

    def key(positive=case.normalize):  # a sum of weights must not come near zero
        x = normal(batch, time, heads, key_dim)
        return (x / 2).exp() if positive else x

    inputs = {"q": key(), "k": key(), "v": normal(batch, time, heads, case.value_dim)}
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
    if case.state and op == "attention":
        cached = (batch, 5, heads)
        start = (torch.arange(batch) + 1) % 3
        inputs["initial_state"] = KVCache(
            normal(*cached, key_dim), normal(*cached, case.value_dim), start
        )
    elif case.state:
        state = normal(batch, heads, key_dim, case.value_dim)
        if case.normalize:
            state = torch.cat([state, 1 + uniform(batch, heads, key_dim, 1)], dim=-1)
        inputs["initial_state"] = state
    return inputs


def draw_channels(op, case, normal, uniform):
    """The tensors of an op whose channels are `key_dim` states apart, but for `reset`."""
    assert op == "wkv4", f"{op} needs a state of its own"
    shape = (case.batch, case.time, case.key_dim)
    inputs = {
        "k": normal(*shape),
        "v": normal(*shape),
        "log_decay": DECAYS[case.decay or "weak"](uniform(case.key_dim)),
        "bonus": normal(case.key_dim),
    }
    if case.state:
        num, den, largest = (x(case.batch, case.key_dim) for x in (normal, uniform, normal))
        inputs["initial_state"] = WKV4State(num, 1 + den, largest)
    return inputs


def map_tensors(function, value):
    """The function of every tensor in a tensor or a tuple of tensors; other values as they are."""
    if isinstance(value, Tensor):
        return function(value)
    return type(value)(*(function(x) for x in value)) if isinstance(value, tuple) else value


def is_timed(name, value):
    """Whether the input of that name has a time axis; a decay for all tokens has none."""
    return name in TIMED and value.dim() > 1


def flatten(name, value):
    """The tensors in a tensor or a NamedTuple of tensors, by name."""
    if isinstance(value, tuple):
        return {f"{name}.{field}": x for field, x in zip(value._fields, value, strict=True)}
    return {name: value} if isinstance(value, Tensor) else {}


def run(function, inputs):
    """`o`, `final_state` and, under random cotangents of both, `grad ...` of every input."""

    def leaf(x):
        return x.detach().clone().requires_grad_(x.is_floating_point())

    leaves = {name: map_tensors(leaf, x) for name, x in inputs.items()}
    o, state = function(**leaves)
    results = {"o": o, **flatten("final_state", state)}
    generator = torch.Generator().manual_seed(1)
    outputs = [x for x in results.values() if x.requires_grad]
    cotangents = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outputs]
    tensors = dict(pair for n, x in leaves.items() for pair in flatten(n, x).items())
    wanted = {name: x for name, x in tensors.items() if x.requires_grad}
    gradients = torch.autograd.grad(outputs, [*wanted.values()], cotangents, materialize_grads=True)
    named = {f"grad {name}": x for name, x in zip(wanted, gradients, strict=True)}
    return {name: x.detach() for name, x in results.items()} | named


def variants(op, *chunk_sizes):
    """The forms of an op by name, the chunked one with each chunk size; None is its default."""
    found = {"parallel": OPS[op].parallel, "recurrent": OPS[op].recurrent}
    for size in chunk_sizes:
        chosen = {} if size is None else {"chunk_size": size}
        found[f"chunked_{size or 'default'}"] = partial(OPS[op].chunked, **chosen)
    return found


@cache
def oracle(op, case):
    """The results of the recurrent form in float64."""
    return run(OPS[op].recurrent, make_inputs(op, case))


def assert_close(actual, expected, dtype, tolerance=None):
    """The same names, shapes, dtypes, all finite, and values within the tolerance of the largest.

    `dtype` is what the floating-point tensors of `actual` must have; the tolerance is that of the
    dtype where it is not given.
    """
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    assert actual.keys() == expected.keys()
    for name, reference in expected.items():
        value = actual[name]
        assert value.shape == reference.shape, f"{name}: {value.shape}, not {reference.shape}"
        wanted = dtype if reference.is_floating_point() else reference.dtype
        assert value.dtype == wanted, f"{name} is {value.dtype}, not {wanted}"
        assert value.isfinite().all(), f"{name} is not finite"
        if value.numel() == 0:
            continue
        difference = (value.to(reference.dtype) - reference).abs().max().item()
        allowed = tolerance * reference.abs().max().item()
        assert difference <= allowed, f"{name} is off by {difference:.2e}, allowed {allowed:.2e}"


def check_form(function, op, case, dtype):
    """Outputs, final state and all gradients are those of the recurrent form in float64."""
    actual, expected = run(function, make_inputs(op, case, dtype)), dict(oracle(op, case))
    if case.decay == "strong" and dtype == torch.float64:
        # About exp(-20) times the terms that cancel in it: 1e-9 of that is below their rounding.
        del actual["grad log_decay"], expected["grad log_decay"]
    assert_close(actual, expected, dtype)


def check_untouched(function, op, case, dtype):
    """No input is written to, neither its values nor its version."""
    inputs = make_inputs(op, case, dtype)
    tensors = dict(pair for n, x in inputs.items() for pair in flatten(n, x).items())
    before = {name: (x._version, x.clone()) for name, x in tensors.items()}
    function(**inputs)
    for name, x in tensors.items():
        version, values = before[name]
        assert x._version == version, f"{name} was written to"
        assert torch.equal(x, values), f"{name} has changed"


def check_rows(function, op, case, dtype, poison):
    """What the other rows of a batch hold does not reach the first: other numbers, or NaN."""
    inputs, others = (
        make_inputs(op, replace(case, seed=case.seed + n), dtype) for n in (0, int(not poison))
    )
    shared = {"bonus", "scale", "normalize", "eps", "score"}
    if poison or not has_heads(op):
        shared |= {"log_decay"}
    if poison:
        shared |= {"reset"}

    def join(x, other):
        rest = torch.full_like(x, torch.nan) if poison and x.is_floating_point() else other
        return torch.cat([x[:1], rest[1:]])

    mixed = dict(inputs)
    for name in inputs.keys() - shared:
        x, other = inputs[name], others[name]
        mixed[name] = type(x)(*map(join, x, other)) if isinstance(x, tuple) else join(x, other)

    def first(results):
        kept = {"grad bonus", *(() if has_heads(op) else ("grad log_decay",))}
        return {name: x[:1] for name, x in results.items() if name not in kept}

    assert_close(first(run(function, mixed)), first(oracle(op, case)), dtype)


def check_causality(function, op, case, dtype, cut):
    """Outputs before `cut` do not depend on later inputs, and no gradient goes there from them."""
    inputs = make_inputs(op, case, dtype)
    changed = make_inputs(op, replace(case, seed=case.seed + 1), dtype)
    for name, x in inputs.items():
        timed = is_timed(name, x)
        changed[name] = torch.cat([x[:, :cut], changed[name][:, cut:]], dim=1) if timed else x

    expected = run(outputs_before(OPS[op].recurrent, cut), make_inputs(op, case))
    actual = run(outputs_before(function, cut), changed)
    assert_close(actual, expected, dtype)


def outputs_before(function, cut):
    """The op, less its final state and its outputs from `cut` on."""
    return lambda **inputs: (function(**inputs)[0][:, :cut], None)


def cut_time(inputs, part):
    """The inputs for some of the tokens."""
    return {n: x[:, part] if is_timed(n, x) else x for n, x in inputs.items()}


def in_pieces(function, *places):
    """The op, run piece by piece from each place to the next with the state carried along."""

    def pieces(*, initial_state=None, **inputs):
        outputs, state = [], initial_state
        for begin, end in pairwise((0, *places, inputs["v"].shape[1])):
            piece = cut_time(inputs, slice(begin, end))
            o, state = function(**piece, initial_state=state)
            outputs.append(o)
        return torch.cat(outputs, dim=1), state

    return pieces
