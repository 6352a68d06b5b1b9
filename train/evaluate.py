"""How well a model predicts a text: nats per token, perplexity, bits per byte."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from data.errors import DataError
from data.joined import Tokens, release_all
from data.loader import Batch, window_stretches
from model.language_model import LanguageModel

STRETCH = 256
"""Tokens of a text in a forward pass where nothing else is asked for."""

_CACHED_TOKENS = 8192
_LOGITS = 1 << 24


@dataclass(frozen=True)
class Evaluation:
    """A loss and what it was measured on."""

    nats: float
    """Sum of `-ln p` over all tokens."""
    tokens: int
    bytes: int
    """UTF-8 bytes of the predicted tokens; an end token has none."""

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """`exp(loss)`; infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, unlike the loss per token."""
        return bits_per_byte(self.nats, self.bytes)


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """A sum of `-ln p` over some tokens, by the UTF-8 bytes that they stand for."""
    return nats / math.log(2) / max(num_bytes, 1)


def evaluate(
    model: LanguageModel,
    batches: Iterable[Batch],
    token_bytes: npt.NDArray[np.int32],
    *,
    carry_state: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """The loss of a model over batches of text.

    Args:
        model: switched to evaluation mode and back.
        batches: windows of tokens, and what follows each of them.
        token_bytes: `[vocab_size]`, the UTF-8 bytes that each token stands for.
        carry_state: go on from one batch to the next, as through one long text.
        progress: called with the number of tokens read so far.
    """
    sizes = torch.from_numpy(token_bytes)
    nats, tokens, num_bytes = 0.0, 0, 0
    with evaluating(model):
        for batch, losses in token_losses(model, batches, carry_state=carry_state):
            nats += losses.sum(dtype=torch.float64).item()
            tokens += losses.numel()
            num_bytes += int(sizes[batch.targets].sum())
            if progress is not None:
                progress(tokens)
    return Evaluation(nats, tokens, num_bytes)


def evaluate_windows(
    model: LanguageModel,
    tokens: Tokens,
    token_bytes: npt.NDArray[np.int32],
    *,
    context: int,
    end_id: int,
    stretch: int = STRETCH,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """The loss in windows one after the other, each read from a fresh state, as papers report it.

    Args:
        model: switched to evaluation mode and back.
        tokens: 1-D; less than one window at the end is left out.
        token_bytes: `[vocab_size]`, the UTF-8 bytes that each token stands for.
        context: tokens in a window.
        end_id: the token that ends a document.
        stretch: tokens of a window in a forward pass; bounds the memory, and changes nothing else.
        progress: called with the number of tokens read so far.

    Raises:
        DataError: there are fewer tokens than one window and its last target.
    """
    parts: list[Evaluation] = []
    for starts in window_starts(tokens, context, model.config.vocab_size, stretch):
        batches = window_stretches(tokens, starts, length=context, stretch=stretch, end_id=end_id)
        parts.append(evaluate(model, batches, token_bytes, carry_state=True))
        release_all(tokens)
        if progress is not None:
            progress(sum(part.tokens for part in parts))
    return Evaluation(
        math.fsum(part.nats for part in parts),
        sum(part.tokens for part in parts),
        sum(part.bytes for part in parts),
    )


def window_starts(
    tokens: Tokens, length: int, vocab_size: int, stretch: int
) -> Iterator[npt.NDArray[np.int64]]:
    """Where windows without overlap begin, in groups to be read side by side.

    A group is as large as the memory of a pass allows: so many tokens in a KV cache at most, and so
    many logits. A single window may need more.

    Raises:
        DataError: at the call: there are fewer tokens than one window and its last target.
    """
    check_window(tokens.size, length)
    count = (tokens.size - 1) // length
    at_once = min(_CACHED_TOKENS // length, _LOGITS // (vocab_size * min(stretch, length)))
    starts = np.arange(count, dtype=np.int64) * length
    rows = max(1, at_once)
    return (starts[first : first + rows] for first in range(0, count, rows))


def check_window(num_tokens: int, length: int) -> None:
    """Refuses a text that does not hold one window.

    Raises:
        DataError: there are fewer tokens than one window and its last target.
    """
    if num_tokens <= length:
        raise DataError(
            f"The text has {num_tokens:,} tokens, fewer than one window of {length:,} and the "
            "token after it: give a longer text or shorter windows."
        )


@contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """Evaluation mode, and back to what it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def token_losses(
    model: LanguageModel, batches: Iterable[Batch], *, carry_state: bool
) -> Iterator[tuple[Batch, Tensor]]:
    """Each batch with `-ln p` of each of its targets, float32 `[B, T]` on the CPU.

    Args:
        model: in evaluation mode.
        batches: on the CPU.
        carry_state: go on from one batch to the next; a fresh state for each if not.
    """
    device, state = next(model.parameters()).device, None
    for batch in batches:
        inputs, targets = batch.inputs.to(device), batch.targets.to(device)
        reset = None if batch.reset is None else batch.reset.to(device)
        logits, state = model(inputs, state if carry_state else None, "chunked", reset)
        losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        yield batch, losses.view(targets.shape).cpu()
