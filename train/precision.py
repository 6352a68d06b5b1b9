"""What the matrix products of a training step are computed in: float32 or bfloat16."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from model.ops.products import has_bf16_tiles, rounded_to_bf16


def choose_precision(asked: str) -> str:
    """`auto` is bf16 where the processor that trains is fast at it, and fp32 elsewhere."""
    if asked != "auto":
        return asked
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if has_bf16_tiles() else "fp32"


@contextmanager
def bf16_products(
    device: torch.device, *, enabled: bool
) -> Iterator[AbstractContextManager[object]]:
    """Both passes of a step stand in it, the forward pass in the context that it gives as well.

    On a CPU with tiles it is `rounded_to_bf16`, elsewhere autocast, around the forward pass.
    """
    tiled = enabled and device.type == "cpu" and has_bf16_tiles()
    with rounded_to_bf16() if tiled else nullcontext():
        yield torch.autocast(device.type, torch.bfloat16, enabled=enabled and not tiled)
