"""The additive recurrence, `S_t = diag(exp g_t) S_{t-1} + k_t v_t^T`, in three forms.

Linear transformer (arXiv 2006.16236), RetNet (2307.08621), GLA (2312.06635) and Mamba-2
(2405.21060) read after the write, `o_t = scale q_t S_t`; RWKV-5 and 6 (2404.05892) before it, with
a bonus u for the token's own write, `o_t = scale q_t (S_{t-1} + diag(u) k_t v_t^T)`.

Shape legend: B batch, T time, H heads, K key dim, V value dim, N chunks, C chunk length.
`g` is `log_decay`, G its running sum in a chunk, E the same without the token's own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops.decay import (
    LOG_ZERO,
    Chunks,
    Decay,
    Segments,
    check_shapes,
    state_dtype,
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
        q: `[B, T, H, K]`, what to read. Fewer heads are each shared by as many neighbours of v's
            (Mamba-2's groups), without bonus and with at most one decay a head.
        k: of q's shape, where to write.
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
        decay: Tensor | float = 1.0
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
    return divided(torch.stack(outputs, dim=1), normalize, eps).to(v.dtype), state


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
    """All tokens at once, as attention is written: `o = (Q K^T * M) V`, `M_ij = exp(G_i - G_j)`.

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
    """The parallel form inside chunks, the state between them.

    `S' = diag(exp G_C) S + (K exp(G_C - G))^T V` takes the state from one chunk to the next. Work
    and memory grow with T. Arguments, results and errors as `recurrent_additive`; the result does
    not depend on `chunk_size`.
    """
    q, k, values, state = _prepare(
        q, k, v, log_decay, bonus, normalize, scale, reset, initial_state
    )
    chunks = Chunks(v.shape[1], chunk_size, log_decay)
    decay = Decay(log_decay, chunks, values.dtype)
    segments = None if reset is None else Segments.from_reset(reset, chunks)
    q, k, values = chunks.cut(q), chunks.cut(k), chunks.cut(values)

    read = decay.reader(q, after_write=bonus is None)
    o = decay.products([read], [k], segments) @ values
    if bonus is not None:
        o = o + (q * k * bonus[:, None, None, :]).sum(-1, keepdim=True) * values
    from_state, write = read.faded, decay.to_end(k)
    if segments is not None:
        from_state, write = from_state * segments.first, write * segments.last
    states, state = _carry(state, write.mT @ values, decay.over_chunk(), segments)
    return divided(chunks.join(o + from_state @ states), normalize, eps).to(v.dtype), state


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    bonus: Tensor | None,
    normalize: bool,
    reset: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    """Refuses arguments of `recurrent_additive` that do not fit together, in every form.

    Raises:
        ValueError: naming the argument.
    """
    if k.dim() == 4 and v.dim() == 4 and k.shape[2] != v.shape[2]:
        heads, shared = v.shape[2], k.shape[2]
        by_channel = log_decay is not None and log_decay.dim() == 4
        if not 0 < shared < heads or heads % shared or bonus is not None or by_channel:
            raise ValueError(
                f"q and k have {shared} heads and v has {heads}: they can be shared by a whole "
                "number of heads each, without bonus and decays of channels"
            )
        if q.shape != k.shape:
            raise ValueError(f"q must be {[*k.shape]} as k is, but is {[*q.shape]}")
        q, k = (x[:, :, :1].expand(-1, -1, heads, -1) for x in (q, k))
    check_shapes(
        q,
        k,
        v,
        log_decay=log_decay,
        reset=reset,
        initial_state=initial_state,
        state_width=v.shape[-1] + normalize,
    )
    if bonus is not None and bonus.shape != k.shape[2:]:
        raise ValueError(f"bonus must be [H, K] = {[*k.shape[2:]]}, but is {[*bonus.shape]}")


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
    check_arguments(q, k, v, log_decay, bonus, normalize, reset, initial_state)
    width = v.shape[-1] + normalize
    dtype = state_dtype(q, k, v)
    batch, _, heads, _ = v.shape
    key_dim = k.shape[-1]
    if k.shape[2] != heads:
        q, k = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (q, k))
    values = F.pad(v.to(dtype), (0, 1), value=1.0) if normalize else v.to(dtype)
    if initial_state is None:
        state = values.new_zeros(batch, heads, key_dim, width)
    else:
        state = initial_state.to(dtype)
    return q.to(dtype) * scale, k.to(dtype), values, state


def _carry(
    state: Tensor, writes: Tensor, keep: Tensor | None, segments: Segments | None
) -> tuple[Tensor, Tensor]:
    """The state before each chunk, `[B, H, N, K, V]`, and after the last.

    Args:
        state: `[B, H, K, V]`, before the first chunk.
        writes: `[B, H, N, K, V]`, what each chunk adds.
        keep: `[B, H, N, K or 1, 1]`, how it decays the state; None for not at all.
        segments: the documents, or None for one.
    """
    if keep is None:
        keep = state.new_ones(1).expand(*writes.shape[:3], 1, 1)
    if segments is not None:
        keep = keep * segments.first[:, :, :, -1:]
    before = []
    for write, kept in zip(writes.unbind(2), keep.unbind(2), strict=True):
        before.append(state)
        state = torch.addcmul(write, kept, state)
    return torch.stack(before, dim=2), state


def divided(o: Tensor, normalize: bool, eps: float) -> Tensor:
    """Divides by the last column, the sum of weights, where the recurrence is normalised."""
    return o[..., :-1] / (o[..., -1:] + eps) if normalize else o
