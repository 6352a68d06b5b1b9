"""Gated linear attention (GLA, arXiv 2312.06635): additive, a decay a channel from the data."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from model.config import MixerOptions, ModelConfig
from model.layers.initializers import small_init_
from model.layers.layer import Context, Layer, at_least_single
from model.layers.low_rank import LowRank
from model.layers.norm import HeadRMSNorm
from model.ops.native.instructions import HeadRule, Vector
from model.ops.native.program import Program


@dataclass(frozen=True)
class GLAOptions(MixerOptions):
    """Of the gates (section 4.4)."""

    decay_rank: int = 16
    """Rank of the decay's projection."""
    temperature: float = 16.0
    """Divides the log-decay, which makes decays slower."""
    norm_eps: float = 1e-5
    """Of the norm over each head."""


class MatrixState(NamedTuple):
    """The matrix of each head."""

    matrix: Tensor
    """`[B, H, K, V]`."""


class GLA(Layer):
    """`o = W_o (silu(W_g x) * norm(q S))` with `g = logsigmoid(x W1 W2 + b) / 16`.

    Keys are half as wide as values (section 4.4): K = head_dim / 2, V = head_dim.
    """

    Options: ClassVar[type[MixerOptions]] = GLAOptions

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        assert isinstance(config.options, GLAOptions)
        width, self.num_heads = config.d_model, config.num_heads
        self.key_dim, self.value_dim = config.head_dim // 2, config.head_dim
        self.temperature = config.options.temperature
        keys = self.num_heads * self.key_dim
        self.query = nn.Linear(width, keys, bias=False)
        self.key = nn.Linear(width, keys, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, width, bias=True)
        self.decay = LowRank(width, config.options.decay_rank, keys)
        self.output = nn.Linear(width, width, bias=False)
        self.head_norm = HeadRMSNorm(self.value_dim, config.options.norm_eps)

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        """Refuses heads that cannot be halved."""
        if config.head_dim % 2:
            raise ValueError(
                f"gla halves head_dim for its keys: it must be even, not {config.head_dim}"
            )

    def initial_state(self, batch_size: int) -> MatrixState:
        """Nothing written yet: zeros, in at least float32."""
        weight = self.key.weight
        shape = (batch_size, self.num_heads, self.key_dim, self.value_dim)
        return MatrixState(weight.new_zeros(shape, dtype=at_least_single(weight.dtype)))

    def forward(
        self, x: Tensor, state: MatrixState, context: Context
    ) -> tuple[Tensor, MatrixState]:
        """`[B, T, D]` -> `[B, T, D]`."""
        q, k, v, log_decay = (
            rearrange(y, "b t (h k) -> b t h k", h=self.num_heads)
            for y in (
                self.query(x),
                self.key(x),
                self.value(x),
                F.logsigmoid(self.decay(x)) / self.temperature,
            )
        )
        o, matrix = context.run(
            "additive",
            q,
            k,
            v,
            log_decay=log_decay,
            scale=self.key_dim**-0.5,
            initial_state=state.matrix,
        )
        y = self.output(self.head_norm(o, self.gate(x)))
        return y, MatrixState(matrix)

    def describe_step(
        self, program: Program, x: Vector, state: MatrixState, residual: Vector
    ) -> None:
        """`forward` for one token, in three phases."""
        q = program.multiply(self.query.weight, x)
        k = program.multiply(self.key.weight, x)
        v = program.multiply(self.value.weight, x)
        gate = program.multiply(self.gate.weight, x, bias=self.gate.bias, activation="silu")
        hidden = self.decay.describe_down(program, x)
        program.barrier()
        rule = HeadRule(
            self.num_heads,
            self.num_heads,
            scale=self.key_dim**-0.5,
            log_decay=self.decay.describe_up(program, hidden, activation="log_sigmoid"),
            is_by_channel=True,
            decay_scale=1 / self.temperature,
            norm=self.head_norm.weight,
            norm_eps=self.head_norm.eps,
            gate=gate,
        )
        program.barrier()
        y = program.heads(q, k, v, state.matrix, rule)
        program.barrier()
        program.multiply(self.output.weight, y, out=residual, add=True)

    def initialize(self, layer: int, num_layers: int) -> None:
        """The low-rank matrices as the other matrices."""
        super().initialize(layer, num_layers)
        for matrix in (self.decay.down, self.decay.up):
            small_init_(matrix.T)
        nn.init.zeros_(self.gate.bias)
