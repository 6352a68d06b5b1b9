"""Channel mixers: what stands between the time mixers. `(x, state, context) -> (y, state)`."""

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.layers.initializers import depth, orthogonal_, ramps
from model.layers.layer import Context, Layer
from model.layers.token_shift import interpolations
from model.ops import fused
from model.ops.native.instructions import Vector
from model.ops.native.program import Program
from model.state import NoState


class ShiftState(NamedTuple):
    """The last token."""

    shift: Tensor
    """`[B, D]`."""


class SwiGLU(Layer):
    """`W_down (silu(W_gate x) * W_up x)` (arXiv 2002.05202), without biases, as Llama has it."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        width = config.ffn_dim or self.default_ffn_dim(config.d_model)
        self.gate = nn.Linear(config.d_model, width, bias=False)
        self.up = nn.Linear(config.d_model, width, bias=False)
        self.down = nn.Linear(width, config.d_model, bias=False)

    @staticmethod
    def default_ffn_dim(d_model: int) -> int:
        """8/3 D, the parameters of a plain 4 D network, rounded to a multiple of 32."""
        return max(32, round(8 * d_model / 3 / 32) * 32)

    def initial_state(self, batch_size: int) -> NoState:
        """Nothing to remember."""
        return NoState()

    def forward(self, x: Tensor, state: NoState, context: Context) -> tuple[Tensor, NoState]:
        """`[B, T, D]` -> `[B, T, D]`."""
        return self.down(fused.swiglu(self.gate(x), self.up(x))), state

    def describe_step(self, program: Program, x: Vector, state: NoState, residual: Vector) -> None:
        """`forward` for one token, in two phases."""
        gate = program.multiply(self.gate.weight, x, activation="silu")
        hidden = program.multiply(self.up.weight, x, factor=gate)
        program.barrier()
        program.multiply(self.down.weight, hidden, out=residual, add=True)


class ShiftedChannelMix(Layer):
    """What RWKV's channel mixers share: the squared relu of an interpolated token."""

    HIDDEN_RATIO: ClassVar[float]

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.d_model = config.d_model
        width = config.ffn_dim or self.default_ffn_dim(config.d_model)
        self.mix_key = nn.Parameter(torch.zeros(config.d_model))
        self.key = nn.Linear(config.d_model, width, bias=False)
        self.value = nn.Linear(width, config.d_model, bias=False)

    @classmethod
    def default_ffn_dim(cls, d_model: int) -> int:
        """The official multiple of D, rounded down to a multiple of 32."""
        return max(32, int(cls.HIDDEN_RATIO * d_model) // 32 * 32)

    def initial_state(self, batch_size: int) -> ShiftState:
        """No token yet: zeros."""
        return ShiftState(self.mix_key.new_zeros(batch_size, self.d_model))

    def squared_relu(self, x_key: Tensor) -> Tensor:
        """`W_v relu(W_k x_k)^2`."""
        y: Tensor = self.value(fused.squared_relu(self.key(x_key)))
        return y


class RWKV4ChannelMix(ShiftedChannelMix):
    """`sigmoid(W_r x_r) * W_v relu(W_k x_k)^2` with `x_* = x mix + x_prev (1 - mix)`.

    RWKV-4, arXiv 2305.13048, section 3.2.
    """

    HIDDEN_RATIO = 4.0

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.mix_receptance = nn.Parameter(torch.zeros(config.d_model))
        self.receptance = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor, state: ShiftState, context: Context) -> tuple[Tensor, ShiftState]:
        """`[B, T, D]` -> `[B, T, D]`."""
        (x_key, x_receptance), last = interpolations(
            x, state.shift, self.previous_parts(), context.reset
        )
        receptance, hidden = self.receptance(x_receptance), self.squared_relu(x_key)
        return torch.sigmoid(receptance) * hidden, ShiftState(last)

    def previous_parts(self) -> Tensor:
        """`[2, D]`: the part of the token before in key and receptance."""
        return 1 - torch.stack([self.mix_key, self.mix_receptance])

    def describe_step(
        self, program: Program, x: Vector, state: ShiftState, residual: Vector
    ) -> None:
        """`forward` for one token, in two phases."""
        x_key, x_receptance = program.interpolate(x, state.shift, self.previous_parts())
        hidden = program.multiply(self.key.weight, x_key, activation="squared_relu")
        receptance = program.multiply(self.receptance.weight, x_receptance, activation="sigmoid")
        program.barrier()
        program.keep(x, state.shift)
        program.multiply(self.value.weight, hidden, out=residual, add=True, factor=receptance)

    def initialize(self, layer: int, num_layers: int) -> None:
        """RWKV-LM, RWKV-v4neo and RWKV-v5, `RWKV_ChannelMix` and `generate_init_weight`."""
        self._initialize(ramps(self.d_model)[0] ** depth(layer, num_layers)[1])

    def _initialize(self, mix: Tensor) -> None:
        self.mix_key.copy_(mix)
        self.mix_receptance.copy_(mix)
        orthogonal_(self.key.weight, 1.0)
        nn.init.zeros_(self.receptance.weight)
        nn.init.zeros_(self.value.weight)


class RWKV5ChannelMix(RWKV4ChannelMix):
    """As in RWKV-4, but narrower inside (arXiv 2404.05892, section 4.3)."""

    HIDDEN_RATIO = 3.5


class RWKV6ChannelMix(RWKV5ChannelMix):
    """As in RWKV-5, but with `x_* = x + (x_prev - x) mix` (arXiv 2404.05892, section 4.3)."""

    def previous_parts(self) -> Tensor:
        """`[2, D]`: the mixes themselves."""
        return torch.stack([self.mix_key, self.mix_receptance])

    def initialize(self, layer: int, num_layers: int) -> None:
        """RWKV-LM, RWKV-v5/src/model.py, `RWKV_CMix_x060` and `generate_init_weight`."""
        self._initialize(1.0 - ramps(self.d_model)[0] ** depth(layer, num_layers)[1])


class RWKV7ChannelMix(ShiftedChannelMix):
    """`W_v relu(W_k x_k)^2` (arXiv 2503.14456, section 4.2)."""

    HIDDEN_RATIO = 4.0

    def forward(self, x: Tensor, state: ShiftState, context: Context) -> tuple[Tensor, ShiftState]:
        """`[B, T, D]` -> `[B, T, D]`."""
        (x_key,), last = interpolations(x, state.shift, self.mix_key[None], context.reset)
        return self.squared_relu(x_key), ShiftState(last)

    def describe_step(
        self, program: Program, x: Vector, state: ShiftState, residual: Vector
    ) -> None:
        """`forward` for one token, in two phases."""
        (x_key,) = program.interpolate(x, state.shift, self.mix_key[None])
        hidden = program.multiply(self.key.weight, x_key, activation="squared_relu")
        program.barrier()
        program.keep(x, state.shift)
        program.multiply(self.value.weight, hidden, out=residual, add=True)

    def initialize(self, layer: int, num_layers: int) -> None:
        """RWKV-LM, RWKV-v7/train_temp/src/model.py, `RWKV_CMix_x070.__init__`."""
        q = depth(layer, num_layers)[1]
        self.mix_key.copy_(1.0 - ramps(self.d_model)[0] ** (q**4))
        bound = 0.5 / self.d_model**0.5
        nn.init.uniform_(self.key.weight, -bound, bound)
        nn.init.zeros_(self.value.weight)
