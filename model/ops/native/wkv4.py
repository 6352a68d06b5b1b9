"""The wkv4 recurrence, native, as an operator of PyTorch: `wkv4.h` says what it works on.

Shape legend: B batch, T time, D width. All tensors are float64: a channel's work is two
exponentials a token, little beside the layer's matrix products, and logits need the digits.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from model.ops.native.loading import call, contiguous, pointer, refuse_second_derivative

CHUNK = 32
"""Tokens between two states that the forward pass keeps for the backward pass."""

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class _Wkv4(ctypes.Structure):
    """`Wkv4` of wkv4.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "time", "width", "chunk")),
        *((name, ctypes.c_void_p) for name in ("k", "v", "decay", "bonus", "reset")),
        *((name, ctypes.c_void_p) for name in ("num", "den", "top")),
        *((name, ctypes.c_void_p) for name in ("o", "final_num", "final_den", "final_top")),
        ("checkpoints", ctypes.c_void_p),
    )


class _Wkv4Gradient(ctypes.Structure):
    """`Wkv4Gradient` of wkv4.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("o", "final_num", "final_den", "final_top")),
        *((name, ctypes.c_void_p) for name in ("k", "v", "decay", "bonus", "num", "den", "top")),
    )


def _describe(k: Tensor, **tensors: Tensor | None) -> _Wkv4:
    pointers = {name: pointer(x) for name, x in tensors.items()}
    return _Wkv4(*k.shape, CHUNK, k=pointer(k), **pointers)


def _checkpoint_shape(k: Tensor, keep: bool) -> list[int]:
    batch, time, width = k.shape
    return [batch, -(-time // CHUNK), 3, width] if keep else [0]


def wkv4_now(
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    bonus: Tensor,
    reset: Tensor | None,
    num: Tensor,
    den: Tensor,
    top: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Runs the forward pass at once, unseen by autograd and by compilers.

    Args:
        k: `[B, T, D]`.
        v: `[B, T, D]`.
        decay: `[D]`, its log.
        bonus: `[D]`.
        reset: `[B, T]` bool.
        num: `[B, D]`, of the initial state.
        den: `[B, D]`.
        top: `[B, D]`, its `max`.
        keep: whether a backward pass will follow.

    Returns:
        o, the parts of the final state, and, empty unless `keep`, what the backward pass needs.
    """
    k, v, decay, bonus, num, den, top = (
        x.contiguous() for x in (k, v, decay, bonus, num, den, top)
    )
    o, checkpoints = torch.empty_like(v), v.new_empty(_checkpoint_shape(k, keep))
    final = [torch.empty_like(x) for x in (num, den, top)]
    read = {"v": v, "decay": decay, "bonus": bonus, "reset": contiguous(reset)}
    state = {"num": num, "den": den, "top": top}
    written = dict(zip(("final_num", "final_den", "final_top"), final, strict=True))
    arguments = _describe(k, **read, **state, o=o, **written, checkpoints=checkpoints)
    call("wkv4_forward", torch.float64, ctypes.byref(arguments))
    return o, final[0], final[1], final[2], checkpoints


wkv4_op = torch.library.custom_op("ebb::wkv4", wkv4_now, mutates_args=())


@wkv4_op.register_fake
def _(
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    bonus: Tensor,
    reset: Tensor | None,
    num: Tensor,
    den: Tensor,
    top: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    final_num, final_den, final_top = (x.new_empty(x.shape) for x in (num, den, top))
    checkpoints = v.new_empty(_checkpoint_shape(k, keep))
    return v.new_empty(v.shape), final_num, final_den, final_top, checkpoints


@torch.library.custom_op("ebb::wkv4_backward", mutates_args=())
def wkv4_backward(
    for_o: Tensor,
    for_num: Tensor,
    for_den: Tensor,
    for_top: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    bonus: Tensor,
    reset: Tensor | None,
    checkpoints: Tensor,
) -> Gradients:
    """Gradients of k, v, decay, bonus and the parts of the initial state."""
    cotangents = {"o": for_o, "final_num": for_num, "final_den": for_den, "final_top": for_top}
    read = {"v": v, "decay": decay, "bonus": bonus, "reset": reset, "checkpoints": checkpoints}
    batch, _, width = k.shape
    gradients = {name: torch.empty_like(k, memory_format=torch.contiguous_format) for name in "kv"}
    gradients |= {
        name: k.new_empty(batch, width) for name in ("decay", "bonus", "num", "den", "top")
    }
    kept = {name: contiguous(x) for name, x in (read | {"k": k}).items()}
    given = {name: x.contiguous() for name, x in cotangents.items()}
    key = kept.pop("k")
    assert key is not None
    pointers = {name: pointer(x) for name, x in gradients.items()}
    arguments = _describe(key, **kept)
    gradient = _Wkv4Gradient(*(pointer(x) for x in given.values()), **pointers)
    call("wkv4_backward", torch.float64, ctypes.byref(arguments), ctypes.byref(gradient))
    for_k, for_v, for_decay, for_bonus, for_initial_num, for_initial_den, for_initial_top = (
        gradients.values()
    )
    for_decay, for_bonus = for_decay.sum(0), for_bonus.sum(0)
    return for_k, for_v, for_decay, for_bonus, for_initial_num, for_initial_den, for_initial_top


@wkv4_backward.register_fake
def _(
    for_o: Tensor,
    for_num: Tensor,
    for_den: Tensor,
    for_top: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    bonus: Tensor,
    reset: Tensor | None,
    checkpoints: Tensor,
) -> tuple[Tensor, ...]:
    like = (k, v, decay, bonus, for_num, for_den, for_top)
    return tuple(x.new_empty(x.shape) for x in like)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    k, v, decay, bonus, reset, *_, keep = inputs
    if not keep:
        raise ValueError("ebb::wkv4 has gradients only with keep=True")
    checkpoints = output[-1]
    ctx.mark_non_differentiable(checkpoints)
    ctx.save_for_backward(k, v, decay, bonus, reset, checkpoints)


def _backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
    for_k, for_v, for_decay, for_bonus, *for_state = wkv4_backward(
        *cotangents[:4], *ctx.saved_tensors
    )
    return for_k, for_v, for_decay, for_bonus, None, *for_state, None


wkv4_op.register_autograd(_backward, setup_context=_keep_for_backward)
wkv4_backward.register_autograd(refuse_second_derivative)
