"""What the matrix products of a training step are computed in: float32 or bfloat16."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from model.ops import native
from model.ops.products import has_bf16_tiles, rounded_to_bf16


def choose_precision(asked: str) -> str:
    """`auto` is bf16 where the processor that trains is fast at it, and fp32 elsewhere."""
    if asked != "auto":
        return asked
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if can_round() else "fp32"


def can_round() -> bool:
    """Whether products on the CPU can be rounded, with no loss to the recurrences.

    Theirs must not be. The native kernels have none that PyTorch sees.
    """
    return has_bf16_tiles() and native.is_available()


@contextmanager
def bf16_products(
    device: torch.device, *, enabled: bool
) -> Iterator[AbstractContextManager[object]]:
    """Both passes of a step stand in it, the forward pass in the context that it gives as well.

    On a CPU with tiles it is `rounded_to_bf16`, elsewhere autocast, around the forward pass.
    """
    rounds = enabled and device.type == "cpu" and can_round()
    with rounded_to_bf16() if rounds else nullcontext():
        yield torch.autocast(device.type, torch.bfloat16, enabled=enabled and not rounds)
