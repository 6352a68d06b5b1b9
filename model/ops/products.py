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
def rounded_to_bf16() -> Iterator[None]:
    """All products of float32 in it round their factors, and add in float32, if there are tiles.

    Everything else stays in float32, what a product gives too.
    """
    global _rounded
    products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # made at run time
    before = _rounded, products.fp32_precision
    if has_bf16_tiles():
        _rounded, products.fp32_precision = True, "bf16"
    try:
        yield
    finally:
        _rounded, products.fp32_precision = before


def factor_dtype(x: Tensor) -> torch.dtype:
    """What `x` is to be turned into for a kernel that multiplies in the precision it is given."""
    rounded = _rounded and x.device.type == "cpu" and x.dtype == torch.float32
    return torch.bfloat16 if rounded else x.dtype
