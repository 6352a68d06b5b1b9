"""What the recurrences share: checked arguments, chunks, running decays and products weighted by them.

Shape legend: B batch, T time, H heads, K key dim, V value dim, N chunks, C chunk length.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

LOG_ZERO = -1000.0
"""Log-decays below this are raised to it: exp(-1000) is 0 in float64 too, and unlike -inf it can be
subtracted from itself."""

_MAX_SPAN = 40.0
"""Largest sum of log-decays in a block in which exp(G_i) and exp(-G_j) are formed apart. Measured from
the middle, both stay below exp(20), and what the mask removes below exp(40): far from overflow."""


def state_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of states, decays and sums: that of the inputs, at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def check_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    like_k: Sequence[tuple[str, Tensor]] = (),
    log_decay: Tensor | None,
    reset: Tensor | None,
    initial_state: Tensor | None,
    state_width: int,
) -> None:
    """Refuse shapes that do not fit together.

    Raises:
        ValueError: naming the argument, its shape and the shape that would fit.
    """
    if k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"k and v must be [B, T, H, K] and [B, T, H, V], but are {[*k.shape]} and {[*v.shape]}"
        )
    batch, time, heads, key_dim = k.shape
    if time < 1:
        raise ValueError("a sequence needs at least one token, but T is 0")
    for name, tensor in (("q", q), *like_k):
        if tensor.shape != k.shape:
            raise ValueError(f"{name} must be {[*k.shape]} as k is, but is {[*tensor.shape]}")
    if log_decay is not None and log_decay.shape not in (k.shape[:3], k.shape):
        raise ValueError(
            f"log_decay must be {[batch, time, heads]} or {[*k.shape]}, but is {[*log_decay.shape]}"
        )
    if reset is not None and (reset.shape != k.shape[:2] or reset.dtype != torch.bool):
        raise ValueError(
            f"reset must be a bool tensor {[batch, time]}, but is {reset.dtype} {[*reset.shape]}"
        )
    expected = (batch, heads, key_dim, state_width)
    if initial_state is not None and initial_state.shape != expected:
        raise ValueError(f"initial_state must be {[*expected]}, but is {[*initial_state.shape]}")


class Chunks:
    """A plan to cut T tokens into N chunks of C, and each chunk into `2**levels` blocks.

    A block is a stretch in which the decays are weak enough for exp(G_i) and exp(-G_j) to be formed
    apart. C is `chunk_size`, or a little more where the blocks need it: results do not depend on it.
    The last chunk is filled up with zeros: tokens that neither write nor decay.
    """

    def __init__(self, time: int, chunk_size: int, log_decay: Tensor | None = None) -> None:
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, but is {chunk_size}")
        self.time = time
        length = min(chunk_size, time)
        strongest = 0.0 if log_decay is None else -float(log_decay.detach().amin())
        longest_block = _MAX_SPAN / strongest if strongest > 0 else math.inf
        self.levels = math.ceil(math.log2(max(length / max(longest_block, 1.0), 1.0)))
        self.block = math.ceil(length / 2**self.levels)
        self.length = self.block * 2**self.levels
        self.padding = -time % self.length

    def cut(self, x: Tensor) -> Tensor:
        """`[B, T, H, X]` -> `[B, H, N, C, X]`."""
        x = F.pad(x, (0, 0, 0, 0, 0, self.padding)) if self.padding else x
        return rearrange(x, "b (n c) h x -> b h n c x", c=self.length)

    def join(self, x: Tensor) -> Tensor:
        """`[B, H, N, C, X]` -> `[B, T, H, X]`."""
        return rearrange(x, "b h n c x -> b (n c) h x")[:, : self.time]


class Segments(NamedTuple):
    """Which tokens of a chunk belong to one document."""

    same: Tensor
    """`[B, 1, N, C, C]` bool: tokens i and j stand in the same document."""
    first: Tensor
    """`[B, 1, N, C, 1]` bool: no document has started yet in this chunk: the carried state counts."""
    last: Tensor
    """`[B, 1, N, C, 1]` bool: none starts after this token: its write reaches the next chunk."""

    @classmethod
    def from_reset(cls, reset: Tensor, chunks: Chunks) -> "Segments":
        """From `reset [B, T]`, True where a token starts a document."""
        index = chunks.cut(reset[:, :, None, None].long()).cumsum(dim=3)
        return cls(index == index.transpose(-1, -2), index == 0, index == index[..., -1:, :])


class RunningDecay(NamedTuple):
    """Sums of log-decays since the start of the chunk, `[B, H, N, C, K or 1]`, in float64."""

    inclusive: Tensor
    """G_i: the sum up to and with token i."""
    exclusive: Tensor
    """E_i: the sum up to and without token i, shifted from G so that nothing is subtracted."""

    @classmethod
    def from_log_decay(cls, log_decay: Tensor, chunks: Chunks) -> "RunningDecay":
        """From `log_decay [B, T, H]` or `[B, T, H, K]`, <= 0, -inf allowed."""
        g = log_decay if log_decay.dim() == 4 else log_decay[..., None]
        inclusive = chunks.cut(g.double().clamp(min=LOG_ZERO)).cumsum(dim=-2)
        return cls(inclusive, F.pad(inclusive[..., :-1, :], (0, 0, 1, 0)))

    def total(self) -> Tensor:
        """`[B, H, N, K or 1]`: the sum over each whole chunk."""
        return self.inclusive[..., -1, :]

    def until_end(self) -> Tensor:
        """`[B, H, N, C, K or 1]`: the sum after token i, which its write still passes through."""
        return self.inclusive[..., -1:, :] - self.inclusive


def decayed(x: Tensor, exponent: Tensor | None) -> Tensor:
    """`x * exp(exponent)` in the dtype of x; None stands for an exponent of 0."""
    return x if exponent is None else x * exponent.to(x.dtype).exp()


def strict_products(
    rows: Sequence[tuple[Tensor, Tensor | None]],
    columns: Sequence[Tensor],
    decay: RunningDecay | None,
    chunks: Chunks,
) -> Tensor:
    """All `sum_c row_ic column_jc exp(X_ic - G_jc)` with `i > j` inside each chunk, for any decays.

    Inside a block exp(X_i) and exp(-G_j) are formed apart, measured from its middle. Two
    neighbouring blocks meet through the decay E at their border, from which both factors are
    at most 1, and so on upwards: GLA's sub-chunks (arXiv 2312.06635, section 4.3) at every level.

    Args:
        rows: R pairs of a tensor `[B, H, N, C, K]` and its exponent X: G or E of `decay`, or None.
        columns: M tensors `[B, H, N, C, K]`.
        decay: the running decay, or None for none.
        chunks: the plan that cut them.

    Returns:
        `[R, M, B, H, N, C, C]`, zero on and above the diagonal.
    """

    def products(size: int, row: slice, column: slice, origin: Tensor | None) -> Tensor:
        """`[R, M, B, H, N, P, i, j]`: some rows times some columns of each stretch of `size`."""

        def part(x: Tensor, which: slice) -> Tensor:
            return rearrange(x, "b h n (p c) k -> b h n p c k", c=size)[..., which, :]

        left, right = [], []
        for x, exponent in rows:
            apart = None if origin is None or exponent is None else part(exponent, row) - origin
            left.append(decayed(part(x, row), apart))
        shrink = None if decay is None or origin is None else origin - part(decay.inclusive, column)
        for x in columns:
            right.append(decayed(part(x, column), shrink))
        product = torch.cat(left, dim=-2) @ torch.cat(right, dim=-2).transpose(-1, -2)
        return rearrange(
            product, "b h n p (r i) (m j) -> r m b h n p i j", r=len(rows), m=len(columns)
        )

    def exclusive_at(size: int, offset: int) -> Tensor | None:
        """`[B, H, N, P, 1, K or 1]`: E at one place of each stretch of `size`."""
        if decay is None:
            return None
        return rearrange(decay.exclusive, "b h n (p c) k -> b h n p c k", c=size)[
            ..., offset, None, :
        ]

    size, whole = chunks.block, slice(None)
    if size == 1:  # nothing below the diagonal, and exp(-G) could overflow on it
        shape = (len(rows), len(columns), *columns[0].shape[:4], 1, 1)
        result = columns[0].new_zeros(shape)
    else:
        result = products(size, whole, whole, exclusive_at(size, size // 2)).tril(-1)
    while size < chunks.length:
        border = exclusive_at(2 * size, size)
        crossing = products(2 * size, slice(size, None), slice(size), border)
        upper, lower = rearrange(result, "... (p two) i j -> two ... p i j", two=2)
        upper = F.pad(upper, (0, size))
        result = torch.cat([upper, torch.cat([crossing, lower], dim=-1)], dim=-2)
        size *= 2
    return result.squeeze(-3)
