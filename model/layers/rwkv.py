"""What the time mixers of RWKV-5, 6 and 7 share: heads with a matrix each, and their norm."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from model.config import MixerOptions, ModelConfig
from model.layers.layer import Layer, at_least_single
from model.layers.norm import HeadNorm
from model.ops.native.instructions import Vector
from model.ops.native.packing import ROWS
from model.ops.native.program import Program


class RWKVState(NamedTuple):
    """The last token and the matrix of each head."""

    shift: Tensor
    """`[B, D]`."""
    matrix: Tensor
    """`[B, H, K, V]`."""


@dataclass(frozen=True)
class RWKVOptions(MixerOptions):
    """What RWKV-5, 6 and 7 have in common."""

    group_norm_eps: float = 64e-5
    """In no checkpoint: the official code's constant."""


class RWKVHeads(Layer):
    """The projections, the norm over each head and the state of RWKV-5, 6 and 7."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        assert isinstance(config.options, RWKVOptions)
        width = config.d_model
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.receptance = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.head_norm = HeadNorm(self.num_heads, self.head_dim, config.options.group_norm_eps)

    def initial_state(self, batch_size: int) -> RWKVState:
        """No token yet: zeros, the matrix in at least float32."""
        shift = self.output.weight.new_zeros(batch_size, self.num_heads * self.head_dim)
        shape = (batch_size, self.num_heads, self.head_dim, self.head_dim)
        return RWKVState(shift, shift.new_zeros(shape, dtype=at_least_single(shift.dtype)))

    def heads(self, x: Tensor) -> Tensor:
        """`[B, T, D]` -> `[B, T, H, K]`."""
        return rearrange(x, "b t (h k) -> b t h k", h=self.num_heads)

    def by_heads(self) -> int | None:
        """Rows of a matrix that go to one thread as a head does; None where heads cut tiles."""
        return self.head_dim if self.head_dim % ROWS == 0 else None

    def describe_heads(
        self,
        program: Program,
        vectors: Sequence[Vector],
        state: RWKVState,
        decay: Tensor | Vector,
        bonus: Tensor,
    ) -> Vector:
        """The native step of RWKV-5 and 6 from receptance, key, value and gate to the output."""
        y = program.vector(self.num_heads * self.head_dim)
        program.rwkv5(
            [*vectors, y],
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            slot=state.matrix,
            decay=decay,
            parameters=[bonus, self.head_norm.weight, self.head_norm.bias],
            eps=self.head_norm.eps,
        )
        return y

    def initialize_head_norm(self, layer: int, num_layers: int) -> None:
        """The official `ln_x`: weaker in the first layers."""
        nn.init.constant_(self.head_norm.weight, ((1 + layer) / num_layers) ** 0.7)


def zigzag(width: int, amplitude: float) -> Tensor:
    """`[D]`: +1, -1, 0 and so on, times the amplitude, which makes neighbours differ."""
    return ((torch.arange(width) + 1) % 3 - 1) * amplitude


def decay_ramp(slope: Tensor, low: float, span: float, p: float) -> Tensor:
    """`low + span slope^(0.7 + 1.3 p)`: from slow to fast decays, more of them fast higher up."""
    return low + span * slope ** (0.7 + 1.3 * p)
