"""What the recurrences share: checked arguments, chunks, running decays and decayed products.

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
"""Largest sum of log-decays over which exp(G_i) and exp(-G_j) are formed apart: what the mask
removes of their products stays below exp(40), far from overflow."""

_WEAK = 1.0
"""Strongest log-decay of a step whose gradient survives as the difference of two rounded terms."""

_MODERATE = 2.0
"""The same for blocks. Above it a block is two tokens, which meet undecayed: in longer ones the
rounding of what a step does not decay would be more than that step's gradient."""


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
    check_reset(reset, batch, time)
    expected = (batch, heads, key_dim, state_width)
    if initial_state is not None and initial_state.shape != expected:
        raise ValueError(f"initial_state must be {[*expected]}, but is {[*initial_state.shape]}")


def check_reset(reset: Tensor | None, batch: int, time: int) -> None:
    """Refuse resets that are not one bool for every token.

    Raises:
        ValueError: naming the shape that would fit.
    """
    if reset is not None and (reset.shape != (batch, time) or reset.dtype != torch.bool):
        raise ValueError(
            f"reset must be a bool tensor {[batch, time]}, but is {reset.dtype} {[*reset.shape]}"
        )


class Chunks:
    """A plan to cut T tokens into N chunks of C, and each chunk into `2**levels` blocks.

    A block is a stretch in which the decays are weak enough for exp(G_i) and exp(-G_j) to be formed
    apart. C is `chunk_size`, or a little more where the blocks need it: no result depends on it.
    The last chunk is filled up with zeros: tokens that neither write nor decay.
    """

    def __init__(self, time: int, chunk_size: int, log_decay: Tensor | None = None) -> None:
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, but is {chunk_size}")
        self.time = time
        length = min(chunk_size, time)
        strongest = 0.0 if log_decay is None else -float(log_decay.detach().amin())
        longest_block = _MAX_SPAN / strongest if strongest > 0 else math.inf
        if strongest > _MODERATE:
            longest_block = min(longest_block, 2.0)  # two tokens meet with a weight of exactly 1
        self.levels = math.ceil(math.log2(max(length / max(longest_block, 1.0), 1.0)))
        self.block = math.ceil(length / 2**self.levels)
        self.length = self.block * 2**self.levels
        self.padding = -time % self.length
        self.is_weak = strongest <= _WEAK and self.levels == 0

    def cut(self, x: Tensor) -> Tensor:
        """`[B, T, H, X]` -> `[B, H, N, C, X]`, contiguous."""
        x = F.pad(x, (0, 0, 0, 0, 0, self.padding)) if self.padding else x
        return rearrange(x, "b (n c) h x -> b h n c x", c=self.length).contiguous()

    def join(self, x: Tensor) -> Tensor:
        """`[B, H, N, C, X]` -> `[B, T, H, X]`."""
        return rearrange(x, "b h n c x -> b (n c) h x")[:, : self.time]


class Segments(NamedTuple):
    """Which tokens of a chunk belong to one document."""

    same: Tensor
    """`[B, 1, N, C, C]` bool: tokens i and j stand in the same document."""
    first: Tensor
    """`[B, 1, N, C, 1]` bool: no document has started in this chunk: the carried state counts."""
    last: Tensor
    """`[B, 1, N, C, 1]` bool: none starts after this token: its write reaches the next chunk."""

    @classmethod
    def from_reset(cls, reset: Tensor, chunks: Chunks) -> "Segments":
        """From `reset [B, T]`, True where a token starts a document."""
        index = chunks.cut(reset[:, :, None, None].long()).cumsum(dim=3)
        return cls(index == index.transpose(-1, -2), index == 0, index == index[..., -1:, :])


class Reader(NamedTuple):
    """Something that reads the state at every token, and what earlier writes are worth to it."""

    x: Tensor
    """`[B, H, N, C, K]`."""
    faded: Tensor
    """x times the decay since the start of the chunk."""
    after_write: bool
    """Whether it reads the state after the token's decay and write (G), or before them (E)."""


