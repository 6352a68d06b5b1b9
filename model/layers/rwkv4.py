"""RWKV-4 (arXiv 2305.13048): a decaying weighted mean of the values, channel by channel."""

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.layers.initializers import depth, orthogonal_, ramps
from model.layers.layer import Context, Layer, at_least_single
from model.layers.rwkv import decay_ramp, zigzag
from model.layers.token_shift import interpolations
from model.ops.native.instructions import Vector
from model.ops.native.program import Program
from model.ops.wkv4 import WIPED, WKV4State


class RWKV4State(NamedTuple):
    """The last token, and the weighted mean as numerator, denominator and largest logit."""

    shift: Tensor
    """`[B, D]`."""
    mean: WKV4State
    """Of three tensors `[B, D]`."""


class RWKV4(Layer):
    """`o = W_o (sigmoid(W_r x_r) * wkv(W_k x_k, W_v x_v))` (section 3.1)."""

    LEARNING_RATE_SCALES: ClassVar[dict[str, float]] = {"decay": 2.0, "bonus": 3.0}

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        width = config.d_model
        self.mix = nn.Parameter(torch.zeros(3, width))
        """`[3, D]`: the token's own part in key, value and receptance, in this order."""
        self.decay = nn.Parameter(torch.zeros(width))
        """`[D]`, time_decay: the log-decay is `-exp(decay)`."""
        self.bonus = nn.Parameter(torch.zeros(width))
        """`[D]`, time_first: added to the logit of the token's own value."""
        self.receptance = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def initial_state(self, batch_size: int) -> RWKV4State:
        """No token yet: zeros, and a logit below all others."""
        width = self.decay.shape[0]
        shift = self.mix.new_zeros(batch_size, width)
        dtype = at_least_single(shift.dtype)
        mean = WKV4State.empty(batch_size, width, dtype=dtype, device=shift.device)
        return RWKV4State(shift, mean)

    def forward(self, x: Tensor, state: RWKV4State, context: Context) -> tuple[Tensor, RWKV4State]:
        """`[B, T, D]` -> `[B, T, D]`."""
        (x_key, x_value, x_receptance), last = interpolations(
            x, state.shift, 1.0 - self.mix, context.reset
        )
        o, mean = context.run(
            "wkv4",
            self.key(x_key),
            self.value(x_value),
            log_decay=-self.decay.exp(),
            bonus=self.bonus,
            initial_state=state.mean,
        )
        y = self.output(torch.sigmoid(self.receptance(x_receptance)) * o)
        return y, RWKV4State(last, mean)

    def describe_step(
        self, program: Program, x: Vector, state: RWKV4State, residual: Vector
    ) -> None:
        """`forward` for one token, in two phases."""
        x_key, x_value, x_receptance = program.interpolate(x, state.shift, 1 - self.mix)
        key = program.multiply(self.key.weight, x_key)
        value = program.multiply(self.value.weight, x_value)
        receptance = program.multiply(self.receptance.weight, x_receptance, activation="sigmoid")
        y = program.wkv4(
            key,
            value,
            receptance,
            state.mean,
            log_decay=(-self.decay.exp()).clamp(min=WIPED),
            bonus=self.bonus,
        )
        program.barrier()
        program.keep(x, state.shift)
        program.multiply(self.output.weight, y, out=residual, add=True)

    def initialize(self, layer: int, num_layers: int) -> None:
        """RWKV-LM, RWKV-v4neo/src/model.py, `RWKV_TimeMix.__init__` and `generate_init_weight`."""
        width = self.decay.shape[0]
        p, q = depth(layer, num_layers)
        ratio, slope = ramps(width)
        self.mix.copy_(torch.stack([ratio**q, ratio**q + 0.3 * p, ratio ** (0.5 * q)]))
        self.decay.copy_(decay_ramp(slope, -5.0, 8.0, p))
        self.bonus.copy_(zigzag(width, 0.5) + torch.tensor(0.3).log())
        orthogonal_(self.value.weight, 1.0)
        for projection in (self.key, self.receptance, self.output):
            nn.init.zeros_(projection.weight)
