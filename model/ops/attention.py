"""Causal attention, `o_i = sum_{j <= i} w_ij v_j` with `w_i = score(scale q_i . k_j)`, in 3 forms.

With the score softmax it is the baseline (arXiv 1706.03762); `model.ops.scores` has what may stand
in its place. The state is the KV cache, the one state here that grows with T.

Shape legend: B batch, T time, S cached tokens, H heads, K key dim, V value dim, C chunk length.
"""

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from model.ops.decay import check_shapes, state_dtype
from model.ops.flash import flash
from model.ops.products import is_rounded
from model.ops.scores import SCORES, Score, find_score

AnyScore = str | Score | Callable[[Tensor], Tensor]
"""A row of `SCORES`, a score such as `polynomial(2)`, or any function from a row of visible scores
to a row of weights, `[rows, H, n] -> [rows, H, n]`."""


ROUNDED_FROM = 512
"""Keys from which on PyTorch's kernel is faster in bfloat16, both passes together."""


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
    score: AnyScore = "softmax",
    scale: float = 1.0,
    reset: Tensor | None = None,
    initial_state: KVCache | None = None,
) -> tuple[Tensor, KVCache]:
    """The definition: one token after the other reads all cached keys and values.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        score: what makes weights of the scores of the tokens that a token sees: a row of `SCORES`,
            a `Score`, or a function that is called on the visible scores of one row at a time,
            `[rows, H, n] -> [rows, H, n]` (slower).
        scale: factor on the scores `q . k`.
        reset: `[B, T]` bool, True where a token starts a document: it sees nothing before it.
        initial_state: the cache to start from; None for an empty one.

    Returns:
        o `[B, T, H, V]`, and the cache with the new tokens behind the old.

    Raises:
        ValueError: if shapes do not fit together, or there is no such score.
    """
    weigh = find_score(score)
    first, cache = _extend(q, k, v, reset, initial_state)
    dtype = state_dtype(q, k, v)
    q, keys, values = q.to(dtype), cache.key.to(dtype), cache.value.to(dtype)
    cached = keys.shape[1] - v.shape[1]
    outputs = []
    for t in range(v.shape[1]):
        length = cached + t + 1
        scores = scale * torch.einsum("bhk,bshk->bhs", q[:, t], keys[:, :length])
        visible = torch.arange(length, device=q.device) >= first[:, t, None]
        weights = weigh(scores[:, :, None], visible[:, None, None])[:, :, 0]
        outputs.append(torch.einsum("bhs,bshv->bhv", weights, values[:, :length]))
    return torch.stack(outputs, dim=1).to(v.dtype), cache


def parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    score: AnyScore = "softmax",
    scale: float = 1.0,
    reset: Tensor | None = None,
    initial_state: KVCache | None = None,
) -> tuple[Tensor, KVCache]:
    """All tokens at once: one score matrix, or PyTorch's fused attention where it is softmax.

    Arguments, results and errors as `recurrent_attention`. Where there is a cache or a reset, or
    another score than softmax, work and memory grow with T x (S + T).
    """
    return chunked_attention(
        q,
        k,
        v,
        score=score,
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
    score: AnyScore = "softmax",
    scale: float = 1.0,
    reset: Tensor | None = None,
    initial_state: KVCache | None = None,
    chunk_size: int = 512,
) -> tuple[Tensor, KVCache]:
    """As the parallel form, with matrices of no more than C x (S + T).

    For softmax they are masks, and memory grows with T where the fused kernel takes the shapes
    (K = V) and either no mask is needed or no gradient: for the backward pass the matrices of all
    chunks are kept, whatever the score. Work grows with T^2.

    Arguments, results and errors as `recurrent_attention`.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, but is {chunk_size}")
    weigh = find_score(score)
    first, cache = _extend(q, k, v, reset, initial_state)
    if weigh is SCORES["softmax"]:
        packed = reset is not None or initial_state is not None
        return _fused_softmax(q, cache, first if packed else None, scale, chunk_size), cache
    dtype = state_dtype(q, k, v)
    queries, keys, values = (
        x.to(dtype).transpose(1, 2) for x in (scale * q.to(dtype), cache.key, cache.value)
    )
    outputs = []
    for rows, visible in _row_blocks(first, keys.shape[2], chunk_size):
        length = visible.shape[-1]
        weights = weigh(queries[:, :, rows] @ keys[:, :, :length].mT, visible)
        outputs.append(weights @ values[:, :, :length])
    return torch.cat(outputs, dim=2).transpose(1, 2).to(v.dtype), cache


def _fused_softmax(
    q: Tensor, cache: KVCache, first: Tensor | None, scale: float, chunk_size: int
) -> Tensor:
    """Softmax attention `[B, T, H, V]` through PyTorch's kernel, with masks only where needed.

    Args:
        q: `[B, T, H, K]`.
        cache: keys and values, those of q's tokens at the end.
        first: `[B, T]`, the first place each query sees; None where the cache is q's tokens alone
            and one document.
        scale: factor on the scores.
        chunk_size: rows of a mask.
    """
    if scale <= 0:  # the fused kernel would multiply the -inf of its mask too
        q, scale = q * scale, 1.0
    queries, keys, values = (x.transpose(1, 2) for x in (q, cache.key, cache.value))
    if first is None:
        return _kernel(queries, keys, values, None, scale).transpose(1, 2)
    if q.shape[1] == 1 and not bool(first.any()):  # a step that sees all of it needs no mask
        o = F.scaled_dot_product_attention(queries, keys, values, scale=scale)
        return o.transpose(1, 2)
    outputs = []
    for rows, visible in _row_blocks(first, keys.shape[2], chunk_size):
        length = visible.shape[-1]
        seen = keys[:, :, :length], values[:, :, :length]
        outputs.append(_kernel(queries[:, :, rows], *seen, visible, scale))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _kernel(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """PyTorch's, on `[B, H, T, K]` and `[B, H, S, K or V]`, causal where no mask is given."""
    if not is_rounded(q) or q.shape[-1] != v.shape[-1]:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=visible is None, scale=scale
        )
    dtype = torch.bfloat16 if k.shape[2] >= ROUNDED_FROM else torch.float32
    rows = (x.to(dtype) if x.stride(-1) == 1 else x.to(dtype).contiguous() for x in (q, k, v))
    mask = None
    if visible is not None:
        mask = torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -torch.inf)
    o: Tensor = flash(*rows, mask, scale)[0]
    return o.to(q.dtype)


