"""Decays from their logs, native: `exp`, but that no digits are lost over many steps.

`exponential.h` says how. Shape legend: B batch, T time, H heads, K key dim.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from model.ops.native.loading import call


def decays_now(log_decay: Tensor) -> Tensor:
    """Runs the kernel at once, unseen by autograd and by compilers.

    Args:
        log_decay: `[B, T, H]` or `[B, T, H, K]`, <= 0, -inf allowed; float32 or float64.

    Returns:
        The decays, of the same shape. Each may be off by a rounding, so that products of successive
        ones are not off by more.
    """
    log_decay = log_decay.contiguous()
    decay = torch.empty_like(log_decay)
    batch, time = log_decay.shape[:2]
    channels = log_decay[0, 0].numel()
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in (log_decay, decay))
    sizes = (ctypes.c_int64(n) for n in (batch, time, channels))
    call("decays", log_decay.dtype, *pointers, *sizes)
    return decay


decays_op = torch.library.custom_op("ebb::decays", decays_now, mutates_args=())


@decays_op.register_fake
def _(log_decay: Tensor) -> Tensor:
    return log_decay.new_empty(log_decay.shape)


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _backward(ctx: Any, for_decay: Tensor) -> Tensor:
    """That of exp, which is 0 for -inf."""
    (decay,) = ctx.saved_tensors
    gradient: Tensor = for_decay * decay
    return gradient


decays_op.register_autograd(_backward, setup_context=_keep_for_backward)
