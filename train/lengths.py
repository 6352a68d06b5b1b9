"""What a longer context is worth: the loss by position, and in windows of growing length.

A text is cut into spans as long as the longest window. Each span is read once for every length, cut
into windows of that length, so that the losses of all lengths are those of the same tokens, and a
difference between two of them is that of the context alone.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, stdev

import numpy as np
import torch
from torch import Tensor

from data.loader import window_stretches
from data.packing import TokenArray
from model.language_model import LanguageModel
from model.layers.rotary import document_positions
from train.evaluate import STRETCH, check_window, evaluating, token_losses, window_starts
from train.intervals import student_t

LONGEST = 32
"""Training contexts in the longest window, where nothing else is asked for."""


@dataclass(frozen=True)
class LengthLoss:
    """The loss in windows of one length, each read from a fresh state."""

    length: int
    """Tokens in a window."""
    loss: float
    """Nats per token, of all tokens of the spans."""
    last: float
    """Nats per token, of the last `context` tokens of each span, which are the last of a window
    whatever its length: all that the window holds stands before them."""
    seen: float
    """Mean number of tokens that those see, each itself included: the documents that they are in
    may be shorter than the window."""
    gain: float
    """`last` less that of the shortest windows: below 0 where the longer context helps."""
    margin: float | None
    """Half the width of the interval that holds the mean of `gain` at 95 %, by the differences
    between spans; None where there is one span only."""


@dataclass(frozen=True)
class PositionLoss:
    """The loss of the tokens that see so many tokens, the one before each target included.

    Taken from the shortest windows that are long enough, which hold the most of such tokens.
    """

    fewest: int
    most: int
    loss: float
    """Nats per token."""
    tokens: int


@dataclass(frozen=True)
class LengthStudy:
    """What was found on one text."""

    context: int
    """Tokens in the shortest windows: the training context."""
    asked: int
    """The longest windows that were asked for, in contexts; a short text may hold shorter only."""
    spans: int
    """How often the longest window fits into the text."""
    lengths: tuple[LengthLoss, ...]
    """Rising; each twice the one before."""
    positions: tuple[PositionLoss, ...]
    """Rising."""

    @property
    def tokens(self) -> int:
        """Tokens that were predicted, the same for all lengths."""
        return self.spans * self.lengths[-1].length

    def findings(self) -> list[str]:
        """In sentences: whether a longer context helps, and whether the longest does harm."""
        context, longest = self.lengths[0].length, self.lengths[-1]
        lines: list[str] = []
        if longest.length < self.asked * context:
            lines.append(
                f"The text is shorter than {self.asked} contexts of {context:,} tokens: the "
                f"longest window that fits is {longest.length // context}."
            )
        if longest.length == context:
            return lines
        if longest.margin is None:
            return [*lines, "The longest window fits once: too little to tell chance from gain."]
        best = min(self.lengths, key=lambda x: x.last if math.isfinite(x.last) else math.inf)
        assert best.margin is not None
        if best.gain + best.margin < 0:
            lines.append(
                f"A longer context helps: with {best.length:,} tokens {-best.gain:.4f} nats a "
                f"token less than with {context:,}, on the same tokens."
            )
        else:
            lines.append(f"No gain from more than {context:,} tokens of context was found.")
        if not math.isfinite(longest.last):
            lines.append(f"With {longest.length:,} tokens the loss is not a finite number.")
        elif longest.gain - longest.margin > 0:
            lines.append(
                f"With {longest.length:,} tokens the loss is {longest.gain:.4f} nats a token "
                f"higher than with {context:,}: it does not carry over to that length."
            )
        return lines


def study_lengths(
    model: LanguageModel,
    tokens: TokenArray,
    *,
    context: int,
    end_id: int,
    longest: int = LONGEST,
    stretch: int = STRETCH,
    progress: Callable[[int], None] | None = None,
) -> LengthStudy:
    """Reads a text in windows of 1, 2, 4, ... `longest` contexts, each from a fresh state.

    Memory is bounded by the longest window and does not grow with the text.

    Args:
        model: switched to evaluation mode and back.
        tokens: 1-D; what is left at the end after the last whole span is left out.
        context: tokens in the shortest windows.
        end_id: the token that ends a document; documents do not see each other.
        longest: contexts in the longest windows, a power of two; less where the text is shorter.
        stretch: tokens of a window in a forward pass; bounds the memory, and changes nothing else.
        progress: called with the number of tokens read so far, of `study_size`.

    Raises:
        DataError: there are fewer tokens than one context and its last target.
        ValueError: `longest` is no power of two.
    """
    check_window(tokens.size, context)
    factors = _factors(tokens.size, context, longest)
    spans = (tokens.size - 1) // (factors[-1] * context)
    text = tokens[: spans * factors[-1] * context + 1]
    bounds = position_bounds(context, factors[-1])
    found: list[_Reading] = []
    with evaluating(model):
        for factor in factors:
            reading = _Reading(context, factors[-1] // factor, bounds)
            for starts in window_starts(text, factor * context, model.config.vocab_size, stretch):
                _read(model, text, starts, factor * context, end_id, stretch, reading)
                if progress is not None:
                    progress(len(found) * (text.size - 1) + reading.tokens)
            found.append(reading)
    return LengthStudy(
        context,
        longest,
        spans,
        tuple(
            _length_loss(factor * context, reading, found[0])
            for factor, reading in zip(factors, found, strict=True)
        ),
        _position_losses(bounds, [factor * context for factor in factors], found),
    )


def study_size(num_tokens: int, context: int, longest: int = LONGEST) -> int:
    """Tokens that `study_lengths` reads in all, for its progress.

    Raises:
        ValueError: as there.
    """
    factors = _factors(num_tokens, context, longest)
    span = factors[-1] * context
    return len(factors) * ((num_tokens - 1) // span * span)


def position_bounds(context: int, factor: int) -> list[int]:
    """The most tokens seen in each group: the doublings of the context and its halves.

    `(16, 2)` -> 1, 2, 4, 8, 16, 32; `(12, 2)` -> 1, 2, 3, 6, 12, 24.
    """
    halves = {math.ceil(context / 2**n) for n in range(context.bit_length() + 1)}
    return sorted(halves | {context * 2**n for n in range(factor.bit_length())})


def _factors(num_tokens: int, context: int, longest: int) -> list[int]:
    """1, 2, 4, ... as far as `longest` and the text reach; 1 always."""
    if longest < 1 or longest & (longest - 1):
        raise ValueError(f"the longest window must be 1, 2, 4, ... contexts, but is {longest}")
    doublings = [2**n for n in range(longest.bit_length())]
    return [n for n in doublings if n == 1 or n * context < num_tokens]


class _Reading:
    """Sums over the windows of one length, in float64."""

    def __init__(self, context: int, windows_a_span: int, bounds: Sequence[int]) -> None:
        self.context, self.windows_a_span = context, windows_a_span
        self.bounds = torch.tensor(bounds)
        self.tokens, self.windows = 0, 0
        self.nats = 0.0
        self.last_nats: list[float] = []
        """Of each span's last tokens."""
        self.last_seen: list[float] = []
        """Mean number of tokens that these see."""
        self.position_nats = torch.zeros(len(bounds), dtype=torch.float64)
        self.position_tokens = torch.zeros(len(bounds), dtype=torch.long)

    def add(self, nats: Tensor, seen: Tensor) -> None:
        """Whole windows, `[B, T]`: the losses, and the tokens that each has before its target."""
        ends = torch.arange(self.windows, self.windows + nats.shape[0]) % self.windows_a_span
        of_span = ends == self.windows_a_span - 1
        self.last_nats += nats[of_span, -self.context :].mean(dim=1).tolist()
        self.last_seen += seen[of_span, -self.context :].double().mean(dim=1).tolist()
        group = torch.bucketize(seen.flatten(), self.bounds)
        size = len(self.bounds)
        self.position_nats += torch.bincount(group, nats.flatten(), minlength=size)
        self.position_tokens += torch.bincount(group, minlength=size)
        self.nats += nats.sum().item()
        self.tokens += nats.numel()
        self.windows += nats.shape[0]


