"""RWKV-5.2 "Eagle" (arXiv 2404.05892): additive, with a static decay a channel and a bonus."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from model.config import MixerOptions, ModelConfig
from model.layers.initializers import depth, orthogonal_, ramps
from model.layers.layer import Context
from model.layers.rwkv import RWKVHeads, RWKVOptions, RWKVState, decay_ramp, zigzag
from model.layers.token_shift import interpolations
from model.ops.native.instructions import Vector
from model.ops.native.packing import ROWS
from model.ops.native.program import Program


class RWKV5(RWKVHeads):
    """The time mixer of RWKV-5.2 (section 4.2)."""

    Options: ClassVar[type[MixerOptions]] = RWKVOptions
    LEARNING_RATE_SCALES: ClassVar[dict[str, float]] = {"decay": 2.0}

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.mix = nn.Parameter(torch.zeros(4, config.d_model))
        """`[4, D]`: the token's own part in key, value, receptance and gate, in this order."""
        self.decay = nn.Parameter(torch.zeros(self.num_heads, self.head_dim))
        """`[H, K]`, time_decay: the log-decay is `-exp(decay)`."""
        self.bonus = nn.Parameter(torch.zeros(self.num_heads, self.head_dim))
        """`[H, K]`, time_faaaa: weight of the token's own value."""
        self.gate = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor, state: RWKVState, context: Context) -> tuple[Tensor, RWKVState]:
        """`[B, T, D]` -> `[B, T, D]`."""
        (x_key, x_value, x_receptance, x_gate), last = interpolations(
            x, state.shift, 1.0 - self.mix, context.reset
        )
        key = self.heads(self.key(x_key))
        o, matrix = context.run(
            "additive",
            self.heads(self.receptance(x_receptance)),
            key,
            self.heads(self.value(x_value)),
            log_decay=(-self.decay.exp()).expand(key.shape),
            bonus=self.bonus,
            initial_state=state.matrix,
        )
        y = self.output(self.head_norm.gated(o, self.gate(x_gate), silu=True))
        return y, RWKVState(last, matrix)

    def describe_step(
        self, program: Program, x: Vector, state: RWKVState, residual: Vector
    ) -> None:
        """`forward` for one token, in two phases."""
        x_key, x_value, x_receptance, x_gate = program.interpolate(x, state.shift, 1 - self.mix)
        grain = self.by_heads() or ROWS
        receptance = program.multiply(self.receptance.weight, x_receptance, grain=grain)
        key = program.multiply(self.key.weight, x_key, grain=grain)
        value = program.multiply(self.value.weight, x_value, grain=grain)
        gate = program.multiply(self.gate.weight, x_gate, activation="silu", grain=grain)
        if self.by_heads() is None:
            program.barrier()
        y = self.describe_heads(
            program, [receptance, key, value, gate], state, self.decay, self.bonus
        )
        program.barrier()
        program.keep(x, state.shift)
        program.multiply(self.output.weight, y, out=residual, add=True)

    def initialize(self, layer: int, num_layers: int) -> None:
        """RWKV-LM, RWKV-v5/src/model.py, `RWKV_TimeMix_RWKV5` and `generate_init_weight`."""
        p, q = depth(layer, num_layers)
        ratio, slope = ramps(self.output.in_features)
        half = ratio ** (0.5 * q)
        self.mix.copy_(torch.stack([ratio**q, ratio**q + 0.3 * p, half, half]))
        self.decay.copy_(decay_ramp(slope, -6.0, 5.0, p).view_as(self.decay))
        bonus = p * (1.0 - slope) + zigzag(len(slope), 0.1)
        self.bonus.copy_(bonus.view_as(self.bonus))
        for projection in (self.receptance, self.value):
            orthogonal_(projection.weight, 1.0)
        for projection in (self.key, self.gate):
            orthogonal_(projection.weight, 0.1)
        nn.init.zeros_(self.output.weight)
        self.initialize_head_norm(layer, num_layers)
