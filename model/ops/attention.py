"""Causal softmax attention, `o_i = sum_{j <= i} softmax_j(scale q_i . k_j) v_j`, in three forms.

The baseline (arXiv 1706.03762). Its state is the KV cache, the one state here that grows with T.

Shape legend: B batch, T time, S cached tokens, H heads, K key dim, V value dim, C chunk length.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops.decay import check_shapes


class KVCache(NamedTuple):
    """The keys and values of all tokens so far."""

    key: Tensor
    """`[B, S, H, K]`."""
    value: Tensor
    """`[B, S, H, V]`."""
    start: Tensor
    """`[B]` int64: the first visible token; those before it belong to other documents."""

    @classmethod
    def empty(cls, like_key: Tensor, like_value: Tensor) -> "KVCache":
        """No tokens yet, in the shapes of `[B, T, H, K]` and `[B, T, H, V]`."""
        start = torch.zeros(like_key.shape[0], dtype=torch.long, device=like_key.device)
        return cls(like_key[:, :0], like_value[:, :0], start)

    @staticmethod
    def concatenate(caches: Sequence["KVCache"]) -> "KVCache":
        """One batch of several: shorter ones get invisible tokens in front."""
        longest = max(cache.key.shape[1] for cache in caches)
        keys, values, starts = [], [], []
        for cache in caches:
            missing = longest - cache.key.shape[1]
            keys.append(F.pad(cache.key, (0, 0, 0, 0, missing, 0)))
            values.append(F.pad(cache.value, (0, 0, 0, 0, missing, 0)))
            starts.append(cache.start + missing)
        return KVCache(torch.cat(keys), torch.cat(values), torch.cat(starts))


def recurrent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float = 1.0,
    reset: Tensor | None = None,
    initial_state: KVCache | None = None,
) -> tuple[Tensor, KVCache]:
    """The definition: one token after the other reads all cached keys and values.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        scale: factor on the scores `q . k`.
        reset: `[B, T]` bool, True where a token starts a document: it sees nothing before it.
        initial_state: the cache to start from; None for an empty one.

    Returns:
        o `[B, T, H, V]`, and the cache with the new tokens behind the old.

    Raises:
        ValueError: if shapes do not fit together.
    """
    first, cache = _extend(q, k, v, reset, initial_state)
    cached = cache.key.shape[1] - v.shape[1]
    outputs = []
    for t in range(v.shape[1]):
        length = cached + t + 1
        scores = scale * torch.einsum("bhk,bshk->bhs", q[:, t], cache.key[:, :length])
        hidden = torch.arange(length, device=q.device) < first[:, t, None]
        weights = scores.masked_fill(hidden[:, None], -torch.inf).softmax(dim=-1)
        outputs.append(torch.einsum("bhs,bshv->bhv", weights, cache.value[:, :length]))
    return torch.stack(outputs, dim=1), cache


def parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float = 1.0,
    reset: Tensor | None = None,
    initial_state: KVCache | None = None,
) -> tuple[Tensor, KVCache]:
    """All tokens at once, through PyTorch's fused attention.

    Arguments, results and errors as `recurrent_attention`. Where there is a cache or a reset, a
    mask of T x (S + T) is built.
    """
    return chunked_attention(
        q,
        k,
        v,
        scale=scale,
        reset=reset,
        initial_state=initial_state,
        chunk_size=max(v.shape[1], 1),
    )


def chunked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float = 1.0,
    reset: Tensor | None = None,
    initial_state: KVCache | None = None,
    chunk_size: int = 512,
) -> tuple[Tensor, KVCache]:
    """As the parallel form, with masks of no more than C x (S + T).

    Memory grows with T where the fused kernel takes the shapes (K = V) and either no mask is needed
    or no gradient: for the backward pass the masks of all chunks are kept. Work grows with T^2.

    Arguments, results and errors as `recurrent_attention`.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, but is {chunk_size}")
    first, cache = _extend(q, k, v, reset, initial_state)
    if scale <= 0:  # the fused kernel would multiply the -inf of its mask too
        q, scale = q * scale, 1.0
    queries, keys, values = (x.transpose(1, 2) for x in (q, cache.key, cache.value))
    if reset is None and initial_state is None:
        o = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale)
        return o.transpose(1, 2), cache
    time, total = v.shape[1], keys.shape[2]
    if time == 1 and not bool(first.any()):  # a step that sees the whole cache needs no mask
        o = F.scaled_dot_product_attention(queries, keys, values, scale=scale)
        return o.transpose(1, 2), cache
    place = torch.arange(total, device=q.device)
    outputs = []
    for begin in range(0, time, chunk_size):
        end = min(begin + chunk_size, time)
        length = total - time + end
        own = place[length - (end - begin) : length, None]
        visible = (place[:length] <= own) & (place[:length] >= first[:, begin:end, None])
        outputs.append(
            F.scaled_dot_product_attention(
                queries[:, :, begin:end],
                keys[:, :, :length],
                values[:, :, :length],
                attn_mask=visible[:, None],
                scale=scale,
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2), cache


def _extend(
    q: Tensor, k: Tensor, v: Tensor, reset: Tensor | None, initial_state: KVCache | None
) -> tuple[Tensor, KVCache]:
    """The first place each query sees, `[B, T]`, and the cache with k and v behind the old."""
    check_shapes(q, k, v, log_decay=None, reset=reset, initial_state=None, state_width=v.shape[-1])
    old = KVCache.empty(k, v) if initial_state is None else initial_state
    cached, (batch, _, heads) = old.key.shape[1], k.shape[:3]
    if old.key.shape != (batch, cached, heads, k.shape[-1]) or old.value.shape != (
        batch,
        cached,
        heads,
        v.shape[-1],
    ):
        raise ValueError(
            f"the cache holds keys {[*old.key.shape]} and values {[*old.value.shape]}, "
            f"which do not fit k {[*k.shape]} and v {[*v.shape]}"
        )
    first = old.start[:, None].expand(-1, k.shape[1])
    if reset is not None:
        place = torch.arange(cached, cached + k.shape[1], device=k.device)
        started = torch.where(reset, place, 0).cummax(dim=1).values
        first = torch.maximum(first, started)
    return first, KVCache(_append(old.key, k), _append(old.value, v), first[:, -1])


def _append(old: Tensor, new: Tensor) -> Tensor:
    """`[B, S + T, H, X]`, laid out in memory as `[B, H, S + T, X]`: a head is read in one go."""
    if old.shape[1] == 0:
        return new
    return torch.cat([old.transpose(1, 2), new.transpose(1, 2)], dim=2).transpose(1, 2)