def _read(
    model: LanguageModel,
    tokens: TokenArray,
    starts: "np.ndarray[tuple[int], np.dtype[np.int64]]",
    length: int,
    end_id: int,
    stretch: int,
    reading: _Reading,
) -> None:
    """Some windows side by side, added to what was read before."""
    batches = window_stretches(tokens, starts, length=length, stretch=stretch, end_id=end_id)
    before = torch.zeros(starts.size, dtype=torch.long)
    losses, seen = [], []
    for batch, nats in token_losses(model, batches, carry_state=True):
        position = document_positions(before, nats.shape[1], batch.reset)
        before = position[:, -1] + 1
        losses.append(nats.double())
        seen.append(position + 1)
    reading.add(torch.cat(losses, dim=1), torch.cat(seen, dim=1))


def _length_loss(length: int, reading: _Reading, shortest: _Reading) -> LengthLoss:
    gains = [a - b for a, b in zip(reading.last_nats, shortest.last_nats, strict=True)]
    spans, margin = len(gains), None
    if spans > 1:
        quantile = student_t(spans - 1)
        finite = all(math.isfinite(gain) for gain in gains)
        margin = quantile * stdev(gains) / math.sqrt(spans) if finite else math.nan
    return LengthLoss(
        length,
        reading.nats / reading.tokens,
        fmean(reading.last_nats),
        fmean(reading.last_seen),
        fmean(gains),
        margin,
    )


def _position_losses(
    bounds: Sequence[int], lengths: Sequence[int], readings: Sequence[_Reading]
) -> tuple[PositionLoss, ...]:
    losses: list[PositionLoss] = []
    for group, (below, most) in enumerate(pairwise([0, *bounds])):
        reading = readings[bisect_left(lengths, most)]
        tokens = int(reading.position_tokens[group])
        if tokens:
            nats = reading.position_nats[group].item()
            losses.append(PositionLoss(below + 1, most, nats / tokens, tokens))
    return tuple(losses)
