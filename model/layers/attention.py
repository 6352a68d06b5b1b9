"""Softmax attention with rotary positions: the baseline, as Llama has it (arXiv 2302.13971)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

import torch
from einops import rearrange
from torch import Tensor, nn

from model.config import MixerOptions, ModelConfig
from model.layers.layer import Context, Layer
from model.layers.rotary import document_positions, rotate
from model.ops.attention import KVCache

SCORES = ("softmax",)


@dataclass(frozen=True)
class AttentionOptions(MixerOptions):
    """How scores become weights, and where positions come from."""

    score: str = "softmax"
    """What makes weights of scores; named after a colon: `attention:softmax`."""
    rotary_base: float = 10_000.0
    """Base of the rotary frequencies (RoFormer, arXiv 2104.09864)."""

    def __post_init__(self) -> None:
        """Refuses what does not exist.

        Raises:
            ValueError: naming the setting.
        """
        super().__post_init__()
        if self.score not in SCORES:
            raise ValueError(
                f"attention knows no score {self.score!r}; choose one of {', '.join(SCORES)}"
            )

    @classmethod
    def from_words(cls, words: Sequence[str]) -> Self:
        """The score stands first: `attention:softmax`."""
        if not words or "=" in words[0]:
            return super().from_words(words)
        score, *rest = words
        return super().from_words([f"score={score}", *rest])


class AttentionState(NamedTuple):
    """The KV cache, which grows with every token, and how far each row is in its document."""

    cache: KVCache
    position: Tensor
    """`[B]` int64: tokens of the current document so far."""


class Attention(Layer):
    """`o = W_o attention(rotate(W_q x), rotate(W_k x), W_v x)` with scale `K^-1/2`."""

    Options: ClassVar[type[MixerOptions]] = AttentionOptions

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        assert isinstance(config.options, AttentionOptions)
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.rotary_base = config.options.rotary_base
        self.query = nn.Linear(config.d_model, config.d_model, bias=False)
        self.key = nn.Linear(config.d_model, config.d_model, bias=False)
        self.value = nn.Linear(config.d_model, config.d_model, bias=False)
        self.output = nn.Linear(config.d_model, config.d_model, bias=False)

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        """Refuses heads that cannot be turned in pairs."""
        if config.head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, not {config.head_dim}")

    def initial_state(self, batch_size: int) -> AttentionState:
        """An empty cache."""
        empty = self.key.weight.new_zeros(batch_size, 0, self.num_heads, self.head_dim)
        position = torch.zeros(batch_size, dtype=torch.long, device=empty.device)
        return AttentionState(KVCache.empty(empty, empty), position)

    def forward(
        self, x: Tensor, state: AttentionState, context: Context
    ) -> tuple[Tensor, AttentionState]:
        """`[B, T, D]` -> `[B, T, D]`."""
        q, k, v = (
            rearrange(project(x), "b t (h k) -> b t h k", h=self.num_heads)
            for project in (self.query, self.key, self.value)
        )
        position = document_positions(state.position, x.shape[1], context.reset)
        q, k = rotate(q, position, self.rotary_base), rotate(k, position, self.rotary_base)
        # A single token is the same in every form, and the fused kernel is the fastest of them.
        run = replace(context, form="chunked").run if x.shape[1] == 1 else context.run
        o, cache = run(
            "attention",
            q,
            k,
            v,
            scale=self.head_dim**-0.5,
            initial_state=state.cache if state.cache.key.shape[1] else None,
        )
        y = self.output(rearrange(o, "b t h v -> b t (h v)"))
        return y, AttentionState(cache, position[:, -1] + 1)
