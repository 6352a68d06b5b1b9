"""Rotary positions (RoFormer, arXiv 2104.09864), counted from the start of a document."""

import torch
from torch import Tensor


def rotate(x: Tensor, position: Tensor, base: float) -> Tensor:
    """Turns each pair of channels `(i, i + K/2)` by an angle that grows with the position.

    Args:
        x: `[B, T, H, K]`, K even.
        position: `[B, T]`, integers; angles are formed in float64, so that far ones stay exact.
        base: the slowest of the frequencies `base^(-2i/K)` comes near 1 / base.

    Returns:
        `[B, T, H, K]` in the dtype of x.
    """
    half = x.shape[-1] // 2
    frequency = base ** -(torch.arange(half, dtype=torch.float64, device=x.device) / half)
    angle = position[..., None, None].double() * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def document_positions(before: Tensor, time: int, reset: Tensor | None) -> Tensor:
    """How many tokens of its own document stand before each token.

    Args:
        before: `[B]` int64, tokens of the current document that were seen before this sequence.
        time: T.
        reset: `[B, T]` bool or None; True where a token starts a document.

    Returns:
        `[B, T]` int64.
    """
    place = torch.arange(time, device=before.device)
    position = before[:, None] + place
    if reset is None:
        return position
    started = torch.where(reset, place, -1).cummax(dim=1).values
    return torch.where(started < 0, position, place - started)
