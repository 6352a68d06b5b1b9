"""The scan over a matrix state, native: additive and delta recurrence as one operator of PyTorch.

`scan.h` says what it computes; where a head has one decay, it is computed by chunks, as
`chunks_forward.h` says. Shape legend: B batch, T time, H heads, G heads of q and k, K key dim,
V value dim.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.ops.native.decays import decays_now
from model.ops.native.loading import (
    call,
    contiguous,
    library,
    pointer,
    refuse_second_derivative,
)

CHUNK = 32
"""Tokens between two states that the forward pass keeps for the backward pass."""

SHORTEST_BY_CHUNKS, SMALLEST_BY_CHUNKS = 24, 2048
"""Tokens, and numbers of a state that has q and k of its own, from which on chunks are faster.

Below, half a chunk is filled up with zeros, or scores take as long as the state: measured with
64 x 64, 16 tokens 0.87 and 256 tokens 1.2 times as fast as one by one; with 256 tokens, 16 x 16
0.89, 32 x 32 0.91, 48 x 48 1.13 and 128 x 64 1.47 times, in heads that share q and k 1.8 times.
"""


class _Scan(ctypes.Structure):
    """`Scan` of scan.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "time", "heads", "key_heads")),
        *((name, ctypes.c_int64) for name in ("key_dim", "value_dim")),
        ("chunk", ctypes.c_int64),
        ("decay_channels", ctypes.c_int64),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "a", "b", "decay", "bonus")),
        ("reset", ctypes.c_void_p),
        ("initial", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("o", "final", "removed", "checkpoints")),
    )


class _ScanGradient(ctypes.Structure):
    """`ScanGradient` of scan.h."""

    _fields_ = (
        ("o", ctypes.c_void_p),
        ("final", ctypes.c_void_p),
        ("parts", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("q", "k", "a", "b", "decay", "bonus")),
        ("v", ctypes.c_void_p),
        ("initial", ctypes.c_void_p),
    )


def _describe(k: Tensor, v: Tensor, decay: Tensor | None, scale: float, **tensors: Any) -> _Scan:
    batch, time, key_heads, key_dim = k.shape
    channels = 0 if decay is None else 1 if decay.dim() == 3 else key_dim
    pointers = {
        name: pointer(x) for name, x in (tensors | {"k": k, "v": v, "decay": decay}).items()
    }
    sizes = (batch, time, v.shape[2], key_heads, key_dim, v.shape[-1], CHUNK, channels)
    return _Scan(*sizes, scale, **pointers)


def _state_shape(k: Tensor, v: Tensor) -> list[int]:
    """`[B, H, K, V]`."""
    return [v.shape[0], v.shape[2], k.shape[-1], v.shape[-1]]


def goes_by_chunks(
    k: Tensor, v: Tensor, a: Tensor | None, decay: Tensor | None, bonus: Tensor | None
) -> bool:
    """Whether products of chunks take the place of the scan, forward and backward alike."""
    _, time, key_heads, key_dim = k.shape
    is_plain = a is None and bonus is None and (decay is None or decay.dim() == 3)
    is_large = key_heads < v.shape[2] or key_dim * v.shape[3] >= SMALLEST_BY_CHUNKS
    return is_plain and is_large and time >= SHORTEST_BY_CHUNKS


