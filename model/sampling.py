"""How the next token is drawn from a model's logits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the logits; applied in the order of the fields.

    Raises:
        ValueError: for a value out of range, or one that has no effect.
    """

    repetition_penalty: float = 1.0
    """Makes tokens that were there before less likely (CTRL, arXiv 1909.05858); 1 changes nothing.
    As is usual, positive logits are divided by it and negative ones multiplied."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int | None = None
    """Keeps the k likeliest tokens (arXiv 1805.04833)."""
    top_p: float | None = None
    """Keeps the fewest likeliest tokens that hold this probability (arXiv 1904.09751)."""
    min_p: float | None = None
    """Keeps tokens with this fraction of the likeliest one's probability (arXiv 2407.01082)."""

    def __post_init__(self) -> None:
        """Refuses what cannot be drawn with."""
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(
                f"repetition_penalty must be above 0, but is {self.repetition_penalty}"
            )
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be at least 0, but is {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, but is {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, but is {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be between 0 and 1, but is {self.min_p}")
        for name in ("top_k", "top_p", "min_p"):
            if self.temperature == 0 and getattr(self, name) is not None:
                raise ValueError(f"{name} has no effect at temperature 0: leave one of them out")


def sample(
    logits: Tensor,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    seen: Tensor | None = None,
) -> Tensor:
    """Draws one token a row. A row takes one number of its own generator and sees no other row.

    Works in float64 on the CPU, so that a seed gives the same text everywhere.

    Args:
        logits: `[B, V]`; not changed.
        sampling: how to draw.
        generators: B generators on the CPU.
        seen: `[B, V]` bool, the tokens that the repetition penalty is for.

    Returns:
        `[B]` int64 on the CPU.

    Raises:
        ValueError: if the logits are not numbers, or `seen` is missing.
    """
    scores = logits.detach().cpu().double()
    if not scores.amax(dim=-1).isfinite().all():
        raise ValueError("the model's logits are not finite: its weights are damaged or diverged")
    if sampling.repetition_penalty != 1:
        if seen is None:
            raise ValueError("a repetition penalty needs `seen`, the tokens that were there before")
        factor = sampling.repetition_penalty
        scores = torch.where(
            seen.cpu(), torch.where(scores > 0, scores / factor, scores * factor), scores
        )
    if sampling.temperature == 0:
        return scores.argmax(dim=-1)
    cumulative = _probabilities(scores, sampling).cumsum(dim=-1)
    numbers = [torch.rand(1, generator=row, dtype=torch.float64) for row in generators]
    return torch.searchsorted(
        cumulative, torch.stack(numbers) * cumulative[:, -1:], right=True
    ).squeeze(-1)


def _probabilities(scores: Tensor, sampling: Sampling) -> Tensor:
    """`[B, V]` logits -> what each token is drawn in proportion to; 0 for those left out."""
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None:
        best = scores.topk(min(sampling.top_k, scores.shape[-1]))
        scores = torch.full_like(scores, -math.inf).scatter(-1, best.indices, best.values)
    kept = scores.softmax(dim=-1)
    if sampling.top_p is not None:
        ordered, order = kept.sort(dim=-1, descending=True, stable=True)
        likelier = ordered.cumsum(dim=-1) - ordered
        left_out = torch.zeros_like(kept, dtype=torch.bool)
        kept = kept.masked_fill(left_out.scatter(-1, order, likelier >= sampling.top_p), 0)
    if sampling.min_p is not None:
        kept = kept.masked_fill(kept < sampling.min_p * kept.amax(dim=-1, keepdim=True), 0)
    return kept
