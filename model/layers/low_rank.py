"""The low-rank branches that make RWKV-6 and 7 depend on their data."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.ops.native.instructions import Vector
from model.ops.native.packing import ROWS
from model.ops.native.program import Program

_ACTIVATIONS: dict[object, str] = {None: "none", torch.tanh: "tanh", torch.sigmoid: "sigmoid"}
"""What the native step calls them."""


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

    def describe_down(self, program: Program, x: Vector) -> Vector:
        """The native step of `activation(x down)`."""
        return program.multiply(
            self.down.T,
            x,
            activation=_ACTIVATIONS[self.activation],
            weights=self.step_weights(program.weights),
        )

    def describe_up(
        self,
        program: Program,
        hidden: Vector,
        grain: int | None = None,
        activation: str = "none",
    ) -> Vector:
        """The native step of `activation(bias + hidden up)`; hidden must be whole."""
        return program.multiply(
            self.up.T,
            hidden,
            bias=self.bias,
            activation=activation,
            grain=grain or ROWS,
            weights=self.step_weights(program.weights),
        )

    @staticmethod
    def step_weights(weights: str) -> str:
        """What it is kept in: small and sensitive, so that four bits are not for it."""
        return "int8" if weights == "int4" else weights