class Decay:
    """The decays of each chunk as the ops need them, for decays of any strength.

    Sums are formed in float64. All that is exponentiated here is at most 0, but for the inverse of
    weak decays, which stays below exp(40).

    Args:
        log_decay: `[B, T, H]` or `[B, T, H, K]`, <= 0, -inf allowed; None for no decay.
        chunks: the plan.
        dtype: of what is weighted.
    """

    def __init__(self, log_decay: Tensor | None, chunks: Chunks, dtype: torch.dtype) -> None:
        self.chunks = chunks
        self._step = self._inclusive = self._exclusive = self._inverse = self._to_end = None
        if log_decay is None:
            return
        g = (log_decay if log_decay.dim() == 4 else log_decay[..., None]).double()
        self._step = chunks.cut(g.clamp(min=LOG_ZERO))
        faded = self._step.cumsum(dim=-2).exp()
        self._inclusive = faded.to(dtype)
        self._exclusive = F.pad(faded[..., :-1, :], (0, 0, 1, 0), value=1.0).to(dtype)
        if chunks.is_weak:
            self._inverse = faded.reciprocal().to(dtype)
            self._to_end = self._inverse * self._inclusive[..., -1:, :]
        else:
            self._to_end = (-_sum_from(self._step, chunks.length)).exp().to(dtype)

    def reader(self, x: Tensor, *, after_write: bool) -> Reader:
        """A reader `x [B, H, N, C, K]` of the state after or before each token's write."""
        factor = self._inclusive if after_write else self._exclusive
        return Reader(x, x if factor is None else x * factor, after_write)

    def to_end(self, x: Tensor) -> Tensor:
        """`x [B, H, N, C, K]`, written at each token, as it stands at the end of the chunk."""
        return x if self._to_end is None else x * self._to_end

    def over_chunk(self) -> Tensor | None:
        """`[B, H, N, K or 1, 1]`: what a whole chunk leaves of the state; None for all."""
        return None if self._inclusive is None else self._inclusive[..., -1, :, None]

    def products(
        self, readers: Sequence[Reader], columns: Sequence[Tensor], segments: Segments | None
    ) -> Tensor:
        """What every reader finds of every write of its chunk: `sum_c x_ic column_jc decay_ijc`.

        Args:
            readers: R of them.
            columns: M tensors `[B, H, N, C, K]`, each row written at its token.
            segments: the documents; what was written in another one is not found.

        Returns:
            `[B, H, N, R C, M C]`, zero for writes that are still to come.
        """
        length, count = self.chunks.length, len(columns)
        if self.chunks.is_weak:
            fading = [x if self._inverse is None else x * self._inverse for x in columns]
            found = torch.cat([r.faded for r in readers], -2) @ torch.cat(fading, -2).mT
        else:
            strict = self._strict_products(readers, columns)
            found = rearrange(strict, "r m b h n i j -> b h n (r i) (m j)")
            for place, reader in enumerate(readers):
                if reader.after_write:
                    own = [torch.diag_embed((reader.x * x).sum(-1)) for x in columns]
                    space = (place * length, (len(readers) - 1 - place) * length)
                    found = found + F.pad(torch.cat(own, -1), (0, 0, *space))
        seen = torch.ones(length, length, dtype=torch.bool, device=found.device)
        masks = [seen.tril(0 if reader.after_write else -1) for reader in readers]
        visible = torch.cat(masks).repeat(1, count)
        if segments is not None:
            visible = visible & segments.same.repeat(1, 1, 1, len(readers), count)
        return found.masked_fill(~visible, 0.0)

    def _strict_products(self, readers: Sequence[Reader], columns: Sequence[Tensor]) -> Tensor:
        """`[R, M, B, H, N, C, C]`: the products below the diagonal, for decays of any strength.

        Inside a block exp(X_i) and exp(-G_j) are formed apart, measured from its middle. Two
        neighbouring blocks meet through the decay E at their border, from which both factors are
        at most 1, and so on upwards: GLA's sub-chunks (arXiv 2312.06635, section 4.3) at every
        level.
        """
        steps = self._step
        assert steps is not None

        def part(x: Tensor, size: int, which: slice) -> Tensor:
            """`[B, H, N, P, c, K]`: the same rows of each stretch of `size`."""
            return rearrange(x, "b h n (p c) k -> b h n p c k", c=size)[..., which, :]

        def products(size: int, row: slice, column: slice, origin: int) -> Tensor:
            """`[R, M, B, H, N, P, i, j]`: some rows times some columns of each stretch."""
            inclusive = _sum_from(part(steps, size, slice(None)), origin)
            exclusive = F.pad(inclusive[..., :-1, :], (0, 0, 1, 0))  # the first row meets nothing
            left = [
                _decayed(
                    part(reader.x, size, row),
                    (inclusive if reader.after_write else exclusive)[..., row, :],
                )
                for reader in readers
            ]
            right = [_decayed(part(x, size, column), -inclusive[..., column, :]) for x in columns]
            return rearrange(
                torch.cat(left, dim=-2) @ torch.cat(right, dim=-2).mT,
                "b h n p (r i) (m j) -> r m b h n p i j",
                r=len(readers),
                m=len(columns),
            )

        size, whole = self.chunks.block, slice(None)
        if size == 1:  # nothing below the diagonal, and exp(-G) could overflow on it
            shape = (len(readers), len(columns), *columns[0].shape[:4], 1, 1)
            result = columns[0].new_zeros(shape)
        else:
            result = products(size, whole, whole, size // 2).tril(-1)
        while size < self.chunks.length:
            crossing = products(2 * size, slice(size, None), slice(size), size)
            upper, lower = rearrange(result, "... (p two) i j -> two ... p i j", two=2)
            upper = F.pad(upper, (0, size))
            result = torch.cat([upper, torch.cat([crossing, lower], dim=-1)], dim=-2)
            size *= 2
        return result.squeeze(-3)


def _sum_from(steps: Tensor, origin: int) -> Tensor:
    """`[..., C, K]`: the decay from just before row `origin` until after each row.

    Positive for earlier rows, and a constant 0 for the last of these. Summed outwards from there,
    not the difference of two sums from the start: a step's gradient is gathered from what it
    decays and nothing else, so that nothing cancels that is larger than a strong decay's gradient.
    """
    before = F.pad(steps[..., 1:origin, :], (0, 0, 0, 1)).flip(-2).cumsum(dim=-2).flip(-2)
    return torch.cat([-before, steps[..., origin:, :].cumsum(dim=-2)], dim=-2)


def _decayed(x: Tensor, exponent: Tensor) -> Tensor:
    """`x * exp(exponent)` in the dtype of x."""
    return x * exponent.to(x.dtype).exp()
