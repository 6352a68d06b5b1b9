"""The delta recurrence, `S_t = (diag(exp g_t) + b_t a_t^T) S_{t-1} + k_t v_t^T`, in three forms.

"Diagonal plus low rank": `a_t` says what to read out of the state, `b_t` where to put it back,
`o_t = scale q_t S_t`. DeltaNet (arXiv 2102.11174, 2406.06484), Gated DeltaNet (2412.06464) and
RWKV-7 (2503.14456) are this with their own g, a and b.

Shape legend: B batch, T time, H heads, K key dim, V value dim, N chunks, C chunk length.
`g` is `log_decay`, G its running sum in a chunk, E the same without the token's own.
"""

import torch
from einops import rearrange
from torch import Tensor

from model.ops.decay import (
    LOG_ZERO,
    Chunks,
    Decay,
    Segments,
    check_shapes,
    state_dtype,
)


def recurrent_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor | None = None,
    scale: float = 1.0,
    reset: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition: one token after the other.

    Args:
        q: `[B, T, H, K]`, what to read.
        k: `[B, T, H, K]`, where to write.
        v: `[B, T, H, V]`, what to write.
        a: `[B, T, H, K]`, what to remove: `a_t^T S_{t-1}` is read out of the old state ...
        b: `[B, T, H, K]`, ... and written back along b.
        log_decay: `[B, T, H]` (one a head) or `[B, T, H, K]` (one a key channel), natural log,
            <= 0, -inf allowed; None for no decay.
        scale: factor on q.
        reset: `[B, T]` bool, True where a token starts a document: the state is zero before it.
        initial_state: `[B, H, K, V]`; None for zeros.

    Returns:
        o `[B, T, H, V]` in the dtype of v, and the final state `[B, H, K, V]` in at least float32.

    Raises:
        ValueError: if shapes do not fit together.
    """
    output_dtype = v.dtype
    q, k, v, a, b, state = _prepare(q, k, v, a, b, log_decay, scale, reset, initial_state)
    outputs = []
    for t in range(v.shape[1]):
        if reset is not None:
            state = state.masked_fill(reset[:, t, None, None, None], 0.0)
        removed = torch.einsum("bhk,bhkv->bhv", a[:, t], state)
        if log_decay is not None:
            g = log_decay[:, t].to(state.dtype).clamp(min=LOG_ZERO)
            state = (g if g.dim() == 3 else g[..., None]).exp()[..., None] * state
        state = state + b[:, t, :, :, None] * removed[:, :, None, :]
        state = state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, dim=1).to(output_dtype), state


def parallel_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor | None = None,
    scale: float = 1.0,
    reset: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """All tokens at once: one triangular system of T equations, solved by forward substitution.

    Work and memory grow with T squared. It is solved in float64: what was written and what was
    removed are summed apart here, and where they cancel float32 is off by 1e-5 at T = 1000.

    Arguments, results and errors as `recurrent_delta`.
    """
    o, state = chunked_delta(
        *(x.double() for x in (q, k, v)),
        a=a.double(),
        b=b.double(),
        log_decay=log_decay,
        scale=scale,
        reset=reset,
        initial_state=initial_state,
        chunk_size=max(v.shape[1], 1),
    )
    return o.to(v.dtype), state.to(state_dtype(q, k, v))


def chunked_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor | None = None,
    scale: float = 1.0,
    reset: Tensor | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int = 32,
) -> tuple[Tensor, Tensor]:
    """The parallel form inside chunks, the state between them.

    With `u_i = a_i^T S_{i-1}`, what token i removes, a chunk that starts from the state S obeys
    `u = A_ab u + A_ak V + (a exp E) S`, so `u = U + W S` with `[U, W]` the solution of a unit lower
    triangular system; then `O = A_qk V + A_qb u + (q exp G) S` and
    `S' = diag(exp G_C) S + (K exp(G_C - G))^T V + (B exp(G_C - G))^T u` (arXiv 2406.06484, section
    3, extended by the decay). Work and memory grow with T.

    Arguments, results and errors as `recurrent_delta`; the result does not depend on `chunk_size`.
    """
    output_dtype, width = v.dtype, v.shape[-1]
    q, k, v, a, b, state = _prepare(q, k, v, a, b, log_decay, scale, reset, initial_state)
    chunks = Chunks(v.shape[1], chunk_size, log_decay)
    decay = Decay(log_decay, chunks, v.dtype)
    segments = None if reset is None else Segments.from_reset(reset, chunks)
    q, k, v, a, b = (chunks.cut(x) for x in (q, k, v, a, b))

    read, remove = decay.reader(q, after_write=True), decay.reader(a, after_write=False)
    products = decay.products([read, remove], [k, b], segments)
    for_q, for_a = rearrange(products, "b h n (r i) j -> r b h n i j", r=2)
    a_ak, a_ab = for_a.chunk(2, dim=-1)
    from_state, removed_from_state = read.faded, remove.faded
    write, put_back = decay.to_end(k), decay.to_end(b)
    if segments is not None:
        from_state, removed_from_state = (
            x * segments.first for x in (from_state, removed_from_state)
        )
        write, put_back = write * segments.last, put_back * segments.last

    solution = torch.linalg.solve_triangular(
        -a_ab, torch.cat([a_ak @ v, removed_from_state], -1), upper=False, unitriangular=True
    )
    widths = [width, k.shape[-1]]
    put_back_values, transition = torch.split(put_back.mT @ solution, widths, dim=-1)
    states, state = _carry(
        state, write.mT @ v + put_back_values, transition, decay.over_chunk(), segments
    )
    removed_values, weights = torch.split(solution, widths, dim=-1)
    removed = removed_values + weights @ states
    o = for_q @ torch.cat([v, removed], dim=-2) + from_state @ states
    return chunks.join(o).to(output_dtype), state


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor | None,
    reset: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    """Refuses arguments of `recurrent_delta` that do not fit together, in every form.

    Raises:
        ValueError: naming the argument.
    """
    check_shapes(
        q,
        k,
        v,
        like_k=(("a", a), ("b", b)),
        log_decay=log_decay,
        reset=reset,
        initial_state=initial_state,
        state_width=v.shape[-1],
    )


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor | None,
    scale: float,
    reset: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Checks the arguments; q (scaled), k, v, a, b and state in the state's dtype."""
    check_arguments(q, k, v, a, b, log_decay, reset, initial_state)
    dtype = state_dtype(q, k, v)
    q, k, v, a, b = (x.to(dtype) for x in (q, k, v, a, b))
    if initial_state is None:
        batch, _, heads, key_dim = k.shape
        state = v.new_zeros(batch, heads, key_dim, v.shape[-1])
    else:
        state = initial_state.to(dtype)
    return q * scale, k, v, a, b, state


def _carry(
    state: Tensor,
    writes: Tensor,
    transition: Tensor,
    keep: Tensor | None,
    segments: Segments | None,
) -> tuple[Tensor, Tensor]:
    """The state before each chunk, `[B, H, N, K, V]`, and after the last.

    Args:
        state: `[B, H, K, V]`, before the first chunk.
        writes: `[B, H, N, K, V]`, what each chunk adds whatever the state.
        transition: `[B, H, N, K, K]`, how it moves the state beside decaying it.
        keep: `[B, H, N, K or 1, 1]`, how it decays the state; None for not at all.
        segments: the documents, or None for one.
    """
    if keep is None:
        keep = state.new_ones(1).expand(*writes.shape[:3], 1, 1)
    if segments is not None:
        keep = keep * segments.first[:, :, :, -1:]
    before = []
    for write, matrix, kept in zip(*(x.unbind(2) for x in (writes, transition, keep)), strict=True):
        before.append(state)
        state = torch.addcmul(write, kept, state) + matrix @ state
    return torch.stack(before, dim=2), state
