"""Token shift: every token next to the one before it (RWKV, arXiv 2305.13048, section 3.1)."""

import torch
from torch import Tensor


def token_shift(x: Tensor, last: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """The token before each token.

    Args:
        x: `[B, T, D]`.
        last: `[B, D]`, the token before the first: the carried state.
        reset: `[B, T]` bool or None; nothing stands before a token that starts a document.

    Returns:
        `x_prev [B, T, D]`, and the last token `[B, D]` as the next state.
    """
    previous = torch.cat([last[:, None].to(x.dtype), x[:, :-1]], dim=1)
    if reset is not None:
        previous = previous.masked_fill(reset[..., None], 0.0)
    return previous, x[:, -1]
