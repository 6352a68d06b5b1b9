"""The functions of `model.ops.elementwise`, each one pass through memory where it can be.

The native kernels take tensors on the CPU, all of them float32 or all float64; for all else, and
where nothing was compiled, the definitions run. Shape legend: B batch, T time, H heads, K key dim,
D = H K width, M tensors at once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.ops import elementwise, native
from model.ops.elementwise import SMALLEST_NORM, OwnValue, RWKV7Inputs, ValueResidual
from model.ops.native.rows import run_rows

__all__ = [
    "OwnValue",
    "RWKV7Inputs",
    "ValueResidual",
    "gated_head_norm",
    "head_rms_norm",
    "interpolations",
    "norm",
    "norm_of_sum",
    "rwkv7_inputs",
    "scaled_heads",
    "short_convolution",
    "skip_norm",
    "squared_relu",
    "swiglu",
    "varied_interpolations",
]


def _is_native(tensors: Sequence[Tensor]) -> bool:
    dtype = tensors[0].dtype
    return (
        dtype in (torch.float32, torch.float64)
        and all(x.dtype == dtype and x.device.type == "cpu" for x in tensors)
        and tensors[0].numel() > 0
        and native.is_available()
    )


def interpolations(x: Tensor, last: Tensor, mix: Tensor, reset: Tensor | None) -> list[Tensor]:
    """Token shift: `x + (x_prev - x) mix_m` for every m; `elementwise.interpolations`."""
    last = last.to(x.dtype)
    if not _is_native((x, last, mix)):
        return elementwise.interpolations(x, last, mix, reset)
    return [*run_rows("shift", (x, last, mix), reset)]


def varied_interpolations(
    x: Tensor, last: Tensor, mix: Tensor, offsets: Sequence[Tensor], reset: Tensor | None
) -> list[Tensor]:
    """Token shift by the data; `elementwise.varied_interpolations`."""
    last = last.to(x.dtype)
    tensors = (x, last, mix, *offsets)
    if not _is_native(tensors):
        return elementwise.varied_interpolations(x, last, mix, offsets, reset)
    return [*run_rows("shift", tensors, reset)]


def short_convolution(
    x: Tensor, window: Tensor, taps: Tensor, bias: Tensor | None, reset: Tensor | None
) -> Tensor:
    """A short causal convolution and its silu; `elementwise.short_convolution`."""
    window = window.to(x.dtype)
    tensors = [x, window, taps] if bias is None else [x, window, taps, bias]
    if not _is_native(tensors):
        return elementwise.short_convolution(x, window, taps, bias, reset)
    return run_rows("convolution", tensors, reset, choice=taps.shape[0])[0]


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm, or without a bias RMSNorm; `elementwise.norm`."""
    tensors = [x, weight] if bias is None else [x, weight, bias]
    if x.dim() != 3 or not _is_native(tensors):
        return elementwise.norm(x, weight, bias, eps)
    return run_rows("norm", tensors, eps=eps)[0]


def norm_of_sum(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`norm(x + y)`, and `x + y` itself; `elementwise.norm_of_sum`."""
    tensors = [x, y, weight] if bias is None else [x, y, weight, bias]
    if x.dim() != 3 or not _is_native(tensors):
        return elementwise.norm_of_sum(x, y, weight, bias, eps)
    normed, total = run_rows("norm", tensors, eps=eps, choice=1)
    return normed, total


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
    """From the projections of RWKV-7 to its recurrence; `elementwise.rwkv7_inputs`."""
    tensors = [key, decay, iclr, decay_bias, iclr_bias, removal_scale, iclr_scale]
    if residual is not None:
        tensors += [value, *residual]
    if not _is_native(tensors):
        return elementwise.rwkv7_inputs(
            key,
            value,
            decay,
            iclr,
            decay_bias=decay_bias,
            iclr_bias=iclr_bias,
            removal_scale=removal_scale,
            iclr_scale=iclr_scale,
            residual=residual,
            num_heads=num_heads,
        )
    log_decay, key, a, b, *rest = run_rows("rwkv7", tensors, heads=num_heads, eps=SMALLEST_NORM)
    return RWKV7Inputs(log_decay, key, a, b, rest[0] if rest else value)


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
    """GroupNorm with one group a head, times a gate; `elementwise.gated_head_norm`."""
    tensors = [o, gate, weight, bias, *(own or ())]
    if not _is_native(tensors):
        return elementwise.gated_head_norm(o, gate, weight, bias, eps, own=own, silu=silu)
    flat = [o.flatten(-2), gate, weight, bias, *(x.flatten(-2) for x in own or ())]
    return run_rows("head_norm", flat, heads=o.shape[2], eps=eps, choice=int(silu))[0]


def head_rms_norm(o: Tensor, weight: Tensor, eps: float, gate: Tensor | None = None) -> Tensor:
    """RMSNorm over each head, by choice times a gate's silu; `elementwise.head_rms_norm`."""
    rest = [weight] if gate is None else [weight, gate]
    if not _is_native((o, *rest)):
        return elementwise.head_rms_norm(o, weight, eps, gate)
    return run_rows("head_rms", (o.flatten(-2), *rest), heads=o.shape[2], eps=eps)[0]


def skip_norm(
    o: Tensor, x: Tensor, gate: Tensor, skip: Tensor, weight: Tensor, eps: float
) -> Tensor:
    """RMSNorm behind skip and gate; `elementwise.skip_norm`."""
    if not _is_native((o, x, gate, skip, weight)):
        return elementwise.skip_norm(o, x, gate, skip, weight, eps)
    flat = (o.flatten(-2), x.flatten(-2), gate, skip, weight)
    return run_rows("skip_norm", flat, heads=o.shape[2], eps=eps)[0]


def scaled_heads(x: Tensor, factor: Tensor) -> Tensor:
    """Times a number a head; `elementwise.scaled_heads`."""
    if not _is_native((x, factor)):
        return elementwise.scaled_heads(x, factor)
    return run_rows("head_scale", (x.flatten(-2), factor), heads=x.shape[2])[0].view_as(x)


def squared_relu(x: Tensor) -> Tensor:
    """`relu(x)^2` for `[B, T, D]`; `elementwise.squared_relu`."""
    if not _is_native((x,)):
        return elementwise.squared_relu(x)
    return run_rows("squared_relu", (x,))[0]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) up` for `[B, T, D]`; `elementwise.swiglu`."""
    if not _is_native((gate, up)):
        return elementwise.swiglu(gate, up)
    return run_rows("swiglu", (gate, up))[0]
