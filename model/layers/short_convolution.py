"""A short causal convolution over time, a channel by itself (Mamba, arXiv 2312.00752, figure 3)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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

    def forward(self, x: Tensor, window: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """Convolves.

        Args:
            x: `[B, T, D]`.
            window: `[B, size - 1, D]`, the tokens before, oldest first.
            reset: `[B, T]` bool or None; a token sees none before the start of its document.

        Returns:
            `[B, T, D]`, and the window after the last token.
        """
        time, size = x.shape[1], self.taps.shape[0]
        padded = torch.cat([window.to(x.dtype), x], dim=1)
        document = None
        if reset is not None:  # counted from the first token; the window belongs to number 0
            document = F.pad(reset.long().cumsum(dim=1), (size - 1, 0))
        y = x * self.taps[0]
        for lag in range(1, size):
            begin = size - 1 - lag
            before = padded[:, begin : begin + time]
            if document is not None:
                other = document[:, begin : begin + time] != document[:, size - 1 :]
                before = before.masked_fill(other[..., None], 0.0)
            y = torch.addcmul(y, before, self.taps[lag])
        if self.bias is not None:
            y = y + self.bias
        kept = padded[:, time:]
        if document is not None:
            kept = kept.masked_fill((document[:, time:] != document[:, -1:])[..., None], 0.0)
        return F.silu(y), kept

    def initialize(self) -> None:
        """As PyTorch's Conv1d with one input channel: uniform within `1 / sqrt(size)`."""
        bound = self.taps.shape[0] ** -0.5
        nn.init.uniform_(self.taps, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
