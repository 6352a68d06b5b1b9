"""Floating-point operations of training, counted from the shape of a model: no clock, no machine.

Matrix products and convolutions of a forward pass are counted by PyTorch's `FlopCounterMode`. The
recurrences are counted by the formulas below, one for each op, since their kernels are opaque to
it, and since a form that does more work than the equation asks for should not count as training
more. A backward pass does twice the work of a forward pass: one product for the gradient of each of
the two factors. Norms, activations and other element-wise work are left out, as is usual.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from model.config import ModelConfig
from model.language_model import shapes_only
from model.ops import OPS, Op

PASSES = 3
"""Forward, and twice as much backward."""


def additive_flops(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> float:
    """`S = decay S + k v^T`, `o = q S`: a product and a sum for each entry of S, twice.

    A normaliser is one more column of S.
    """
    entries = _state_entries(k, v)
    if options.get("normalize"):
        entries += k.shape[-1] * v.numel() / v.shape[-1]
    return entries * (4 + _is_given(options, "log_decay"))


def delta_flops(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> float:
    """As additive, and `a S` and `b (a S)` for what is removed."""
    entries = _state_entries(k, v)
    return entries * (8 + _is_given(options, "log_decay"))


def wkv4_flops(k: Tensor, v: Tensor, **options: Any) -> float:
    """A channel: 3 for the sum of values, 2 for that of weights, 4 to read, 2 exponentials."""
    return 11.0 * k.numel()


def attention_flops(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> float:
    """A score and a weighted sum for each pair of a token and one that it sees: half a square."""
    batch, time, heads, key_dim = q.shape
    pairs = batch * heads * time * (time + 1) / 2
    return pairs * 2 * (key_dim + v.shape[-1])


FORMULAS: dict[str, Callable[..., float]] = {
    "additive": additive_flops,
    "delta": delta_flops,
    "wkv4": wkv4_flops,
    "attention": attention_flops,
}
"""By row of `OPS`: the operations of a forward pass."""


@functools.cache
def training_flops_per_token(shape: ModelConfig, context: int) -> float:
    """Forward and backward, in windows of `context` tokens.

    Takes no time and no memory to speak of: the model has shapes, but no numbers.
    """
    model = shapes_only(shape)
    tokens = torch.zeros(1, context, dtype=torch.long, device="meta")
    counter = FlopCounterMode(display=False)
    with _ops_counted() as spent, torch.no_grad(), counter:
        model(tokens)
    return PASSES * (counter.get_total_flops() + sum(spent)) / context


@contextmanager
def _ops_counted() -> Iterator[list[float]]:
    """Puts in the place of each op one that computes nothing and notes its operations."""
    spent: list[float] = []
    before = dict(OPS)

    def counted(formula: Callable[..., float]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            spent.append(formula(*args, **kwargs))
            v: Tensor = kwargs.get("v", args[-1])
            return torch.empty_like(v), kwargs["initial_state"]

        return run

    try:
        for name, formula in FORMULAS.items():
            OPS[name] = _Counted(*[counted(formula)] * 3)
        yield spent
    finally:
        OPS.update(before)


class _Counted(Op):
    """An op that is called as it is, on whatever device."""

    def form(self, name: str, backend: str = "auto") -> Callable[..., Any]:
        """What counts."""
        return self.chunked


def _state_entries(k: Tensor, v: Tensor) -> float:
    """Entries of all states, each counted for every token."""
    return float(v.numel() * k.shape[-1])


def _is_given(options: dict[str, Any], name: str) -> bool:
    return options.get(name) is not None