def _per_thread(q: Tensor, k: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Copies for each head where there are too few groups: heads of one come after each other."""
    if k.shape[0] * k.shape[2] >= torch.get_num_threads():
        return q, k
    copied, keys = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (q, k))
    return copied, keys


def _saved_shapes(
    k: Tensor, v: Tensor, has_removal: bool, by_chunks: bool
) -> tuple[list[int], list[int]]:
    """Of what the forward pass keeps: what was removed, and the state before each chunk."""
    batch, time, _, key_dim = k.shape
    keys, padded = (-(-width // 16) * 16 for width in (key_dim, v.shape[-1]))
    rows = keys if by_chunks else key_dim
    checkpoints = [batch, v.shape[2], -(-time // CHUNK), rows, padded]
    return [*v.shape] if has_removal else [0], checkpoints


def scan_now(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    log_decay: Tensor | None,
    bonus: Tensor | None,
    reset: Tensor | None,
    initial: Tensor | None,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Runs the forward pass at once, unseen by autograd and by compilers.

    Args:
        q: `[B, T, G, K]`, each shared by H / G neighbouring heads; fewer than H only without a, b,
            bonus and a decay a channel.
        k: `[B, T, G, K]`.
        v: `[B, T, H, V]`.
        a: `[B, T, H, K]`, or None for the additive recurrence.
        b: `[B, T, H, K]`, with a.
        log_decay: `[B, T, H]` or `[B, T, H, K]`, <= 0, -inf allowed; None for no decay.
        bonus: `[H, K]`, with which the state is read before the write; not with a.
        reset: `[B, T]` bool.
        initial: `[B, H, K, V]`; None for zeros.
        scale: factor on q.
        keep: whether a backward pass will follow.

    Returns:
        o, the final state, and, empty unless `keep`, what the backward pass needs: what was
        removed, states and decays. All tensors are of one dtype, float32 or float64.
    """
    by_chunks = goes_by_chunks(k, v, a, log_decay, bonus)
    if by_chunks:
        q, k = _per_thread(q, k, v.shape[2])
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    a, b, bonus, reset, initial = map(contiguous, (a, b, bonus, reset, initial))
    decay = None if log_decay is None else decays_now(log_decay)
    o, final = torch.empty_like(v), v.new_empty(_state_shape(k, v))
    shapes = _saved_shapes(k, v, a is not None, by_chunks) if keep else ([0], [0])
    removed, checkpoints = v.new_empty(shapes[0]), v.new_empty(shapes[1])
    written = {"o": o, "final": final, "removed": removed, "checkpoints": checkpoints}
    read = {"q": q, "a": a, "b": b, "bonus": bonus, "reset": reset, "initial": initial}
    arguments = _describe(k, v, decay, scale, **read, **written)
    call("chunks_forward" if by_chunks else "scan_forward", v.dtype, ctypes.byref(arguments))
    kept = decay if keep and decay is not None else v.new_empty(0)
    return o, final, removed, checkpoints, kept


scan_op = torch.library.custom_op("ebb::scan", scan_now, mutates_args=())


@scan_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    log_decay: Tensor | None,
    bonus: Tensor | None,
    reset: Tensor | None,
    initial: Tensor | None,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    by_chunks = goes_by_chunks(k, v, a, log_decay, bonus)
    shapes = _saved_shapes(k, v, a is not None, by_chunks) if keep else ([0], [0])
    final = v.new_empty(_state_shape(k, v))
    decays = [*log_decay.shape] if keep and log_decay is not None else [0]
    removed, checkpoints, kept = (v.new_empty(shape) for shape in (*shapes, decays))
    return v.new_empty(v.shape), final, removed, checkpoints, kept


def scan_backward_now(
    for_o: Tensor,
    for_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    decay: Tensor | None,
    bonus: Tensor | None,
    reset: Tensor | None,
    removed: Tensor,
    checkpoints: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of what the forward pass takes, from q to the initial state; empty for None."""
    batch, heads, shared_shape = v.shape[0], v.shape[2], k.shape
    threads = torch.get_num_threads()
    by_chunks = goes_by_chunks(k, v, a, decay, bonus)
    q, k = _per_thread(q, k, heads)
    q, k, v, for_o = q.contiguous(), k.contiguous(), v.contiguous(), for_o.contiguous()
    a, b, decay, bonus, reset, for_final = map(contiguous, (a, b, decay, bonus, reset, for_final))
    read = {"q": q, "a": a, "b": b, "bonus": bonus, "reset": reset}
    arguments = _describe(k, v, decay, scale, **read, removed=removed, checkpoints=checkpoints)

    parts = 1
    if batch * heads < threads and not by_chunks:
        parts = library().function("panels", v.dtype)(ctypes.byref(arguments))

    def parted(x: Tensor | None) -> Tensor:
        return k.new_empty(0) if x is None else k.new_empty(parts, *x.shape)

    sums = {"q": parted(q), "k": parted(k), "a": parted(a), "b": parted(b), "decay": parted(decay)}
    for_bonus = k.new_zeros(0)
    if bonus is not None:
        for_bonus = k.new_zeros(parts, batch, *bonus.shape, dtype=torch.float64)
    for_v, for_initial = torch.empty_like(v), v.new_empty(_state_shape(k, v))
    whole = {"o": for_o, "final": for_final, "v": for_v, "initial": for_initial}
    pointers = {n: pointer(x) for n, x in (sums | whole | {"bonus": for_bonus}).items()}
    gradient = _ScanGradient(parts=parts, **pointers)
    name = "chunks_backward" if by_chunks else "scan_backward"
    call(name, v.dtype, ctypes.byref(arguments), ctypes.byref(gradient))

    def joined(x: Tensor) -> Tensor:
        return x if x.numel() == 0 else x.squeeze(0) if parts == 1 else x.sum(0)

    for_q, for_k, for_a, for_b, for_decay = map(joined, sums.values())
    if bonus is not None:
        for_bonus = for_bonus.sum((0, 1)).to(bonus.dtype)
    if k.shape != shared_shape:
        by_group = (*shared_shape[:3], -1, shared_shape[3])
        for_q, for_k = (x.reshape(by_group).sum(3) for x in (for_q, for_k))
    return for_q, for_k, for_v, for_a, for_b, for_decay, for_bonus, for_initial


scan_backward = torch.library.custom_op("ebb::scan_backward", scan_backward_now, mutates_args=())


@scan_backward.register_fake
def _(
    for_o: Tensor,
    for_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    decay: Tensor | None,
    bonus: Tensor | None,
    reset: Tensor | None,
    removed: Tensor,
    checkpoints: Tensor,
    scale: float,
) -> tuple[Tensor, ...]:
    like = (k.new_empty(0) if x is None else x.new_empty(x.shape) for x in (a, b, decay, bonus))
    for_initial = v.new_empty(_state_shape(k, v))
    return (*(x.new_empty(x.shape) for x in (q, k, v)), *like, for_initial)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, bonus, reset, initial, scale, keep = inputs
    if not keep:
        raise ValueError("ebb::scan has gradients only with keep=True")
    _, _, removed, checkpoints, decay = output
    ctx.mark_non_differentiable(removed, checkpoints, decay)
    ctx.set_materialize_grads(False)
    has_decay = inputs[5] is not None
    ctx.save_for_backward(
        *tensors, decay if has_decay else None, bonus, reset, removed, checkpoints
    )
    ctx.scale, ctx.has_initial = scale, initial is not None


def _backward(
    ctx: Any, for_o: Tensor | None, for_final: Tensor | None, *_: None
) -> tuple[Any, ...]:
    return _gradients(scan_backward, ctx, for_o, for_final)


def _gradients(
    run: Callable[..., Any], ctx: Any, for_o: Tensor | None, for_final: Tensor | None
) -> tuple[Any, ...]:
    """Of what the forward pass takes, in its order."""
    saved = ctx.saved_tensors
    if for_o is None:
        for_o = torch.zeros_like(saved[2])
    gradients = run(for_o, for_final, *saved, ctx.scale)
    given = (*(x is not None for x in saved[:7]), ctx.has_initial)
    *for_tensors, for_initial = (
        x if is_given else None for x, is_given in zip(gradients, given, strict=True)
    )
    return (*for_tensors, None, for_initial, None, None)


scan_op.register_autograd(_backward, setup_context=_keep_for_backward)
scan_backward.register_autograd(refuse_second_derivative)


class EbbScan(torch.autograd.Function):
    """The operator without PyTorch's dispatcher, which costs as much as many tokens."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        """As `scan_now`."""
        output = scan_now(*inputs)
        _keep_for_backward(ctx, inputs, output)
        return output

    @staticmethod
    def backward(
        ctx: Any, for_o: Tensor | None, for_final: Tensor | None, *_: None
    ) -> tuple[Any, ...]:
        """As `scan_backward_now`."""
        # Only where a second derivative may be asked for is the operator there to refuse it.
        run = scan_backward if torch.is_grad_enabled() else scan_backward_now
        return _gradients(run, ctx, for_o, for_final)


def scan_with_gradient(*inputs: Any) -> tuple[Tensor, ...]:
    """What `scan_now` says, seen by autograd, but not by compilers."""
    output: tuple[Tensor, ...] = EbbScan.apply(*inputs)  # type: ignore[no-untyped-call]
    return output
