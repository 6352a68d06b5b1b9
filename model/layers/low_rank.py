"""The low-rank branches that make RWKV-6 and 7 depend on their data."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class LowRank(nn.Module):
    """`bias + activation(x down) up`, with `down [in, rank]` and `up [rank, out]`.

    Stored `[in, out]` as in the official checkpoints, and not called `weight`: not decayed.
    """

    def __init__(
        self,
        d_in: int,
        rank: int,
        d_out: int,
        *,
        activation: Callable[[Tensor], Tensor] | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.zeros(d_in, rank))
        self.up = nn.Parameter(torch.zeros(rank, d_out))
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        y = self._product(x)
        return y if self.bias is None else y + self.bias

    def apart(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`activation(x down) up [..., out]` and the bias `[out]`, for those who add it later."""
        assert self.bias is not None
        return self._product(x), self.bias

    def _product(self, x: Tensor) -> Tensor:
        hidden = x @ self.down
        if self.activation is not None:
            hidden = self.activation(hidden)
        return hidden @ self.up

    def set_bias(self, values: Tensor) -> None:
        """Starts the bias `[out]` at these values."""
        assert self.bias is not None
        self.bias.copy_(values)
