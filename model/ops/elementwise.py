"""What stands between matrix products and recurrences: the definitions, in plain PyTorch.

`model.ops.fused` has the same functions, each a single pass through memory where the native kernels
are there. Shape legend: B batch, T time, H heads, K key dim, D = H K width, M tensors at once.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

STRONGEST_DECAY = -math.exp(-0.5)
"""The log-decay of RWKV-7 lies in (-0.6065, 0): arXiv 2503.14456, section 4.1."""
SMALLEST_NORM = 1e-12
"""A removal shorter than this is divided by it instead."""


def shifted(x: Tensor, last: Tensor, reset: Tensor | None) -> Tensor:
    """The token before each token (arXiv 2305.13048, section 3.1).

    Args:
        x: `[B, T, D]`.
        last: `[B, D]`, the token before the first.
        reset: `[B, T]` bool or None; nothing stands before a token that starts a document.

    Returns:
        `[B, T, D]`.
    """
    previous = torch.cat([last[:, None].to(x.dtype), x[:, :-1]], dim=1)
    return previous if reset is None else previous.masked_fill(reset[..., None], 0.0)


def interpolations(x: Tensor, last: Tensor, mix: Tensor, reset: Tensor | None) -> list[Tensor]:
    """Token shift: `x + (x_prev - x) mix_m` for every m.

    Args:
        x: `[B, T, D]`.
        last: `[B, D]`, the token before the first.
        mix: `[M, D]`, the part of the token before.
        reset: `[B, T]` bool or None.

    Returns:
        M tensors `[B, T, D]`.
    """
    difference = shifted(x, last, reset) - x
    return [torch.addcmul(x, difference, row) for row in mix.unbind()]


def varied_interpolations(
    x: Tensor, last: Tensor, mix: Tensor, offsets: Sequence[Tensor], reset: Tensor | None
) -> list[Tensor]:
    """Token shift by the data: `x + (x_prev - x) (mix_m + offset_m)` for every m.

    RWKV-6, arXiv 2404.05892, section 4.2.

    Args:
        x: `[B, T, D]`.
        last: `[B, D]`, the token before the first.
        mix: `[M, D]`, the part of the token before.
        offsets: M tensors `[B, T, D]`.
        reset: `[B, T]` bool or None.

    Returns:
        M tensors `[B, T, D]`.
    """
    difference = shifted(x, last, reset) - x
    parts = zip(mix.unbind(), offsets, strict=True)
    return [torch.addcmul(x, difference, row + offset) for row, offset in parts]


def short_convolution(
    x: Tensor, window: Tensor, taps: Tensor, bias: Tensor | None, reset: Tensor | None
) -> Tensor:
    """`silu(bias + sum_j taps_j x_{t-j})`, a channel by itself (arXiv 2312.00752, figure 3).

    Args:
        x: `[B, T, D]`.
        window: `[B, size - 1, D]`, the tokens before, oldest first.
        taps: `[size, D]`, the token's own first.
        bias: `[D]` or None.
        reset: `[B, T]` bool or None; a token sees none before the start of its document.

    Returns:
        `[B, T, D]`.
    """
    time, size = x.shape[1], taps.shape[0]
    padded = torch.cat([window.to(x.dtype), x], dim=1)
    document = None
    if reset is not None:  # counted from the first token; the window belongs to number 0
        document = F.pad(reset.long().cumsum(dim=1), (size - 1, 0))
    y = x * taps[0]
    for lag in range(1, size):
        begin = size - 1 - lag
        before = padded[:, begin : begin + time]
        if document is not None:
            other = document[:, begin : begin + time] != document[:, size - 1 :]
            before = before.masked_fill(other[..., None], 0.0)
        y = torch.addcmul(y, before, taps[lag])
    return F.silu(y if bias is None else y + bias)


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm (arXiv 1607.06450), or without a bias RMSNorm (arXiv 1910.07467).

    Args:
        x: `[..., D]`.
        weight: `[D]`.
        bias: `[D]` or None.
        eps: added to the variance, or to the mean of the squares.

    Returns:
        `[..., D]`.
    """
    if bias is None:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def norm_of_sum(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`norm(x + y)`, and `x + y` itself."""
    total = x + y
    return norm(total, weight, bias, eps), total


class RWKV7Inputs(NamedTuple):
    """What the delta recurrence takes, and its value; all `[B, T, D]`."""

    log_decay: Tensor
    key: Tensor
    a: Tensor
    b: Tensor
    value: Tensor


class ValueResidual(NamedTuple):
    """How far a value of RWKV-7 leans towards the first layer's."""

    v_first: Tensor
    """`[B, T, D]`."""
    amount: Tensor
    """`[B, T, D]`, before bias and sigmoid."""
    bias: Tensor
    """`[D]`."""


def rwkv7_inputs(
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    iclr: Tensor,
    *,
    decay_bias: Tensor,
    iclr_bias: Tensor,
    removal_scale: Tensor,
    iclr_scale: Tensor,
    residual: ValueResidual | None = None,
    num_heads: int,
) -> RWKV7Inputs:
    """From the projections of RWKV-7 to its recurrence (arXiv 2503.14456, section 4.1).

    `log_decay = -exp(-1/2) sigmoid(decay + bias)`, `iclr = sigmoid(iclr + bias)`,
    `a = -normalize(key removal_scale)` over each head, `b = -a iclr`,
    `key (1 + (iclr - 1) iclr_scale)`, and behind the first layer
    `value + (v_first - value) sigmoid(amount + bias)`.

    Args:
        key: `[B, T, D]`.
        value: `[B, T, D]`.
        decay: `[B, T, D]`, before bias and sigmoid.
        iclr: `[B, T, D]`, the learning rate, before bias and sigmoid.
        decay_bias: `[D]`.
        iclr_bias: `[D]`.
        removal_scale: `[D]`.
        iclr_scale: `[D]`.
        residual: None in the first layer.
        num_heads: H.
    """
    rate = torch.sigmoid(iclr + iclr_bias)
    removal = rearrange(key * removal_scale, "b t (h k) -> b t h k", h=num_heads)
    removal = F.normalize(removal, dim=-1, eps=SMALLEST_NORM).flatten(-2)
    if residual is not None:
        amount = torch.sigmoid(residual.amount + residual.bias)
        value = torch.lerp(value, residual.v_first, amount.to(value.dtype))
    return RWKV7Inputs(
        log_decay=STRONGEST_DECAY * torch.sigmoid(decay + decay_bias),
        key=torch.addcmul(key, key * iclr_scale, rate - 1.0),
        a=-removal,
        b=removal * rate,
        value=value,
    )


class OwnValue(NamedTuple):
    """A token's own value, weighted by its receptance, key and bonus."""

    receptance: Tensor
    """`[B, T, H, K]`."""
    key: Tensor
    """`[B, T, H, K]`."""
    value: Tensor
    """`[B, T, H, K]`."""
    bonus: Tensor
    """`[H, K]`."""


def gated_head_norm(
    o: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    own: OwnValue | None = None,
    silu: bool = False,
) -> Tensor:
    """GroupNorm with one group a head, times a gate: `(norm(o) weight + bias + own value) gate`.

    Args:
        o: `[B, T, H, V]`.
        gate: `[B, T, D]`.
        weight: `[D]`.
        bias: `[D]`.
        eps: added to the variance.
        own: adds `(sum_K receptance key bonus) value`.
        silu: whether to gate by `silu(gate)`.

    Returns:
        `[B, T, D]`.
    """
    normalised = F.layer_norm(o, o.shape[-1:], eps=eps)
    y = torch.addcmul(bias, normalised.flatten(-2), weight)
    if own is not None:
        amount = (own.receptance * own.key * own.bonus).sum(dim=-1, keepdim=True)
        y = y + (amount * own.value).flatten(-2)
    return y * (F.silu(gate) if silu else gate)


def head_rms_norm(o: Tensor, weight: Tensor, eps: float, gate: Tensor | None = None) -> Tensor:
    """RMSNorm over each head with the same weights, by choice times a gate's silu.

    Args:
        o: `[B, T, H, V]`.
        weight: `[V]`.
        eps: added to the mean of the squares.
        gate: `[B, T, H V]` or None.

    Returns:
        `[B, T, H V]`.
    """
    normed = (F.rms_norm(o, o.shape[-1:], eps=eps) * weight).flatten(-2)
    return normed if gate is None else normed * F.silu(gate)


def skip_norm(
    o: Tensor, x: Tensor, gate: Tensor, skip: Tensor, weight: Tensor, eps: float
) -> Tensor:
    """What Mamba-2 does behind its recurrence: `RMSNorm((o + skip x) silu(gate))`.

    Mamba-2, arXiv 2405.21060, section 7.1: the norm comes behind the gate.

    Args:
        o: `[B, T, H, V]`.
        x: `[B, T, H, V]`, what the recurrence was given.
        gate: `[B, T, H V]`.
        skip: `[H]`.
        weight: `[H V]`.
        eps: added to the mean of the squares.

    Returns:
        `[B, T, H V]`.
    """
    y = (o + skip[:, None] * x).flatten(-2)
    return F.rms_norm(y * F.silu(gate), weight.shape, weight, eps)


def scaled_heads(x: Tensor, factor: Tensor) -> Tensor:
    """`x [B, T, H, V]` times a number a head, `[B, T, H]`."""
    return x * factor[..., None]


def squared_relu(x: Tensor) -> Tensor:
    """`relu(x)^2` (arXiv 2109.08668)."""
    positive = F.relu(x)
    return positive * positive  # square() goes through pow, which is slower


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) up` (arXiv 2002.05202)."""
    return F.silu(gate) * up
