"""PyTorch's softmax attention for CPUs, in the precision of the tensors that it is given.

`F.scaled_dot_product_attention` is the same kernel, but where products are rounded to bfloat16 it
rounds some of its many small blocks, for which that is far too slow.

Shape legend: B batch, T time, S places, H heads, K key dim.
"""

from typing import Any

import torch
from torch import Tensor

from model.ops.products import rounding_to_bf16

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _flash_now(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention where the mask allows it, or causal attention.

    Args:
        q: `[B, H, T, K]`; the last dimension of all three must be contiguous.
        k: `[B, H, S, K]`.
        v: `[B, H, S, K]`.
        mask: `[B, 1, T, S]`, added to the scores, of their dtype and without a gradient; None for
            causal attention, with S = T.
        scale: factor on the scores.

    Returns:
        o `[B, H, T, K]`, and the log of each row's sum, `[B, H, T]`, for the backward pass.
    """
    with rounding_to_bf16(on=False):
        o, log_sum = _FORWARD(q, k, v, 0.0, mask is None, attn_mask=mask, scale=scale)
    return o, log_sum


def _backward_now(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    o: Tensor,
    log_sum: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, from that of o."""
    tensors = (gradient, q, k, v, o, log_sum)
    with rounding_to_bf16(on=False):
        for_q, for_k, for_v = _BACKWARD(*tensors, 0.0, mask is None, attn_mask=mask, scale=scale)
    return for_q, for_k, for_v


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    for_q, for_k, for_v = flash_backward(gradient, *ctx.saved_tensors, ctx.scale)
    return for_q, for_k, for_v, None, None


flash = torch.library.custom_op("ebb::flash", _flash_now, mutates_args=())
flash.register_fake(_flash_now)
flash.register_autograd(_backward, setup_context=_keep_for_backward)
flash_backward = torch.library.custom_op("ebb::flash_backward", _backward_now, mutates_args=())
flash_backward.register_fake(_backward_now)
