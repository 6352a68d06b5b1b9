"""Attention with rotary positions: softmax as Llama has it (arXiv 2302.13971), or another score.

Softmax is the baseline. Some scores have an exact recurrence: a feature map makes a dot product of
their weights, and a state of constant size does what a KV cache does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, NamedTuple, Self

import torch
from einops import rearrange
from torch import Tensor, nn

from model.config import MixerOptions, ModelConfig
from model.layers.feature_maps import monomials, num_monomials, num_taylor, taylor
from model.layers.layer import Context, Layer, at_least_single
from model.layers.rotary import document_positions, rotate
from model.ops.attention import KVCache
from model.ops.scores import (
    EPS,
    OVER_SUM,
    SCORES,
    Score,
    entmax,
    over_sum,
    polynomial,
    polynomial_factor,
)

STATES = ("cache", "constant")

_PARAMETERS: dict[str, tuple[Sequence[str], int | float]] = {
    "order": (("polynomial",), 3),
    "alpha": (("entmax",), 1.5),
    "sum_eps": (tuple(OVER_SUM), EPS),
}
"""Settings of some scores only, with their defaults."""


@dataclass(frozen=True)
class AttentionOptions(MixerOptions):
    """How scores become weights, what is carried along, and where positions come from."""

    score: str = "softmax"
    """What makes weights of scores, a row of `model.ops.scores.SCORES`; named after a colon:
    `attention:square_l1`."""
    order: int | None = None
    """Of polynomial, 1 to 4 (3 unless it is given): `attention:polynomial:2`."""
    alpha: float | None = None
    """Of entmax, above 1, at most 2 (1.5 unless it is given): `attention:entmax:1.3`."""
    sum_eps: float | None = None
    """Added to the sum that square_l1, relu_l1, sigmoid_l1 and softplus_l1 divide by (1e-6 unless
    it is given): `attention:square_l1:sum_eps=0.01`."""
    state: str = "cache"
    """`cache` keeps all keys and values, `constant` their sum in the features of square_l1, taylor
    or polynomial up to order 3: `attention:square_l1:constant`."""
    rotary_base: float = 10_000.0
    """Base of the rotary frequencies (RoFormer, arXiv 2104.09864)."""

    def __post_init__(self) -> None:
        """Refuses what does not exist or has no effect, and puts in the score's own defaults.

        Raises:
            ValueError: naming the setting.
        """
        super().__post_init__()
        if not isinstance(self.score, str) or self.score not in SCORES:
            raise ValueError(
                f"attention knows no score {self.score!r}; choose one of {', '.join(SCORES)}"
            )
        for name, (scores, default) in _PARAMETERS.items():
            value, has = getattr(self, name), self.score in scores
            if not has and value is not None:
                raise ValueError(f"{name} is of the score {' or '.join(scores)}, not {self.score}")
            if has and value is None:
                object.__setattr__(self, name, default)
        rule = self.rule()  # refuses parameters out of range
        if self.state not in STATES:
            raise ValueError(f"state must be one of {', '.join(STATES)}, but is {self.state!r}")
        if self.state == "constant" and not rule.exact:
            score = self.score if self.order is None else f"{self.score} of order {self.order}"
            raise ValueError(
                "a constant state needs square_l1, taylor or polynomial up to order 3; "
                f"with {score} leave it out"
            )

    def rule(self) -> Score:
        """From scores to weights.

        Raises:
            ValueError: for a parameter out of range.
        """
        if self.order is not None:
            return polynomial(self.order)
        if self.alpha is not None:
            return entmax(self.alpha)
        if self.sum_eps is not None:
            return over_sum(self.score, self.sum_eps)
        return SCORES[self.score]

    @classmethod
    def from_words(cls, words: Sequence[str]) -> Self:
        """The score stands first, its parameter and the state may follow.

        `softmax`, `polynomial:2`, `entmax:1.3`, `polynomial:2:constant`.
        """
        if not words or "=" in words[0]:
            return super().from_words(words)
        score, *rest = words
        parameter = {"polynomial": "order", "entmax": "alpha"}.get(score)
        settings = [f"score={score}"]
        for word in rest:
            if word in STATES:
                settings.append(f"state={word}")
            elif parameter is not None and word.replace(".", "", 1).isdecimal():
                settings.append(f"{parameter}={word}")
            else:
                settings.append(word)
        return super().from_words(settings)


class AttentionState(NamedTuple):
    """The KV cache, which grows with every token, and how far each row is in its document."""

    cache: KVCache
    position: Tensor
    """`[B]` int64: tokens of the current document so far."""


class ConstantState(NamedTuple):
    """The sum of all writes, in features, and how far each row is in its document."""

    matrix: Tensor
    """`[B, H, F, V]`: features of keys times values; `[B, H, F, V + 1]` where the score normalises,
    with the features alone in the last column."""
    position: Tensor
    """`[B]` int64: tokens of the current document so far."""


class FeatureMap(NamedTuple):
    """What makes the unnormalised weight of a score the dot product of two feature vectors."""

    features: Callable[[Tensor], Tensor]
    """`[..., K] -> [..., F]`, of q and of k, each times the root of the score's scale."""
    count: Callable[[int], int]
    """F for a K."""


