"""Matrix products of float32 on a CPU: in float32, or with factors rounded to bfloat16."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_rounded = False


def has_bf16_tiles() -> bool:
    """Whether the CPU multiplies tiles of bfloat16 (AMX), several times as fast as float32."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


@contextmanager
def rounding_to_bf16(*, on: bool) -> Iterator[None]:
    """Products of float32 in it round their factors, and add in float32; or, off, they are exact.

    For a CPU that has tiles. Which ones are rounded PyTorch decides: all but the smallest.
    Everything else stays in float32, what a product gives too.
    """
    global _rounded
    products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # made at run time
    before = _rounded, products.fp32_precision
    _rounded, products.fp32_precision = on, "bf16" if on else "ieee"
    try:
        yield
    finally:
        _rounded, products.fp32_precision = before


def is_rounded(x: Tensor) -> bool:
    """Whether products of `x` are."""
    return _rounded and x.device.type == "cpu" and x.dtype == torch.float32
