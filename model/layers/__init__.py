"""The layers. Every mixer is `(x, state, context) -> (y, state)` with x and y `[B, T, D]`."""

from collections.abc import Callable
from typing import NamedTuple

from model.layers.attention import Attention
from model.layers.channel_mix import (
    RWKV4ChannelMix,
    RWKV5ChannelMix,
    RWKV6ChannelMix,
    RWKV7ChannelMix,
    SwiGLU,
)
from model.layers.deltanet import DeltaNet, GatedDeltaNet
from model.layers.gla import GLA
from model.layers.layer import Layer
from model.layers.linear_transformer import LinearTransformer
from model.layers.mamba2 import Mamba2
from model.layers.norm import LayerNorm, Norm, RMSNorm
from model.layers.retnet import RetNet
from model.layers.rwkv4 import RWKV4
from model.layers.rwkv5 import RWKV5
from model.layers.rwkv6 import RWKV6
from model.layers.rwkv7 import RWKV7


class Body(NamedTuple):
    """What stands around the mixers of one tradition."""

    name: str
    """Also chooses the embedding's initial values and the recipe of training."""
    norm: Callable[[int], Norm]
    """Of a width."""
    embedding_norm: bool
    """Whether the embedding is normalised (RWKV's ln0)."""


RWKV = Body("rwkv", LayerNorm, embedding_norm=True)
TRANSFORMER = Body("transformer", RMSNorm, embedding_norm=False)


class Mixer(NamedTuple):
    """One row: what a block of this mixer is made of."""

    time_mix: type[Layer]
    channel_mix: type[Layer] | None
    """None where the time mixer is the whole block."""
    body: Body
    op: str
    """The row of `model.ops.OPS` it runs on."""
    equation: str
    """The recurrence, in one line."""
    source: str
    """The paper."""


MIXERS = {
    "rwkv4": Mixer(
        RWKV4,
        RWKV4ChannelMix,
        RWKV,
        "wkv4",
        "mean of v with weights exp(k) that decay, a channel",
        "arXiv 2305.13048",
    ),
    "rwkv5": Mixer(
        RWKV5,
        RWKV5ChannelMix,
        RWKV,
        "additive",
        "S = diag(w) S + k v^T, decay a channel, bonus",
        "arXiv 2404.05892",
    ),
    "rwkv6": Mixer(
        RWKV6,
        RWKV6ChannelMix,
        RWKV,
        "additive",
        "S = diag(w) S + k v^T, decay from the data, bonus",
        "arXiv 2404.05892",
    ),
    "rwkv7": Mixer(
        RWKV7,
        RWKV7ChannelMix,
        RWKV,
        "delta",
        "S = (diag(w) + b a^T) S + k v^T, decay from the data",
        "arXiv 2503.14456",
    ),
    "linear_transformer": Mixer(
        LinearTransformer,
        SwiGLU,
        TRANSFORMER,
        "additive",
        "S = S + k v^T, normalised, elu + 1",
        "arXiv 2006.16236",
    ),
    "retnet": Mixer(
        RetNet,
        SwiGLU,
        TRANSFORMER,
        "additive",
        "S = w S + k v^T, one fixed decay a head, rotary positions",
        "arXiv 2307.08621",
    ),
    "gla": Mixer(
        GLA,
        SwiGLU,
        TRANSFORMER,
        "additive",
        "S = diag(w) S + k v^T, decay from the data",
        "arXiv 2312.06635",
    ),
    "mamba2": Mixer(
        Mamba2,
        None,
        TRANSFORMER,
        "additive",
        "S = w S + k v^T, one decay a head from the data, convolution",
        "arXiv 2405.21060",
    ),
    "deltanet": Mixer(
        DeltaNet,
        SwiGLU,
        TRANSFORMER,
        "delta",
        "S = (I - b k k^T) S + b k v^T, convolution",
        "arXiv 2406.06484",
    ),
    "gated_deltanet": Mixer(
        GatedDeltaNet,
        SwiGLU,
        TRANSFORMER,
        "delta",
        "S = w (I - b k k^T) S + b k v^T, convolution",
        "arXiv 2412.06464",
    ),
    "attention": Mixer(
        Attention,
        SwiGLU,
        TRANSFORMER,
        "attention",
        "weights of all tokens so far from their scores (below), rotary positions",
        "arXiv 1706.03762",
    ),
}
