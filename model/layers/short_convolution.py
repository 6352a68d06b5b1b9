"""A short causal convolution over time, a channel by itself (Mamba, arXiv 2312.00752, figure 3)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.ops import fused


class ShortConvolution(nn.Module):
    """`y_t = silu(bias + sum_j weight_j x_{t-j})` with `size` taps; j = 0 is the token itself.

    Args:
        channels: D.
        size: taps, at least 1.
        bias: whether there is one.
    """

    def __init__(self, channels: int, size: int, *, bias: bool) -> None:
        super().__init__()
        self.taps = nn.Parameter(torch.zeros(size, channels))
        """`[size, D]`, the token's own first; not called `weight`: not decayed."""
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def initial_window(self, batch_size: int) -> Tensor:
        """`[B, size - 1, D]`: no tokens yet."""
        size, channels = self.taps.shape
        return self.taps.new_zeros(batch_size, size - 1, channels)

    def forward(
        self, parts: Sequence[Tensor], window: Tensor, reset: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        """Convolves.

        Args:
            parts: tensors `[B, T, .]`, one for each stretch of the D channels, in their order.
            window: `[B, size - 1, D]`, the tokens before, oldest first.
            reset: `[B, T]` bool or None; a token sees none before the start of its document.

        Returns:
            Tensors as the parts, and the window after the last token.
        """
        widths = [part.shape[-1] for part in parts]
        windows, taps = (torch.split(x, widths, dim=-1) for x in (window, self.taps))
        biases = [None] * len(parts) if self.bias is None else torch.split(self.bias, widths)
        convolved = [
            fused.short_convolution(*of_part, reset)
            for of_part in zip(parts, windows, taps, biases, strict=True)
        ]
        return convolved, self._next_window(parts, window, reset)

    @staticmethod
    def _next_window(parts: Sequence[Tensor], window: Tensor, reset: Tensor | None) -> Tensor:
        """The last tokens, oldest first; zeros for those of another document than the last's."""
        size, time = window.shape[1], parts[0].shape[1]
        last = torch.cat([part[:, max(0, time - size) :] for part in parts], dim=-1)
        kept = torch.cat([window.to(last.dtype), last], dim=1)[:, last.shape[1] :]
        if reset is None:
            return kept
        starts = F.pad(reset, (size, 0))[:, time:]
        started_later = starts.flip(1).cumsum(1).flip(1) - starts.long()
        return kept.masked_fill(started_later.bool()[..., None], 0.0)

    def initialize(self) -> None:
        """As PyTorch's Conv1d with one input channel: uniform within `1 / sqrt(size)`."""
        bound = self.taps.shape[0] ** -0.5
        nn.init.uniform_(self.taps, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
