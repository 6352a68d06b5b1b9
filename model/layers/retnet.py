"""RetNet (arXiv 2307.08621): additive, with one fixed decay a head and rotary positions."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from model.config import MixerOptions, ModelConfig
from model.layers.layer import Context, Layer, at_least_single
from model.layers.norm import HeadRMSNorm
from model.layers.rotary import document_positions, rotate
from model.ops.native.instructions import HeadRule, Vector
from model.ops.native.program import Program


@dataclass(frozen=True)
class RetNetOptions(MixerOptions):
    """Of the retention."""

    value_factor: int = 2
    """V = value_factor K (section 3.1: twice as wide as the keys)."""
    rotary_base: float = 10_000.0
    """Base of the rotary frequencies (RoFormer, arXiv 2104.09864)."""
    norm_eps: float = 1e-5
    """Of the norm over each head."""


class RetNetState(NamedTuple):
    """The matrix of each head, and how many tokens of its document each row has seen."""

    matrix: Tensor
    """`[B, H, K, V]`."""
    position: Tensor
    """`[B]` int64."""


class RetNet(Layer):
    """`o = W_o (silu(W_g x) * norm(retention(x)))`, decay `1 - 2^(-5-h)` (equations 6 to 8)."""

    Options: ClassVar[type[MixerOptions]] = RetNetOptions

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        assert isinstance(config.options, RetNetOptions)
        width, self.num_heads, self.head_dim = config.d_model, config.num_heads, config.head_dim
        self.value_dim = config.options.value_factor * config.head_dim
        self.rotary_base = config.options.rotary_base
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, self.num_heads * self.value_dim, bias=False)
        self.gate = nn.Linear(width, self.num_heads * self.value_dim, bias=False)
        self.output = nn.Linear(self.num_heads * self.value_dim, width, bias=False)
        self.head_norm = HeadRMSNorm(self.value_dim, config.options.norm_eps)

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        """Refuses heads that cannot be turned in pairs."""
        if config.head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, not {config.head_dim}")

    def initial_state(self, batch_size: int) -> RetNetState:
        """No token yet: zeros, the matrix in at least float32."""
        weight = self.key.weight
        shape = (batch_size, self.num_heads, self.head_dim, self.value_dim)
        matrix = weight.new_zeros(shape, dtype=at_least_single(weight.dtype))
        return RetNetState(matrix, torch.zeros(batch_size, dtype=torch.long, device=weight.device))

    def forward(
        self, x: Tensor, state: RetNetState, context: Context
    ) -> tuple[Tensor, RetNetState]:
        """`[B, T, D]` -> `[B, T, D]`."""
        q, k, v = (
            rearrange(project(x), "b t (h k) -> b t h k", h=self.num_heads)
            for project in (self.query, self.key, self.value)
        )
        position = document_positions(state.position, x.shape[1], context.reset)
        q, k = rotate(q, position, self.rotary_base), rotate(k, position, self.rotary_base)
        o, matrix = context.run(
            "additive",
            q,
            k,
            v,
            log_decay=self.log_decay(state.matrix).expand(k.shape[:3]),
            scale=self.head_dim**-0.5,
            initial_state=state.matrix,
        )
        y = self.output(self.head_norm(o, self.gate(x)))
        return y, RetNetState(matrix, position[:, -1] + 1)

    def describe_step(
        self, program: Program, x: Vector, state: RetNetState, residual: Vector
    ) -> None:
        """`forward` for one token, in two phases."""
        q = program.multiply(self.query.weight, x)
        k = program.multiply(self.key.weight, x)
        v = program.multiply(self.value.weight, x)
        gate = program.multiply(self.gate.weight, x, activation="silu")
        program.barrier()
        for vector in (q, k):
            program.rotate(vector, state.position, num_heads=self.num_heads, base=self.rotary_base)
        rule = HeadRule(
            self.num_heads,
            self.num_heads,
            scale=self.head_dim**-0.5,
            decay_scale=1.0,
            rate=self.log_decay(self.head_norm.weight),
            norm=self.head_norm.weight,
            norm_eps=self.head_norm.eps,
            gate=gate,
        )
        y = program.heads(q, k, v, state.matrix, rule)
        program.barrier()
        program.count(state.position)
        program.multiply(self.output.weight, y, out=residual, add=True)

    def log_decay(self, like: Tensor) -> Tensor:
        """`[H]`: `log(1 - 2^(-5-h))` (equation 8), in the state's dtype."""
        heads = torch.arange(self.num_heads, dtype=torch.float64, device=like.device)
        return torch.log1p(-(2.0 ** (-5.0 - heads))).to(like.dtype)
