"""The layers. Every mixer is `(x, state, context) -> (y, state)` with x and y `[B, T, D]`."""

from typing import NamedTuple

from torch import nn

from model.layers.attention import Attention
from model.layers.channel_mix import RWKV6ChannelMix, RWKV7ChannelMix, SwiGLU
from model.layers.layer import Layer
from model.layers.linear_transformer import LinearTransformer
from model.layers.norm import LayerNorm, RMSNorm
from model.layers.rwkv6 import RWKV6
from model.layers.rwkv7 import RWKV7


class Mixer(NamedTuple):
    """One row: what a block of this mixer is made of."""

    time_mix: type[Layer]
    channel_mix: type[Layer]
    norm: type[nn.Module]
    embedding_norm: bool
    """Whether the embedding is normalised (RWKV's ln0)."""
    op: str
    """The row of `model.ops.OPS` it runs on."""
    source: str
    """The paper."""


MIXERS = {
    "attention": Mixer(Attention, SwiGLU, RMSNorm, False, "attention", "arXiv 1706.03762"),
    "linear_transformer": Mixer(
        LinearTransformer, SwiGLU, RMSNorm, False, "additive", "arXiv 2006.16236"
    ),
    "rwkv6": Mixer(RWKV6, RWKV6ChannelMix, LayerNorm, True, "additive", "arXiv 2404.05892"),
    "rwkv7": Mixer(RWKV7, RWKV7ChannelMix, LayerNorm, True, "delta", "arXiv 2503.14456"),
}
