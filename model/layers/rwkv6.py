"""RWKV-6 "Finch" (arXiv 2404.05892): additive, with a data-dependent decay and a bonus."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from model.config import MixerOptions, ModelConfig
from model.layers.initializers import depth, orthogonal_, ramps
from model.layers.layer import Context
from model.layers.low_rank import LowRank
from model.layers.rwkv import RWKVHeads, RWKVOptions, RWKVState, decay_ramp, zigzag
from model.layers.token_shift import interpolations
from model.ops import fused
from model.ops.native.instructions import Vector
from model.ops.native.program import Program


@dataclass(frozen=True)
class RWKV6Options(RWKVOptions):
    """The ranks of what depends on the data."""

    shift_rank: int = 32
    """Of the token shift."""
    decay_rank: int = 64
    """Of the decay."""


class RWKV6(RWKVHeads):
    """The time mixer of RWKV-6 (section 4.2)."""

    Options: ClassVar[type[MixerOptions]] = RWKV6Options
    LEARNING_RATE_SCALES: ClassVar[dict[str, float]] = {"decay.bias": 2.0}

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        assert isinstance(config.options, RWKV6Options)
        width, options = config.d_model, config.options
        self.mix_base = nn.Parameter(torch.zeros(width))
        self.mix = nn.Parameter(torch.zeros(5, width))
        """`[5, D]`: of decay, key, value, receptance and gate, in this order."""
        self.mix_down = nn.Parameter(torch.zeros(width, 5 * options.shift_rank))
        self.mix_up = nn.Parameter(torch.zeros(5, options.shift_rank, width))
        self.decay = LowRank(width, options.decay_rank, width, activation=torch.tanh)
        self.bonus = nn.Parameter(torch.zeros(self.num_heads, self.head_dim))
        self.gate = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, state: RWKVState, context: Context) -> tuple[Tensor, RWKVState]:
        """`[B, T, D]` -> `[B, T, D]`."""
        (mixed,), last = interpolations(x, state.shift, self.mix_base[None], context.reset)
        low = torch.tanh(mixed @ self.mix_down).chunk(len(self.mix), dim=-1)
        offsets = [part @ up for part, up in zip(low, self.mix_up, strict=True)]
        x_decay, x_key, x_value, x_receptance, x_gate = fused.varied_interpolations(
            x, state.shift, self.mix, offsets, context.reset
        )

        o, matrix = context.run(
            "additive",
            self.heads(self.receptance(x_receptance)),
            self.heads(self.key(x_key)),
            self.heads(self.value(x_value)),
            log_decay=self.heads(-self.decay(x_decay).exp()),
            bonus=self.bonus,
            initial_state=state.matrix,
        )
        y = self.output(self.head_norm.gated(o, self.gate(x_gate), silu=True))
        return y, RWKVState(last, matrix)

    def describe_step(
        self, program: Program, x: Vector, state: RWKVState, residual: Vector
    ) -> None:
        """`forward` for one token, in five phases. What mixes the shift stays in float32."""
        (mixed,) = program.interpolate(x, state.shift, self.mix_base[None])
        low = program.multiply(self.mix_down.T, mixed, activation="tanh", weights="fp32")
        program.barrier()
        offsets = program.vectors(len(self.mix), x.size)
        for hidden, up, mix, out in zip(
            low.split(len(self.mix)), self.mix_up, self.mix, offsets, strict=True
        ):
            program.multiply(up.T, hidden, bias=mix, out=out, weights="fp32")
        program.barrier()
        x_decay, x_key, x_value, x_receptance, x_gate = program.interpolate(x, state.shift, offsets)
        receptance = program.multiply(self.receptance.weight, x_receptance)
        key = program.multiply(self.key.weight, x_key)
        value = program.multiply(self.value.weight, x_value)
        gate = program.multiply(self.gate.weight, x_gate, activation="silu")
        hidden = self.decay.describe_down(program, x_decay)
        program.barrier()
        program.keep(x, state.shift)
        decay = self.decay.describe_up(program, hidden, self.by_heads())
        if self.by_heads() is None:
            program.barrier()
        y = self.describe_heads(program, [receptance, key, value, gate], state, decay, self.bonus)
        program.barrier()
        program.multiply(self.output.weight, y, out=residual, add=True)

    def initialize(self, layer: int, num_layers: int) -> None:
        """RWKV-LM, RWKV-v5/src/model.py, `RWKV_Tmix_x060` and `generate_init_weight`."""
        p, q = depth(layer, num_layers)
        ratio, slope = ramps(self.output.in_features)
        self.mix_base.copy_(1.0 - ratio**q)
        for row, (power, offset) in enumerate(
            ((1.0, 0.0), (1.0, 0.0), (1.0, 0.3 * p), (0.5, 0.0), (0.5, 0.0))  # w, k, v, r, g
        ):
            self.mix[row] = 1.0 - (ratio ** (power * q) + offset)
        nn.init.zeros_(self.mix_down)
        nn.init.uniform_(self.mix_up, -0.01, 0.01)
        nn.init.zeros_(self.decay.down)
        nn.init.uniform_(self.decay.up, -0.01, 0.01)
        self.decay.set_bias(decay_ramp(slope, -6.0, 5.0, p))
        bonus = p * (1.0 - slope) + zigzag(len(slope), 0.1)
        self.bonus.copy_(bonus.view_as(self.bonus))
        for projection in (self.receptance, self.value):
            orthogonal_(projection.weight, 1.0)
        for projection in (self.key, self.gate):
            orthogonal_(projection.weight, 0.1)
        nn.init.zeros_(self.output.weight)
        self.initialize_head_norm(layer, num_layers)
