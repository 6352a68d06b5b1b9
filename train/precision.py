"""What the matrix products of a training step are computed in: float32 or bfloat16."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from model.ops import native
from model.ops.products import has_bf16_tiles, rounded_to_bf16

CPU = torch.device("cpu")


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


@contextmanager
def bf16_products(
    device: torch.device, *, enabled: bool
) -> Iterator[AbstractContextManager[object]]:
    """Both passes of a step stand in it, the forward pass in the context that it gives as well.

    On a CPU that is fast in bfloat16 it is `rounded_to_bf16`, elsewhere autocast, around the
    forward pass.
    """
    rounds = enabled and device.type == "cpu" and is_fast_in_bf16(device)
    with rounded_to_bf16() if rounds else nullcontext():
        yield torch.autocast(device.type, torch.bfloat16, enabled=enabled and not rounds)
