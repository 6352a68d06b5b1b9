"""The additive recurrence, `S_t = diag(exp g_t) S_{t-1} + k_t v_t^T`, in three forms.

Linear transformer (arXiv 2006.16236), RetNet (2307.08621), GLA (2312.06635) and Mamba-2 (2405.21060)
read after the write, `o_t = scale q_t S_t`; RWKV-5 and 6 (2404.05892) before it, with a bonus u for
the token's own write, `o_t = scale q_t (S_{t-1} + diag(u) k_t v_t^T)`.

Shape legend: B batch, T time, H heads, K key dim, V value dim, N chunks, C chunk length.
`g` is `log_decay`, G its running sum in a chunk, E the same without the token's own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops.decay import (
    LOG_ZERO,
    Chunks,
    RunningDecay,
    Segments,
    check_shapes,
    decayed,
    state_dtype,
    strict_products,
)


def recurrent_additive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    bonus: Tensor | None = None,
    normalize: bool = False,
    scale: float = 1.0,
    reset: Tensor | None = None,
    initial_state: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The definition: one token after the other.

    Args:
        q: `[B, T, H, K]`, what to read.
        k: `[B, T, H, K]`, where to write.
        v: `[B, T, H, V]`, what to write.
        log_decay: `[B, T, H]` (one a head) or `[B, T, H, K]` (one a key channel), natural log,
            <= 0, -inf allowed; None for no decay.
        bonus: `[H, K]`, weight of the token's own write; with it the state is read before the
            write, without it after.
        normalize: divide by the sum of weights, `o_t = q_t S_t / (q_t . z_t + eps)`, with z carried
            as one more column of the state: the sum of decayed keys.
        scale: factor on q.
        reset: `[B, T]` bool, True where a token starts a document: the state is zero before it.
        initial_state: `[B, H, K, V]`, or `[B, H, K, V + 1]` with `normalize`; None for zeros.
        eps: added to the normaliser.

    Returns:
        o `[B, T, H, V]` in the dtype of v, and the final state in at least float32.

    Raises:
        ValueError: if shapes do not fit together.
    """
    q, k, values, state = _prepare(
        q, k, v, log_decay, bonus, normalize, scale, reset, initial_state
    )
    outputs = []
    for t in range(v.shape[1]):
        if reset is not None:
            state = state.masked_fill(reset[:, t, None, None, None], 0.0)
        write = k[:, t, :, :, None] * values[:, t, :, None, :]
        decay = 1.0
        if log_decay is not None:
            g = log_decay[:, t].to(state.dtype).clamp(min=LOG_ZERO)
            decay = (g if g.dim() == 3 else g[..., None]).exp()[..., None]
        if bonus is None:
            state = decay * state + write
            read = state
        else:
            read = state + bonus[:, :, None] * write
            state = decay * state + write
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], read))
    return _finish(torch.stack(outputs, dim=1), normalize, eps).to(v.dtype), state


def parallel_additive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    bonus: Tensor | None = None,
    normalize: bool = False,
    scale: float = 1.0,
    reset: Tensor | None = None,
    initial_state: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """All tokens at once, as attention is written: `o = (Q K^T * M) V` with `M_ij = exp(G_i - G_j)`.

    Work and memory grow with T squared. Arguments, results and errors as `recurrent_additive`.
    """
    return chunked_additive(
        q,
        k,
        v,
        log_decay=log_decay,
        bonus=bonus,
        normalize=normalize,
        scale=scale,
        reset=reset,
        initial_state=initial_state,
        eps=eps,
        chunk_size=max(v.shape[1], 1),
    )


def chunked_additive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    bonus: Tensor | None = None,
    normalize: bool = False,
    scale: float = 1.0,
    reset: Tensor | None = None,
    initial_state: Tensor | None = None,
    eps: float = 1e-6,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The parallel form inside chunks, the state between them: `S' = diag(exp G_C) S + (K exp(G_C - G))^T V`.

    Work and memory grow with T. Arguments, results and errors as `recurrent_additive`; the result
    does not depend on `chunk_size`.
    """
    q, k, values, state = _prepare(
        q, k, v, log_decay, bonus, normalize, scale, reset, initial_state
    )
    chunks = Chunks(v.shape[1], chunk_size, log_decay)
    decay = None if log_decay is None else RunningDecay.from_log_decay(log_decay, chunks)
    segments = None if reset is None else Segments.from_reset(reset, chunks)
    q, k, values = chunks.cut(q), chunks.cut(k), chunks.cut(values)

    read_until = None  # the exponent of a read: E before the write, G after it
    if decay is not None:
        read_until = decay.inclusive if bonus is None else decay.exclusive
    scores = strict_products([(q, read_until)], [k], decay, chunks)[0, 0]
    if segments is not None:
        scores = scores.masked_fill(~segments.same, 0.0)
    own = (q * k if bonus is None else q * k * bonus[:, None, None, :]).sum(-1, keepdim=True)
    o = scores @ values + own * values

    write, read = decayed(k, None if decay is None else decay.until_end()), decayed(q, read_until)
    if segments is not None:
        write, read = write * segments.last, read * segments.first
    writes = write.transpose(-1, -2) @ values
    before, state = _carry(state, writes, decay, segments)
    return _finish(chunks.join(o + read @ before), normalize, eps).to(v.dtype), state


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    bonus: Tensor | None,
    normalize: bool,
    scale: float,
    reset: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Checks the arguments; q (scaled), k, values and state in the state's dtype.

    With `normalize` a column of ones stands behind the values: what it gathers is z.
    """
    width = v.shape[-1] + normalize
    check_shapes(
        q,
        k,
        v,
        log_decay=log_decay,
        reset=reset,
        initial_state=initial_state,
        state_width=width,
    )
    if bonus is not None and bonus.shape != k.shape[2:]:
        raise ValueError(f"bonus must be [H, K] = {[*k.shape[2:]]}, but is {[*bonus.shape]}")
    dtype = state_dtype(q, k, v)
    batch, _, heads, key_dim = k.shape
    values = F.pad(v.to(dtype), (0, 1), value=1.0) if normalize else v.to(dtype)
    if initial_state is None:
        state = values.new_zeros(batch, heads, key_dim, width)
    else:
        state = initial_state.to(dtype)
    return q.to(dtype) * scale, k.to(dtype), values, state


def _carry(
    state: Tensor, writes: Tensor, decay: RunningDecay | None, segments: Segments | None
) -> tuple[Tensor, Tensor]:
    """The state before each chunk, `[B, H, N, K, V]`, and after the last, from `writes [B, H, N, K, V]`."""
    keep = None if decay is None else decay.total()[..., None].to(state.dtype).exp()
    if segments is not None:
        unbroken = segments.first[:, :, :, -1:]
        keep = unbroken.to(state.dtype) if keep is None else keep * unbroken
    keeps = [None] * writes.shape[2] if keep is None else keep.unbind(2)
    before = []
    for keep_chunk, write in zip(keeps, writes.unbind(2), strict=True):
        before.append(state)
        state = write + (state if keep_chunk is None else keep_chunk * state)
    return torch.stack(before, dim=2), state


def _finish(o: Tensor, normalize: bool, eps: float) -> Tensor:
    """Divides by the last column, the sum of weights, where the recurrence is normalised."""
    return o[..., :-1] / (o[..., -1:] + eps) if normalize else o
