"""RWKV-7 "Goose" (arXiv 2503.14456): the delta recurrence with a decay a channel."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from model.config import ModelConfig, RWKV7Options
from model.layers.layer import Context, Layer
from model.layers.low_rank import LowRank
from model.layers.norm import HeadNorm
from model.layers.rwkv6 import RWKVState
from model.layers.token_shift import token_shift
from model.ops import OPS

STRONGEST_DECAY = -math.exp(-0.5)
"""The log-decay of RWKV-7 lies in (-0.6065, 0): section 4.1."""


def default_rank(factor: float, d_model: int) -> int:
    """`factor sqrt(D)`, rounded to a multiple of 32, at least 32 (RWKV-LM, RWKV-v7 train_temp)."""
    return max(32, round(factor * math.sqrt(d_model) / 32) * 32)


class RWKV7(Layer):
    """The time mixer of RWKV-7."""

    LEARNING_RATE_SCALES: ClassVar[dict[str, float]] = {"decay.bias": 2.0}

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        assert isinstance(config.options, RWKV7Options)
        width, options = config.d_model, config.options
        self.num_heads, self.head_dim, self.is_first = config.num_heads, config.head_dim, layer == 0
        self.mix = nn.Parameter(torch.zeros(6, width))
        """`[6, D]`: of receptance, decay, key, value, iclr and gate, in this order."""
        self.decay = LowRank(
            width, options.decay_rank or default_rank(2.5, width), width, activation=torch.tanh
        )
        self.iclr = LowRank(width, options.iclr_rank or default_rank(2.5, width), width)
        if not self.is_first:
            self.value_residual = LowRank(
                width, options.value_rank or default_rank(1.7, width), width
            )
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
        self.receptance = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.head_norm = HeadNorm(self.num_heads, self.head_dim, options.group_norm_eps)

    def initial_state(self, batch_size: int) -> RWKVState:
        """No token yet: zeros, the matrix in at least float32."""
        shift = self.mix.new_zeros(batch_size, self.num_heads * self.head_dim)
        dtype = torch.promote_types(shift.dtype, torch.float32)
        shape = (batch_size, self.num_heads, self.head_dim, self.head_dim)
        return RWKVState(shift, shift.new_zeros(shape, dtype=dtype))

    def forward(self, x: Tensor, state: RWKVState, context: Context) -> tuple[Tensor, RWKVState]:
        """`[B, T, D]` -> `[B, T, D]`."""
        previous, last = token_shift(x, state.shift, context.reset)
        difference = previous - x
        x_receptance, x_decay, x_key, x_value, x_iclr, x_gate = (
            torch.addcmul(x, difference, mix) for mix in self.mix.unbind()
        )
        log_decay = STRONGEST_DECAY * torch.sigmoid(self.decay(x_decay))
        iclr = torch.sigmoid(self.iclr(x_iclr))
        value = self.value(x_value)
        if self.is_first:
            context.v_first = value
        else:
            assert context.v_first is not None
            amount = torch.sigmoid(self.value_residual(x_value))
            value = torch.lerp(value, context.v_first, amount.to(value.dtype))
        key = self.key(x_key)
        receptance, key, value, removal, log_decay, iclr = (
            rearrange(y, "b t (h k) -> b t h k", h=self.num_heads)
            for y in (
                self.receptance(x_receptance),
                torch.addcmul(key, key * self.iclr_scale, iclr - 1.0),
                value,
                key * self.removal_scale,
                log_decay,
                iclr,
            )
        )
        removal = F.normalize(removal, dim=-1, eps=1e-12)
        o, matrix = OPS["delta"].form(context.form)(
            receptance,
            key,
            value,
            a=-removal,
            b=removal * iclr,
            log_decay=log_decay,
            reset=context.reset,
            initial_state=state.matrix,
        )
        own = (receptance * key * self.bonus).sum(dim=-1, keepdim=True) * value
        y = self.head_norm(o) + rearrange(own, "b t h v -> b t (h v)")
        return self.output(y * self.gate(x_gate)), RWKVState(last, matrix)
