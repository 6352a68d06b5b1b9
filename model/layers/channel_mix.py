"""Channel mixers: what stands between the time mixers. `(x, state, context) -> (y, state)`."""

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.layers.layer import Context, Layer
from model.layers.token_shift import token_shift
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
        return self.down(F.silu(self.gate(x)) * self.up(x)), state


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

    def squared_relu(self, x: Tensor, difference: Tensor) -> Tensor:
        """`W_v relu(W_k (x + difference mix_key))^2`."""
        hidden = F.relu(self.key(torch.addcmul(x, difference, self.mix_key)))
        y: Tensor = self.value(hidden * hidden)  # square() goes through pow, which is slower
        return y


class RWKV6ChannelMix(ShiftedChannelMix):
    """`sigmoid(W_r x_r) * W_v relu(W_k x_k)^2` (arXiv 2404.05892, section 4.3)."""

    HIDDEN_RATIO = 3.5

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.mix_receptance = nn.Parameter(torch.zeros(config.d_model))
        self.receptance = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor, state: ShiftState, context: Context) -> tuple[Tensor, ShiftState]:
        """`[B, T, D]` -> `[B, T, D]`."""
        previous, last = token_shift(x, state.shift, context.reset)
        difference = previous - x
        receptance = self.receptance(torch.addcmul(x, difference, self.mix_receptance))
        return torch.sigmoid(receptance) * self.squared_relu(x, difference), ShiftState(last)


class RWKV7ChannelMix(ShiftedChannelMix):
    """`W_v relu(W_k x_k)^2` (arXiv 2503.14456, section 4.2)."""

    HIDDEN_RATIO = 4.0

    def forward(self, x: Tensor, state: ShiftState, context: Context) -> tuple[Tensor, ShiftState]:
        """`[B, T, D]` -> `[B, T, D]`."""
        previous, last = token_shift(x, state.shift, context.reset)
        return self.squared_relu(x, previous - x), ShiftState(last)
