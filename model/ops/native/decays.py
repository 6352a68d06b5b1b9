"""Decays from their logs, native: `exp`, but that no digits are lost over many steps.

`exponential.h` says how. Shape legend: B batch, T time, H heads, K key dim.
"""

import ctypes

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
