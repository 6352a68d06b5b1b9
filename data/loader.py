"""Batches of tokens: a pure function of the seed and the step for training, in order for tests."""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from data.errors import DataError
from data.joined import Tokens, cut_out, release_all
from data.packing import TokenArray, release

_WINDOWS_HELD = 256
"""Windows read before their pages are given back: at 64 kB each, which Linux maps at a time, 16 MB
and the tokens of the windows."""


class Batch(NamedTuple):
    """Windows of tokens and what follows each of them.

    Attributes:
        inputs: int64 ``[B, T]``.
        targets: int64 ``[B, T]``, the token after each input; the end token is one of them, and
            the last of its document.
        reset: bool ``[B, T]``, True where the input is an end token, from which the first token of
            the next document is predicted and nothing else; None where there is none.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    reset: torch.Tensor | None


class _Epochs:
    """What both ways through the training text share: checked settings, and windows by place."""

    def __init__(
        self, tokens: TokenArray, *, context: int, batch_size: int, seed: int, end_id: int
    ) -> None:
        _check(tokens, context, batch_size, "training")
        if seed < 0:
            raise DataError(f"The seed is {seed}: choose one that is not negative.")
        self._tokens, self._context, self._batch_size = tokens, context, batch_size
        self._seed, self._end_id = seed, end_id
        self._touched = 0  # windows, whose pages are mapped

    def _num_offsets(self, windows: int) -> int:
        """In how many places an epoch of so many windows can begin, at most one context apart."""
        return min(self._context, self._tokens.size - windows * self._context)

    def _random(self, epoch: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, epoch])

    def _read(self, starts: npt.NDArray[np.int64]) -> Batch:
        self._touched += self._batch_size
        if self._touched >= _WINDOWS_HELD:
            release(self._tokens)
            self._touched = 0
        return _windows(self._tokens, starts, self._context, self._end_id)


class TrainingBatches(_Epochs):
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
        super().__init__(tokens, context=context, batch_size=batch_size, seed=seed, end_id=end_id)
        # One window less than would fit leaves room for every offset below one context.
        self.windows_per_epoch = max(1, (tokens.size - 1) // context - 1)
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
            starts[row] = offset + int(order[position]) * self._context
        return self._read(starts)

    def _draw_epoch(self, epoch: int) -> tuple[int, npt.NDArray[np.unsignedinteger]]:
        random = self._random(epoch)
        offset = int(random.integers(self._num_offsets(self.windows_per_epoch)))
        # Shuffled alike whatever the type; the smaller one counts with a text of gigabytes.
        kind = np.uint32 if self.windows_per_epoch < 1 << 32 else np.uint64
        return offset, random.permutation(np.arange(self.windows_per_epoch, dtype=kind))


class StretchBatches(_Epochs):
    """The endless sequence of training batches whose rows go on where they ended, by step.

    Epoch ``e`` gives each row an equal part of the tokens, from an offset in ``[0, context)`` that
    is drawn from ``(seed, e)``, and takes a stretch of ``context`` tokens of it a step. A state
    carried from step to step has then seen all that stands before in the part; the first stretches
    of an epoch have a reset at their first token. To resume one needs the step and that state.

    Attributes:
        steps_per_epoch: Stretches in a row's part.

    Raises:
        DataError: There are fewer tokens than one context for each row and the last target.
    """

    def __init__(
        self, tokens: TokenArray, *, context: int, batch_size: int, seed: int, end_id: int
    ) -> None:
        super().__init__(tokens, context=context, batch_size=batch_size, seed=seed, end_id=end_id)
        fitting = (tokens.size - 1) // (batch_size * context)
        if not fitting:
            raise DataError(
                f"The training text has {tokens.size} tokens, fewer than {batch_size} parts of one "
                f"context of {context}: give a longer text, or a smaller context or batch size."
            )
        # As above, what is left over makes room for the offset; a step less where nothing is.
        room = (tokens.size - context) // (batch_size * context)
        self.steps_per_epoch = max(1, min(fitting, room))

    def __getitem__(self, step: int) -> Batch:
        if step < 0:
            raise IndexError("steps are counted from 0")
        epoch, position = divmod(step, self.steps_per_epoch)
        windows = self.steps_per_epoch * self._batch_size
        offset = int(self._random(epoch).integers(self._num_offsets(windows)))
        rows = np.arange(self._batch_size, dtype=np.int64)
        batch = self._read(offset + (rows * self.steps_per_epoch + position) * self._context)
        if position:
            return batch
        reset = torch.zeros(batch.inputs.shape, dtype=torch.bool)
        reset[:, 0] = True
        return batch._replace(reset=reset if batch.reset is None else reset | batch.reset)


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


def sequential_stretches(tokens: Tokens, *, context: int, end_id: int) -> Iterator[Batch]:
    """All tokens in order, batch 1, to be read with the state carried from each to the next.

    Every token but the first is a target exactly once; the last stretch may be shorter.

    Raises:
        DataError: At the call: there are fewer than two tokens.
    """
    _check(tokens, 1, 1, "validation")
    return _stretches(tokens, context, end_id)


def _stretches(tokens: Tokens, context: int, end_id: int) -> Iterator[Batch]:
    last = tokens.size - 1
    for count, start in enumerate(range(0, last, context), start=1):
        yield _windows(tokens, np.array([start]), min(context, last - start), end_id)
        if count % _WINDOWS_HELD == 0:
            release_all(tokens)


def window_stretches(
    tokens: Tokens,
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


def _windows(tokens: Tokens, starts: npt.NDArray[np.int64], length: int, end_id: int) -> Batch:
    """Cut ``length`` tokens and the one after at each start."""
    rows = np.stack([cut_out(tokens, start, length + 1) for start in starts]).astype(np.int64)
    inputs = rows[:, :-1]
    reset = inputs == end_id
    return Batch(
        torch.from_numpy(np.ascontiguousarray(inputs)),
        torch.from_numpy(np.ascontiguousarray(rows[:, 1:])),
        torch.from_numpy(reset) if reset.any() else None,
    )


def _check(tokens: Tokens, context: int, batch_size: int, side: str) -> None:
    if context < 1 or batch_size < 1:
        raise DataError("The context and the batch size are counted from 1.")
    if tokens.size < context + 1:
        raise DataError(
            f"The {side} text has {tokens.size} tokens, fewer than one context of {context} and "
            "the token after it: give a longer text or a smaller context."
        )