def _row_blocks(first: Tensor, total: int, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of up to `size` queries: which they are, and what they see, `[B, 1, size, places]`.

    Args:
        first: `[B, T]`, the first place each query sees; its own is the last.
        total: S + T, the places there are; each block reaches to its last query's.
        size: of a block.
    """
    place, time = torch.arange(total, device=first.device), first.shape[1]
    for begin in range(0, time, size):
        end = min(begin + size, time)
        length = total - time + end
        own = place[length - (end - begin) : length, None]
        visible = (place[:length] <= own) & (place[:length] >= first[:, begin:end, None])
        yield slice(begin, end), visible[:, None]


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


class _Room:
    """Memory behind a cache's tensor, for the tokens to come."""

    def __init__(self, buffer: Tensor, filled: int) -> None:
        self.buffer = buffer
        """`[B, H, capacity, X]`: a head is read in one go."""
        self.filled = filled
        """Tokens that belong to some cache and must not change."""

    def part(self) -> Tensor:
        """`[B, filled, H, X]`, which later tokens do not change."""
        view = self.buffer[:, :, : self.filled].transpose(1, 2)
        _ROOMS[view] = self
        return view


_LEAST_ROOM = 64
"""Tokens that a room has at least."""

_ROOMS: MutableMapping[Tensor, _Room] = WeakTensorKeyDictionary()
"""The room behind each cache tensor that has some; a copy of the tensor has none."""


def _append(old: Tensor, new: Tensor) -> Tensor:
    """`[B, S + T, H, X]`, with the new tokens behind the old; neither argument changes.

    Without gradients a token costs what it writes, not what is there: it goes into the room behind
    the old ones. Only the newest of all caches in a room may do so; a branch gets its own.
    """
    cached, total = old.shape[1], old.shape[1] + new.shape[1]
    if cached == 0:
        return new
    needs_gradient = torch.is_grad_enabled() and (old.requires_grad or new.requires_grad)
    if needs_gradient or torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return torch.cat([old.transpose(1, 2), new.transpose(1, 2)], dim=2).transpose(1, 2)
    room = _ROOMS.get(old)
    if room is None or room.filled != cached or total > room.buffer.shape[2]:
        batch, _, heads, width = old.shape
        buffer = old.new_empty(batch, heads, max(2 * total, _LEAST_ROOM), width)
        buffer[:, :, :cached] = old.detach().transpose(1, 2)
        room = _Room(buffer, cached)
    # `data` does not count as a change: what autograd has kept of older caches stays as it is.
    room.buffer.data[:, :, cached:total] = new.detach().transpose(1, 2)
    room.filled = total
    return room.part()
