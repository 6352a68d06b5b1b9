"""RWKV-6 "Finch" (arXiv 2404.05892): additive, with a data-dependent decay and a bonus."""

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from model.config import ModelConfig, RWKV6Options
from model.layers.layer import Context, Layer
from model.layers.low_rank import LowRank
from model.layers.norm import HeadNorm
from model.layers.token_shift import token_shift
from model.ops import OPS


class RWKVState(NamedTuple):
    """The last token and the matrix of each head."""

    shift: Tensor
    """`[B, D]`."""
    matrix: Tensor
    """`[B, H, K, V]`."""


class RWKV6(Layer):
    """The time mixer of RWKV-6."""

    LEARNING_RATE_SCALES: ClassVar[dict[str, float]] = {"decay.bias": 2.0}

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        assert isinstance(config.options, RWKV6Options)
        width, options = config.d_model, config.options
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.mix_base = nn.Parameter(torch.zeros(width))
        self.mix = nn.Parameter(torch.zeros(5, width))
        """`[5, D]`: of decay, key, value, receptance and gate, in this order."""
        self.mix_down = nn.Parameter(torch.zeros(width, 5 * options.shift_rank))
        self.mix_up = nn.Parameter(torch.zeros(5, options.shift_rank, width))
        self.decay = LowRank(width, options.decay_rank, width, activation=torch.tanh)
        self.bonus = nn.Parameter(torch.zeros(self.num_heads, self.head_dim))
        self.receptance = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.head_norm = HeadNorm(self.num_heads, self.head_dim, options.group_norm_eps)

    def initial_state(self, batch_size: int) -> RWKVState:
        """No token yet: zeros, the matrix in at least float32."""
        shift = self.mix_base.new_zeros(batch_size, self.num_heads * self.head_dim)
        dtype = torch.promote_types(shift.dtype, torch.float32)
        shape = (batch_size, self.num_heads, self.head_dim, self.head_dim)
        return RWKVState(shift, shift.new_zeros(shape, dtype=dtype))

    def forward(self, x: Tensor, state: RWKVState, context: Context) -> tuple[Tensor, RWKVState]:
        """`[B, T, D]` -> `[B, T, D]`."""
        previous, last = token_shift(x, state.shift, context.reset)
        difference = previous - x
        low = torch.tanh(torch.addcmul(x, difference, self.mix_base) @ self.mix_down)
        low = rearrange(low, "b t (m r) -> m b t r", m=5)
        offsets = torch.einsum("mbtr,mrd->mbtd", low, self.mix_up) + self.mix[:, None, None]
        x_decay, x_key, x_value, x_receptance, x_gate = (x + difference * offsets).unbind()

        receptance, key, value, log_decay = (
            rearrange(y, "b t (h k) -> b t h k", h=self.num_heads)
            for y in (
                self.receptance(x_receptance),
                self.key(x_key),
                self.value(x_value),
                -self.decay(x_decay).exp(),
            )
        )
        o, matrix = OPS["additive"].form(context.form)(
            receptance,
            key,
            value,
            log_decay=log_decay,
            bonus=self.bonus,
            reset=context.reset,
            initial_state=state.matrix,
        )
        y = self.output(self.head_norm(o) * F.silu(self.gate(x_gate)))
        return y, RWKVState(last, matrix)