def feature_map(options: AttentionOptions) -> FeatureMap:
    """Of a score with an exact recurrence."""
    if options.score == "taylor":
        return FeatureMap(taylor, num_taylor)
    order = 2 if options.score == "square_l1" else options.order
    assert order is not None, "the other scores have no feature map"
    return FeatureMap(partial(monomials, order=order), partial(num_monomials, order=order))


class Attention(Layer):
    """`o = W_o attention(rotate(W_q x), rotate(W_k x), W_v x)` with scale `K^-1/2`."""

    Options: ClassVar[type[MixerOptions]] = AttentionOptions

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        assert isinstance(config.options, AttentionOptions)
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.options, self.score = config.options, config.options.rule()
        constant = self.options.state == "constant"
        self.feature_map = feature_map(self.options) if constant else None
        self.query = nn.Linear(config.d_model, config.d_model, bias=False)
        self.key = nn.Linear(config.d_model, config.d_model, bias=False)
        self.value = nn.Linear(config.d_model, config.d_model, bias=False)
        self.output = nn.Linear(config.d_model, config.d_model, bias=False)

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        """Refuses heads that cannot be turned in pairs."""
        if config.head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, not {config.head_dim}")

    def initial_state(self, batch_size: int) -> AttentionState | ConstantState:
        """An empty cache, or nothing written yet: zeros, in at least float32.

        Where the sum of weights can come near zero, in float64: the features' products cancel in
        it, and what float32 leaves of them would be more than eps.
        """
        weight = self.key.weight
        position = torch.zeros(batch_size, dtype=torch.long, device=weight.device)
        if self.feature_map is None:
            empty = weight.new_zeros(batch_size, 0, self.num_heads, self.head_dim)
            return AttentionState(KVCache.empty(empty, empty), position)
        width = self.head_dim + self.score.normalizes
        shape = (batch_size, self.num_heads, self.feature_map.count(self.head_dim), width)
        dtype = torch.float64 if self.score.eps else at_least_single(weight.dtype)
        return ConstantState(weight.new_zeros(shape, dtype=dtype), position)

    def forward(
        self, x: Tensor, state: AttentionState | ConstantState, context: Context
    ) -> tuple[Tensor, AttentionState | ConstantState]:
        """`[B, T, D]` -> `[B, T, D]`."""
        q, k, v = (
            rearrange(project(x), "b t (h k) -> b t h k", h=self.num_heads)
            for project in (self.query, self.key, self.value)
        )
        position = document_positions(state.position, x.shape[1], context.reset)
        base = self.options.rotary_base
        q, k = rotate(q, position, base), rotate(k, position, base)
        after: AttentionState | ConstantState
        if isinstance(state, ConstantState):
            o, matrix = self._read_constant(q, k, v, position + 1, state.matrix, context)
            after = ConstantState(matrix, position[:, -1] + 1)
        else:
            o, cache = self._read_cache(q, k, v, state.cache, context)
            after = AttentionState(cache, position[:, -1] + 1)
        return self.output(rearrange(o, "b t h v -> b t (h v)")), after

    def _read_cache(
        self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache, context: Context
    ) -> tuple[Tensor, KVCache]:
        """`[B, T, H, V]` and the cache with the new tokens."""
        # A single token is the same in every form, and the chunked one may be fused.
        run = replace(context, form="chunked").run if q.shape[1] == 1 else context.run
        o, extended = run(
            "attention",
            q,
            k,
            v,
            score=self.score,
            scale=self.head_dim**-0.5,
            initial_state=cache if cache.key.shape[1] else None,
        )
        return o, extended

    def _read_constant(
        self, q: Tensor, k: Tensor, v: Tensor, length: Tensor, matrix: Tensor, context: Context
    ) -> tuple[Tensor, Tensor]:
        """The same through features: `[B, T, H, V]` and the matrix after the last token.

        `length [B, T]` is t, the tokens of its document that each token sees.
        """
        assert self.feature_map is not None
        q, k = (x.to(matrix.dtype) * self.head_dim**-0.25 for x in (q, k))
        if (order := self.options.order) is not None:
            # Its root before the features, which are products of p elements: the op's weights are
            # then those of the score, and q is narrower than its features.
            factor = polynomial_factor(order, length.to(matrix.dtype))
            q = q * factor.pow(1 / order)[:, :, None, None]
        q, k = self.feature_map.features(q), self.feature_map.features(k)
        normalizer = {"normalize": True, "eps": self.score.eps} if self.score.normalizes else {}
        o, matrix = context.run("additive", q, k, v, initial_state=matrix, **normalizer)
        return o, matrix
