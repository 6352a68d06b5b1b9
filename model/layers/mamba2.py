"""Mamba-2, state-space duality (arXiv 2405.21060): additive, one decay a head from the data."""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from model.config import MixerOptions, ModelConfig
from model.layers.initializers import inverse_softplus
from model.layers.layer import Context, Layer, at_least_single
from model.layers.norm import RMSNorm
from model.layers.short_convolution import ShortConvolution
from model.ops import fused
from model.ops.native.instructions import HeadRule, Vector
from model.ops.native.program import Program


@dataclass(frozen=True)
class Mamba2Options(MixerOptions):
    """Of the state-space model (section 7)."""

    state_size: int = 128
    """N, the width of B and C: the K of the other mixers."""
    expand: int = 2
    """Width inside, as a multiple of D, where `ffn_dim` does not say; and heads: expand D / P."""
    groups: int = 1
    """Heads of a group share B and C."""
    conv_size: int = 4
    """Taps of the short convolution."""


class Mamba2State(NamedTuple):
    """The convolution's last tokens and the matrix of each head."""

    window: Tensor
    """`[B, conv_size - 1, E + 2 G N]`."""
    matrix: Tensor
    """`[B, H, N, P]`."""


class Mamba2(Layer):
    """The whole block: there is no channel mix beside it.

    `S_t = exp(dt A) S_{t-1} + B_t (dt x_t)^T`, `y_t = C_t S_t + D x_t`, and
    `o = W_o RMSNorm(y silu(z))`. In the op's names: q = C, k = B, v = dt x.
    """

    Options: ClassVar[type[MixerOptions]] = Mamba2Options

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        assert isinstance(config.options, Mamba2Options)
        options = config.options
        self.inner, self.num_heads = self.widths(config)
        self.groups, self.state_size = options.groups, options.state_size
        shared = 2 * self.groups * self.state_size
        self.input = nn.Linear(config.d_model, 2 * self.inner + shared + self.num_heads, bias=False)
        """To z, the convolved x, B and C, and dt."""
        self.convolution = ShortConvolution(self.inner + shared, options.conv_size, bias=True)
        self.step_bias = nn.Parameter(torch.zeros(self.num_heads))
        """`[H]`, dt_bias."""
        self.decay_rate = nn.Parameter(torch.zeros(self.num_heads))
        """`[H]`, A_log."""
        self.skip = nn.Parameter(torch.ones(self.num_heads))
        """`[H]`, D."""
        self.norm = RMSNorm(self.inner)
        self.output = nn.Linear(self.inner, config.d_model, bias=False)

    @classmethod
    def widths(cls, config: ModelConfig) -> tuple[int, int]:
        """The width inside, E, and the number of heads, H."""
        assert isinstance(config.options, Mamba2Options)
        heads = config.options.expand * config.num_heads
        return config.ffn_dim or heads * config.head_dim, heads

    @classmethod
    def width_step(cls, config: ModelConfig) -> int:
        """The number of heads, which all have the same width."""
        return cls.widths(config)[1]

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        """Refuses widths that do not divide."""
        assert isinstance(config.options, Mamba2Options)
        inner, heads = cls.widths(config)
        if inner % heads:
            raise ValueError(
                f"mamba2 cuts its inner width into {heads} heads, so ffn_dim must be a multiple "
                f"of that, but is {inner}"
            )
        if heads % config.options.groups:
            raise ValueError(
                f"mamba2 has {heads} heads, which do not fall into {config.options.groups} groups"
            )

    def initial_state(self, batch_size: int) -> Mamba2State:
        """No token yet: zeros, the matrix in at least float32."""
        window = self.convolution.initial_window(batch_size)
        shape = (batch_size, self.num_heads, self.state_size, self.inner // self.num_heads)
        return Mamba2State(window, window.new_zeros(shape, dtype=at_least_single(window.dtype)))

    def forward(
        self, x: Tensor, state: Mamba2State, context: Context
    ) -> tuple[Tensor, Mamba2State]:
        """`[B, T, D]` -> `[B, T, D]`."""
        shared = self.groups * self.state_size
        # One product for each part: a slice of them all would have to be copied.
        widths = [self.inner, self.inner, shared, shared, self.num_heads]
        z, *parts, steps = (F.linear(x, w) for w in torch.split(self.input.weight, widths))
        (value, b, c), window = self.convolution(parts, state.window, context.reset)
        value = rearrange(value, "b t (h p) -> b t h p", h=self.num_heads)
        b, c = (rearrange(y, "b t (g n) -> b t g n", g=self.groups) for y in (b, c))
        step = F.softplus(steps + self.step_bias)
        o, matrix = context.run(
            "additive",
            c,
            b,
            fused.scaled_heads(value, step),
            log_decay=-self.decay_rate.exp() * step,
            initial_state=state.matrix,
        )
        assert self.norm.eps is not None
        y = fused.skip_norm(o, value, z, self.skip, self.norm.weight, self.norm.eps)
        return self.output(y), Mamba2State(window, matrix)

    def describe_step(
        self, program: Program, x: Vector, state: Mamba2State, residual: Vector
    ) -> None:
        """`forward` for one token, in four phases."""
        shared = self.groups * self.state_size
        to_z, to_convolved, to_step = torch.split(
            self.input.weight, [self.inner, self.inner + 2 * shared, self.num_heads]
        )
        z = program.multiply(to_z, x, activation="silu")
        convolved = program.multiply(to_convolved, x)
        step = program.multiply(to_step, x, bias=self.step_bias, activation="softplus")
        convolved = program.convolve(
            convolved, state.window, self.convolution.taps, self.convolution.bias
        )
        program.barrier()
        value, b, c = convolved.cut(self.inner, shared, shared)
        rule = HeadRule(
            self.num_heads,
            self.groups,
            strength=step,
            log_decay=step,
            decay_scale=1.0,
            rate=-self.decay_rate.exp(),
            skip=self.skip,
            gate=z,
        )
        y = program.heads(c, b, value, state.matrix, rule)
        program.barrier()
        assert self.norm.eps is not None
        normed = program.normalize(y, self.norm.weight, None, self.norm.eps)
        program.multiply(self.output.weight, normed, out=residual, add=True)

    def initialize(self, layer: int, num_layers: int) -> None:
        """state-spaces/mamba, mamba2.py: A uniform in (1, 16), dt log-uniform in (0.001, 0.1)."""
        super().initialize(layer, num_layers)
        self.convolution.initialize()
        self.decay_rate.uniform_(1.0, 16.0).log_()
        steps = torch.empty_like(self.step_bias).uniform_(math.log(0.001), math.log(0.1)).exp_()
        self.step_bias.copy_(inverse_softplus(steps))
