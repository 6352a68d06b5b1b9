"""RWKV-7 "Goose" (arXiv 2503.14456): the delta recurrence with a decay a channel."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from model.config import MixerOptions, ModelConfig
from model.layers.initializers import depth, orthogonal_, ramps
from model.layers.layer import Context
from model.layers.low_rank import LowRank
from model.layers.rwkv import RWKVHeads, RWKVOptions, RWKVState
from model.layers.token_shift import interpolations
from model.ops import fused
from model.ops.elementwise import STRONGEST_DECAY
from model.ops.native.instructions import Vector
from model.ops.native.program import Program


def default_rank(factor: float, d_model: int) -> int:
    """`factor sqrt(D)`, rounded to a multiple of 32, at least 32 (RWKV-LM, RWKV-v7 train_temp)."""
    return max(32, round(factor * math.sqrt(d_model) / 32) * 32)


@dataclass(frozen=True)
class RWKV7Options(RWKVOptions):
    """Ranks left at None follow the width."""

    decay_rank: int | None = None
    iclr_rank: int | None = None
    value_rank: int | None = None
    gate_rank: int | None = None
    first_value_residual: bool = False
    """Whether the first layer carries the weights of a value residual too, which it never uses, as
    official checkpoints do."""


class RWKV7(RWKVHeads):
    """The time mixer of RWKV-7 (section 4.1)."""

    Options: ClassVar[type[MixerOptions]] = RWKV7Options
    LEARNING_RATE_SCALES: ClassVar[dict[str, float]] = {"decay.bias": 2.0}

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        assert isinstance(config.options, RWKV7Options)
        width, options = config.d_model, config.options
        self.is_first = layer == 0
        self.mix = nn.Parameter(torch.zeros(6, width))
        """`[6, D]`: of receptance, decay, key, value, iclr and gate, in this order."""
        self.decay = LowRank(
            width, options.decay_rank or default_rank(2.5, width), width, activation=torch.tanh
        )
        self.iclr = LowRank(width, options.iclr_rank or default_rank(2.5, width), width)
        if not self.is_first or options.first_value_residual:
            self.value_residual = LowRank(
                width, options.value_rank or default_rank(1.7, width), width
            ).requires_grad_(not self.is_first)
        self.gate = LowRank(
            width,
            options.gate_rank or default_rank(5.0, width),
            width,
            activation=torch.sigmoid,
            bias=False,
        )
        self.removal_scale = nn.Parameter(torch.zeros(width))
        """`[D]`, k_k: the key's part in what is removed."""
        self.iclr_scale = nn.Parameter(torch.zeros(width))
        """`[D]`, k_a: how far the learning rate weakens the key."""
        self.bonus = nn.Parameter(torch.zeros(self.num_heads, self.head_dim))
        """`[H, K]`, r_k: weight of the token's own value."""

    def forward(self, x: Tensor, state: RWKVState, context: Context) -> tuple[Tensor, RWKVState]:
        """`[B, T, D]` -> `[B, T, D]`."""
        (x_receptance, x_decay, x_key, x_value, x_iclr, x_gate), last = interpolations(
            x, state.shift, self.mix, context.reset
        )
        value = self.value(x_value)
        residual = None
        if self.is_first:
            context.v_first = value
        else:
            assert context.v_first is not None
            residual = fused.ValueResidual(context.v_first, *self.value_residual.apart(x_value))
        decay, decay_bias = self.decay.apart(x_decay)
        iclr, iclr_bias = self.iclr.apart(x_iclr)
        written = fused.rwkv7_inputs(
            self.key(x_key),
            value,
            decay,
            iclr,
            decay_bias=decay_bias,
            iclr_bias=iclr_bias,
            removal_scale=self.removal_scale,
            iclr_scale=self.iclr_scale,
            residual=residual,
            num_heads=self.num_heads,
        )
        log_decay, key, a, b, value = map(self.heads, written)
        receptance = self.heads(self.receptance(x_receptance))
        o, matrix = context.run(
            "delta",
            receptance,
            key,
            value,
            a=a,
            b=b,
            log_decay=log_decay,
            initial_state=state.matrix,
        )
        own = fused.OwnValue(receptance, key, value, self.bonus)
        y = self.head_norm.gated(o, self.gate(x_gate), own=own)
        return self.output(y), RWKVState(last, matrix)

    def describe_step(
        self, program: Program, x: Vector, state: RWKVState, residual: Vector
    ) -> None:
        """`forward` for one token, in three phases."""
        x_receptance, x_decay, x_key, x_value, x_iclr, x_gate = program.interpolate(
            x, state.shift, self.mix
        )
        receptance = program.multiply(self.receptance.weight, x_receptance)
        key = program.multiply(self.key.weight, x_key)
        value = program.multiply(self.value.weight, x_value)
        branches = [(self.decay, x_decay), (self.iclr, x_iclr), (self.gate, x_gate)]
        if not self.is_first:
            branches.append((self.value_residual, x_value))
        hidden = [low_rank.describe_down(program, x) for low_rank, x in branches]
        program.barrier()

        program.keep(x, state.shift)
        by_heads = self.by_heads()
        decay, iclr, gate, *rest = (
            low_rank.describe_up(program, h, by_heads)
            for (low_rank, _), h in zip(branches, hidden, strict=True)
        )
        if by_heads is None:
            program.barrier()
        y = program.vector(residual.size)
        program.rwkv7(
            [receptance, key, value, program.v_first, decay, iclr, (rest or [value])[0], gate, y],
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            slot=state.matrix,
            parameters=[
                self.removal_scale,
                self.iclr_scale,
                self.bonus,
                self.head_norm.weight,
                self.head_norm.bias,
            ],
            eps=self.head_norm.eps,
            is_first=self.is_first,
            strongest_decay=STRONGEST_DECAY,
        )
        program.barrier()
        program.multiply(self.output.weight, y, out=residual, add=True)

    def initialize(self, layer: int, num_layers: int) -> None:
        """RWKV-LM, RWKV-v7/train_temp/src/model.py, `RWKV_Tmix_x070.__init__`."""
        width = self.output.in_features
        p, q = depth(layer, num_layers)
        ratio, slope = ramps(width)
        linear = slope - 0.5
        within = (torch.arange(width) % self.head_dim) / max(self.head_dim - 1, 1) * 2 - 1
        zigzag = within * within.abs()
        for row, power in enumerate((0.2, 0.9, 0.7, 0.7, 0.9, 0.2)):  # r, w, k, v, a, g
            self.mix[row] = 1.0 - ratio ** (power * q)

        low_ranks = [self.decay, self.iclr, self.gate]
        if hasattr(self, "value_residual"):
            low_ranks.append(self.value_residual)
            self.value_residual.set_bias(0.73 - 0.4 * linear)
        for low_rank in low_ranks:
            nn.init.zeros_(low_rank.down)
            orthogonal_(low_rank.up, 0.1)
        self.decay.set_bias(-5.5 + 6.0 * slope ** (1.0 + p**0.3) + 2.5 * zigzag)
        self.iclr.set_bias(-0.19 + 0.3 * zigzag + 0.4 * linear)
        self.removal_scale.copy_(0.71 - 0.1 * linear)
        nn.init.constant_(self.iclr_scale, 1.02)
        nn.init.constant_(self.bonus, -0.04)

        bound = 0.5 / math.sqrt(width)
        nn.init.uniform_(self.receptance.weight, -bound, bound)
        nn.init.uniform_(self.key.weight, -0.1 * bound, 0.1 * bound)
        nn.init.uniform_(self.value.weight, -bound, bound)
        nn.init.zeros_(self.output.weight)
        self.initialize_head_norm(layer, num_layers)
