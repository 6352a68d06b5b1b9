"""Matrices as the native token step reads them: in four formats, in tiles of 16 rows.

A matrix-vector product is as fast as its matrix can be read, so a format is worth what it saves in
bytes. Integers have one scale for each 32 weights of a row.

Shape legend: R rows, C columns, N = C / 32 blocks of a row.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

FORMATS = ("fp32", "bf16", "int8", "int4")
"""Bits a weight: 32, 16, 8.5 and 4.5, scales included. In the order of the kernel's `Format`."""

ROWS = 16
"""Rows of a tile: the lanes of a register."""
BLOCK = 32
"""Columns that share a scale."""
_ROWS_AT_ONCE = 16 * ROWS


class PackedMatrix(NamedTuple):
    """A matrix in tiles."""

    values: Tensor
    """Flat, in the order in which they are read."""
    scales: Tensor | None
    """`[R / 16, N, 16]` bfloat16, of the integer formats."""
    rows: int
    """Before they were filled up to whole tiles."""
    columns: int
    """With the zeros that fill up the last block."""


def pack(matrix: Tensor, weights: str) -> PackedMatrix:
    """Rounds `[R, C]` to a format of `FORMATS` and lays it out for the kernel.

    A few rows after the other, so that what is made on the way stays in the caches.
    """
    parts = [_pack_rows(rows, weights) for rows in torch.split(matrix.detach(), _ROWS_AT_ONCE)]
    values, scales = zip(*parts, strict=True)
    columns = matrix.shape[1] if weights == "fp32" else -(-matrix.shape[1] // BLOCK) * BLOCK
    return PackedMatrix(
        torch.cat(values),
        torch.cat(scales) if weights in ("int8", "int4") else None,
        matrix.shape[0],
        columns,
    )


def _pack_rows(matrix: Tensor, weights: str) -> tuple[Tensor, Tensor | None]:
    """Values and scales of whole tiles."""
    matrix = _filled_up(matrix.float(), 1 if weights == "fp32" else BLOCK)
    scales = None
    if weights == "fp32":
        values = rearrange(matrix, "(tile row) c -> tile c row", row=ROWS)
    elif weights == "bf16":
        values = rearrange(
            matrix.bfloat16(), "(tile row) (c two) -> tile c row two", row=ROWS, two=2
        )
    else:
        integers, by_row = _quantize(matrix, weights)
        scales = rearrange(by_row, "(tile row) n -> tile n row", row=ROWS).contiguous()
        if weights == "int8":
            values = rearrange(
                (integers + 128).to(torch.uint8),
                "(tile row) n (c four) -> tile n c row four",
                row=ROWS,
                four=4,
            )
        else:
            low, high = rearrange(
                (integers + 8).to(torch.uint8),
                "(tile row) n (c half four) -> half tile n c row four",
                row=ROWS,
                half=2,
                four=4,
            )
            values = low | high << 4
    return values.flatten(), scales


def rounded(matrix: Tensor, weights: str) -> Tensor:
    """The matrix `[R, C]` that `pack` keeps, as float32."""
    if weights == "fp32":
        return matrix.float()
    if weights == "bf16":
        return matrix.bfloat16().float()
    return dequantized(*quantized(matrix, weights))


def quantized(matrix: Tensor, weights: str) -> tuple[Tensor, Tensor]:
    """The integers `[R, C]` int8 and scales `[R, N]` bfloat16 of an integer format."""
    rows, columns = matrix.shape
    integers, scales = _quantize(_filled_up(matrix.detach().float(), BLOCK), weights)
    return integers.flatten(1)[:rows, :columns].to(torch.int8), scales[:rows]


def dequantized(integers: Tensor, scales: Tensor) -> Tensor:
    """The matrix `[R, C]` of `quantized`, as float32."""
    by_column = scales.float().repeat_interleave(BLOCK, dim=1)
    return integers * by_column[:, : integers.shape[1]]


def _filled_up(matrix: Tensor, columns: int) -> Tensor:
    """With rows of zeros up to whole tiles, and columns of zeros up to a multiple."""
    missing = [-matrix.shape[1] % columns, -matrix.shape[0] % ROWS]
    return F.pad(matrix, (0, missing[0], 0, missing[1]))


def _quantize(matrix: Tensor, weights: str) -> tuple[Tensor, Tensor]:
    """Integers `[R, N, 32]` as floats, and scales `[R, N]` in bfloat16, for a filled up matrix."""
    blocks = rearrange(matrix, "r (n c) -> r n c", c=BLOCK)
    if weights == "int8":
        scales = (blocks.abs().amax(dim=-1) / 127).bfloat16()
        return _integers(blocks, scales, -127, 127), scales
    # Four bits reach from -8 to 7: the largest value takes the end that reaches further.
    largest = blocks.gather(-1, blocks.abs().argmax(dim=-1, keepdim=True)).squeeze(-1)
    scales = (largest / -8).bfloat16()
    return _integers(blocks, scales, -8, 7), scales


def _integers(blocks: Tensor, scales: Tensor, low: int, high: int) -> Tensor:
    divisors = torch.where(scales == 0, 1.0, scales.float())[..., None]
    return (blocks / divisors).round().clamp(low, high)
