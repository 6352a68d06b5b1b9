"""Token shift: every token next to the one before it (RWKV, arXiv 2305.13048, section 3.1)."""

from torch import Tensor

from model.ops import fused


def interpolations(
    x: Tensor, last: Tensor, mix: Tensor, reset: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    """Each token, moved towards the one before it: `x + (x_prev - x) mix_m`.

    Args:
        x: `[B, T, D]`.
        last: `[B, D]`, the token before the first: the carried state.
        mix: `[M, D]`, the part of the token before.
        reset: `[B, T]` bool or None; nothing stands before a token that starts a document.

    Returns:
        M tensors `[B, T, D]`, and the last token `[B, D]` as the next state.
    """
    return fused.interpolations(x, last, mix, reset), x[:, -1]
