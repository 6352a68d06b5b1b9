"""Checkpoints to pass on: matrices in bfloat16 or 8 bits, and what a reader wants to know."""

from collections.abc import Mapping

import torch
from torch import Tensor

from model.ops.native.packing import BLOCK, ROWS, dequantized, quantized

FORMATS = ("bf16", "int8")
"""Bits of a weight in a matrix: 16, or 8.5 with the scales. Vectors stay as they are."""
INTEGERS, SCALES = ".int8", ".scales"
"""What a matrix in 8 bits is called in a file: its name and one of these."""


def shrink(weights: Mapping[str, Tensor], to: str) -> dict[str, Tensor]:
    """Weights by name, with the matrices in a format of `FORMATS`.

    In 8 bits a row has one scale for each 32 weights, as where a model writes with `--weights int8`
    (`model/ops/native/packing.py`). Matrices of fewer than 16 rows or 32 columns are vectors that
    stand together, such as the factors of a token shift, and stay as they are.
    """
    small: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        is_matrix = tensor.dim() == 2 and tensor.shape[0] >= ROWS and tensor.shape[1] >= BLOCK
        if not is_matrix:
            small[name] = tensor
        elif to == "bf16":
            small[name] = tensor.bfloat16()
        else:
            small[name + INTEGERS], small[name + SCALES] = quantized(tensor, to)
    return small


def grow(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a file by the names of a model: those in 8 bits become float32.

    Raises:
        ValueError: if integers have no scales that fit, or the other way round.
    """
    whole = {name: x for name, x in weights.items() if not name.endswith((INTEGERS, SCALES))}
    found = {name.rpartition(".")[0] for name in weights if name not in whole}
    for name in found:
        integers, scales = weights.get(name + INTEGERS), weights.get(name + SCALES)
        if integers is None or scales is None or not _fit(integers, scales):
            raise ValueError(f"the 8-bit weights of {name} and their scales do not fit")
        whole[name] = dequantized(integers, scales)
    return whole


def _fit(integers: Tensor, scales: Tensor) -> bool:
    return (
        integers.dtype == torch.int8
        and integers.dim() == scales.dim() == 2
        and scales.shape == (integers.shape[0], -(-integers.shape[1] // BLOCK))
    )
