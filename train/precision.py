"""What the matrix products of a training step are computed in: float32 or bfloat16."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from model.ops import native
from model.ops.products import has_bf16_tiles, rounding_to_bf16

CPU = torch.device("cpu")


def training_device() -> torch.device:
    """Of one process."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_precision(asked: str, device: torch.device) -> str:
    """`auto` is bf16 where what trains is fast at it, and fp32 elsewhere."""
    if asked != "auto":
        return asked
    return "bf16" if is_fast_in_bf16(device) else "fp32"


def is_fast_in_bf16(device: torch.device) -> bool:
    """Whether a GPU has products in bfloat16, or a CPU can round some, with no loss to recurrences.

    Theirs must not be rounded: the native kernels have none that PyTorch sees.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return device.type == "cpu" and has_bf16_tiles() and native.is_available()


def bf16_products(device: torch.device, *, enabled: bool) -> AbstractContextManager[None]:
    """Products in it are rounded on a CPU that is fast in bfloat16; elsewhere it does nothing."""
    rounds = enabled and device.type == "cpu" and is_fast_in_bf16(device)
    return rounding_to_bf16(on=True) if rounds else nullcontext()


def both_passes(
    loss_of: Callable[[], Tensor],
    device: torch.device,
    *,
    bf16: bool,
    backward: Callable[[Tensor], None] = torch.autograd.backward,
) -> Tensor:
    """The loss of a step; its gradient is then in the parameters.

    In bfloat16 the products of both passes are `bf16_products`; where those do nothing, the forward
    pass is autocast.
    """
    casts = bf16 and not (device.type == "cpu" and is_fast_in_bf16(device))
    with bf16_products(device, enabled=bf16):
        with torch.autocast(device.type, torch.bfloat16, enabled=casts):
            loss = loss_of()
        backward(loss)
    return loss
