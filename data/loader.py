"""Batches of tokens: a pure function of the seed and the step for training, in order for tests."""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from data.errors import DataError
from data.packing import TokenArray


class Batch(NamedTuple):
    """Windows of tokens and what follows each of them.

    Attributes:
        inputs: int64 ``[B, T]``.
        targets: int64 ``[B, T]``, the token after each input; the end token is one of them, and
            belongs to the document before it.
        reset: bool ``[B, T]``, True where a document starts (the token after an end token, and
            the first of all); None where no document starts in the batch.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    reset: torch.Tensor | None


class TrainingBatches:
    """The endless sequence of training batches, by step.

    Epoch ``e`` lays windows of ``context`` tokens without overlap from an offset in
    ``[0, context)`` and takes them in an order, both drawn from ``(seed, e)``; step ``s`` takes
    windows ``s * batch_size`` onwards of the sequence of all epochs. To resume one needs the step
    and nothing else, and every model trained with a seed sees the same tokens in the same order.

    Attributes:
        windows_per_epoch: The same for every epoch, whatever its offset.

    Raises:
        DataError: There are fewer tokens than one context and its last target.
    """

    def __init__(
        self, tokens: TokenArray, *, context: int, batch_size: int, seed: int, end_id: int
    ) -> None:
        _check(tokens, context, batch_size, "training")
        if seed < 0:
            raise DataError(f"The seed is {seed}: choose one that is not negative.")
        self._tokens, self._context, self._batch_size = tokens, context, batch_size
        self._seed, self._end_id = seed, end_id
        # One window less than would fit leaves room for every offset below one context.
        self.windows_per_epoch = max(1, (tokens.size - 1) // context - 1)
        spare = tokens.size - 1 - self.windows_per_epoch * context
        self._num_offsets = min(context, spare + 1)
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    @property
    def steps_per_epoch(self) -> int:
        """How many steps it takes to see every window of an epoch, rounded up."""
        return -(-self.windows_per_epoch // self._batch_size)

    def __getitem__(self, step: int) -> Batch:
        if step < 0:
            raise IndexError("steps are counted from 0")
        first = step * self._batch_size
        starts = np.empty(self._batch_size, dtype=np.int64)
        for row in range(self._batch_size):
            epoch, position = divmod(first + row, self.windows_per_epoch)
            offset, order = self._epoch(epoch)
            starts[row] = offset + order[position] * self._context
        return _windows(self._tokens, starts, self._context, self._end_id)

    def _draw_epoch(self, epoch: int) -> tuple[int, npt.NDArray[np.int64]]:
        random = np.random.default_rng([self._seed, epoch])
        return int(random.integers(self._num_offsets)), random.permutation(self.windows_per_epoch)


def validation_batches(
    tokens: TokenArray,
    *,
    context: int,
    batch_size: int,
    end_id: int,
    max_tokens: int | None = None,
) -> Iterator[Batch]:
    """Windows one after the other, without overlap; each is read with a fresh state.

    Args:
        tokens: 1-D.
        context: Tokens in a window; less than one window at the end is left out.
        batch_size: Windows in a batch; the last batch may be smaller.
        end_id: The token that ends a document.
        max_tokens: Take only so many tokens (at least one window), evenly spread over the text.

    Raises:
        DataError: At the call: there are fewer tokens than one context and its last target.
    """
    _check(tokens, context, batch_size, "validation")
    available = (tokens.size - 1) // context
    count = available if max_tokens is None else min(available, max(1, max_tokens // context))
    starts = np.arange(count, dtype=np.int64) * available // count * context
    return (
        _windows(tokens, starts[first : first + batch_size], context, end_id)
        for first in range(0, count, batch_size)
    )


def sequential_stretches(tokens: TokenArray, *, context: int, end_id: int) -> Iterator[Batch]:
    """All tokens in order, batch 1, to be read with the state carried from each to the next.

    Every token but the first is a target exactly once; the last stretch may be shorter.

    Raises:
        DataError: At the call: there are fewer than two tokens.
    """
    _check(tokens, 1, 1, "validation")
    last = tokens.size - 1
    return (
        _windows(tokens, np.array([start]), min(context, last - start), end_id)
        for start in range(0, last, context)
    )


def window_stretches(
    tokens: TokenArray,
    starts: npt.NDArray[np.int64],
    *,
    length: int,
    stretch: int,
    end_id: int,
) -> Iterator[Batch]:
    """Long windows side by side, a stretch at a time: the state is carried to the next stretch.

    Args:
        tokens: 1-D.
        starts: Where each window begins; there must be ``length + 1`` tokens from there on.
        length: Tokens in a window.
        stretch: Tokens of each window in a batch; the last batch may have fewer.
        end_id: The token that ends a document.
    """
    assert starts.max() + length < tokens.size, "a window reaches beyond the text"
    return (
        _windows(tokens, starts + done, min(stretch, length - done), end_id)
        for done in range(0, length, stretch)
    )


def _windows(tokens: TokenArray, starts: npt.NDArray[np.int64], length: int, end_id: int) -> Batch:
    """Cut ``length`` tokens and the one after at each start."""
    # One token more at the front tells whether the first one starts a document.
    before = np.array([tokens[start - 1] if start else end_id for start in starts], dtype=np.int64)
    rows = np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int64)
    inputs = rows[:, :-1]
    reset = np.concatenate([before[:, None], inputs[:, :-1]], axis=1) == end_id
    return Batch(
        torch.from_numpy(np.ascontiguousarray(inputs)),
        torch.from_numpy(np.ascontiguousarray(rows[:, 1:])),
        torch.from_numpy(reset) if reset.any() else None,
    )


def _check(tokens: TokenArray, context: int, batch_size: int, side: str) -> None:
    if context < 1 or batch_size < 1:
        raise DataError("The context and the batch size are counted from 1.")
    if tokens.size < context + 1:
        raise DataError(
            f"The {side} text has {tokens.size} tokens, fewer than one context of {context} and "
            "the token after it: give a longer text or a smaller context."
        )
