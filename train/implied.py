"""The attention matrix that every mixer has, said or not: what each token takes from which values.

Each op is linear in the values once keys, queries and decays are given, `o_i = sum_j A_ij v_j`. For
attention A is the matrix of its weights; for a recurrence it is that of the parallel form (Dao and
Gu, arXiv 2405.21060, section 3; Ali et al., arXiv 2403.01590). Here it is read off the op itself,
as its outputs for unit vectors as values, whatever the op; but for wkv4, where every channel has a
matrix of its own and the parallel form is that matrix.

Shape legend: B batch, T time, H heads (of wkv4: channels), K key dim, V value dim.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.language_model import LanguageModel
from model.ops import OPS
from model.ops.scores import find_score
from model.ops.wkv4 import wkv4_weights
from train.verify.running import cut_time, map_tensors

_AT_ONCE = 1 << 22
"""Weights of wkv4 in memory beside the result, a matrix for each channel."""


class Observed(NamedTuple):
    """The op of one layer, as it was called."""

    op: str
    """A row of `OPS`."""
    arguments: dict[str, Any]
    """By name, in float64; from an empty state."""

    def tokens(self, part: slice) -> "Observed":
        """The same call for some of the tokens."""
        return Observed(self.op, cut_time(self.arguments, part))

    def run(self, form: str, **changed: Any) -> tuple[Tensor, Any]:
        """`(o, final_state)`, with some of the arguments changed."""
        result: tuple[Tensor, Any] = OPS[self.op].form(form)(**{**self.arguments, **changed})
        return result


@torch.no_grad()
def observe(
    model: LanguageModel, tokens: Tensor, reset: Tensor | None = None
) -> Iterator[Observed]:
    """The op of each layer on some text, read from a fresh state.

    Args:
        model: in evaluation mode.
        tokens: `[B, T]`.
        reset: `[B, T]` bool, True where a token starts a document.
    """
    found: list[Observed] = []

    def double(x: Tensor) -> Tensor:
        return x.double() if x.is_floating_point() else x

    def keep(op: str, arguments: dict[str, Any]) -> None:
        own = {name: map_tensors(double, value) for name, value in arguments.items()}
        found.append(Observed(op, {**own, "initial_state": None}))

    model.features(tokens, reset=reset, observe=keep)
    return iter(found)


@torch.no_grad()
def implied_attention(observed: Observed) -> Tensor:
    """`A [B, H, T, T]`: row i is what token i takes of the values of all tokens, 0 from later ones.

    For wkv4, whose every channel has its own weights, H is its width.
    """
    v = observed.arguments["v"]
    batch, time, heads = v.shape[:3]
    if v.dim() == 4:
        unit = torch.eye(time, dtype=v.dtype, device=v.device)
        values = unit[:, None].expand(batch, time, heads, time)
        o, _ = observed.run("parallel", v=values)
        return o.permute(0, 2, 1, 3)
    matrix: Tensor = v.new_empty(batch, heads, time, time)
    arguments = observed.arguments
    size = max(1, _AT_ONCE // time**2)
    for row in range(batch):
        for first in range(0, heads, size):
            channels, one = slice(first, first + size), slice(row, row + 1)
            reset = arguments["reset"]
            matrix[one, channels] = wkv4_weights(
                arguments["k"][one, :, channels],
                log_decay=arguments["log_decay"][channels],
                bonus=arguments["bonus"][channels],
                reset=None if reset is None else reset[one],
            )
    return matrix


def softmax_instead(observed: Observed) -> Observed | None:
    """Softmax attention with the same queries, keys and scale; None for wkv4, which has no queries.

    It shows what normalising alone changes. A model trained with softmax has other queries.
    """
    arguments = observed.arguments
    if "q" not in arguments:
        return None
    heads = arguments["v"].shape[2]
    q, k = (
        x.repeat_interleave(heads // x.shape[2], dim=2) for x in (arguments["q"], arguments["k"])
    )
    same = {name: arguments.get(name) for name in ("v", "reset", "initial_state")}
    scale = arguments.get("scale", 1.0)
    return Observed("attention", {"q": q, "k": k, **same, "score": "softmax", "scale": scale})


@torch.no_grad()
def smallest_divisor(observed: Observed) -> float | None:
    """The least that the weights of a row are divided by, eps left out; None where nothing is.

    Of softmax and wkv4 it is not told: relative to the largest term it is at least 1.
    """
    arguments = observed.arguments
    ones = torch.ones_like(arguments["v"][..., :1])
    if observed.op == "additive" and arguments.get("normalize"):
        sums, _ = observed.run("parallel", v=ones, normalize=False)
    elif observed.op == "attention" and find_score(arguments["score"]).divisor is not None:
        score = find_score(arguments["score"])

        def spread(scores: Tensor, visible: Tensor) -> Tensor:
            """Weights that add up to the divisor."""
            assert score.divisor is not None
            return score.divisor(scores, visible) / visible.sum(dim=-1, keepdim=True)

        sums, _ = observed.run("parallel", v=ones, score=replace(score, rule=spread))
    else:
        return None
    return float(sums.amin())


def row_shares(matrix: Tensor) -> Tensor:
    """Each row's absolute values by their sum, `[..., T, T]`; NaN in rows that are all zero."""
    sizes: Tensor = matrix.abs()
    return sizes / sizes.sum(dim=-1, keepdim=True)


def entropies(shares: Tensor) -> Tensor:
    """Of rows of shares `[..., T, T]`, in nats, `[..., T]`: 0 for one token, log n for n alike."""
    terms: Tensor = torch.special.xlogy(shares, shares)
    return -terms.sum(dim=-1)


def spans(shares: Tensor) -> Tensor:
    """How many tokens back a row looks on average, `sum_j p_ij (i - j)`, `[..., T]`.

    The attention distance of Vig and Belinkov, arXiv 1906.04284.
    """
    place = torch.arange(shares.shape[-1], dtype=shares.dtype, device=shares.device)
    return place - shares @ place


def state_matrix(observed: Observed, parts: int) -> Iterator[tuple[int, Tensor]]:
    """The state after each of some equal parts of the tokens: how many tokens, and the state.

    The state is `[B, H, K, V]`, less the column of a normaliser; that of wkv4 is its weighted mean,
    `[B, 1, 1, D]`. A KV cache is no such state: nothing is yielded for it.
    """
    if observed.op == "attention":
        return
    v = observed.arguments["v"]
    state, read = None, 0
    for part in range(1, parts + 1):
        end = v.shape[1] * part // parts
        if end == read:
            continue
        _, state = observed.tokens(slice(read, end)).run("chunked", initial_state=state)
        read = end
        if isinstance(state, Tensor):
            yield end, state[..., : v.shape[-1]]
        else:
            assert state is not None
            yield end, (state.num / state.den)[:, None, None]


def effective_rank(matrix: Tensor) -> Tensor:
    """`exp` of the entropy of the singular values' shares, `[...]` of `[..., K, V]`.

    Roy and Vetterli, "The effective rank", EUSIPCO 2007: 1 for an outer product, r for r singular
    values alike; NaN for a matrix of zeros.
    """
    values: Tensor = torch.linalg.svdvals(matrix)
    return entropies(values / values.sum(dim=-1, keepdim=True)).exp()
