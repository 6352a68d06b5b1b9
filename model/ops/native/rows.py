"""Kernels over rows of `[B, T, D]`, native: one operator of PyTorch for all, with its gradient.

`rows.h` says what they work on. Shape legend: B batch, T time, H heads, K key dim, D = H K.
"""

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from model.ops.native.loading import call, library, pointer, refuse_second_derivative

PARAMETERS: dict[str, tuple[int, ...]] = {
    "shift": (2,),
    "rwkv7": (3, 4, 5, 6, 10),
    "head_norm": (2, 3, 7),
    "squared_relu": (),
    "swiglu": (),
    "norm": (1, 2),
    "convolution": (2, 3),
    "head_rms": (1,),
    "skip_norm": (3, 4),
    "head_scale": (),
}
"""The kernels in the order of rows.h, and which of their inputs are the same for all rows.

For a norm these are the inputs of its backward pass, where a sum stands in the place of its terms.
"""

MOST_INPUTS, MOST_OUTPUTS = 12, 8


def num_outputs(kernel: str, tensors: Sequence[Tensor], choice: int) -> int:
    """How many tensors `[B, T, D]` a kernel makes of these."""
    if kernel == "shift":
        return tensors[2].shape[0]
    if kernel == "rwkv7":
        return 4 if len(tensors) == 7 else 5
    return 2 if kernel == "norm" and choice else 1


class _Rows(ctypes.Structure):
    """`Rows` of rows.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "time", "heads", "head_dim")),
        *((name, ctypes.c_int64) for name in ("num_inputs", "num_cotangents", "num_outputs")),
        ("sums_width", ctypes.c_int64),
        ("choice", ctypes.c_int64),
        ("eps", ctypes.c_double),
        ("reset", ctypes.c_void_p),
        ("inputs", ctypes.c_void_p * MOST_INPUTS),
        ("cotangents", ctypes.c_void_p * MOST_OUTPUTS),
        ("outputs", ctypes.c_void_p * MOST_OUTPUTS),
        ("sums", ctypes.c_void_p),
    )


def _run(
    kernel: str,
    tensors: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    out: Sequence[Tensor],
    sums: Tensor | None,
    reset: Tensor | None,
    heads: int,
    eps: float,
    choice: int,
) -> None:
    tensors = [x.contiguous() for x in tensors]  # alive until the kernel has run
    cotangents = [x.contiguous() for x in cotangents]
    starts = None if reset is None else reset.contiguous()
    batch, time, width = tensors[0].shape
    arguments = _Rows(
        *(batch, time, heads, width // heads),
        *(len(tensors), len(cotangents), len(out), 0 if sums is None else sums.shape[1]),
        choice,
        eps,
        pointer(starts),
        (ctypes.c_void_p * MOST_INPUTS)(*map(pointer, tensors)),
        (ctypes.c_void_p * MOST_OUTPUTS)(*map(pointer, cotangents)),
        (ctypes.c_void_p * MOST_OUTPUTS)(*map(pointer, out)),
        pointer(sums),
    )
    index = 2 * list(PARAMETERS).index(kernel) + bool(cotangents)
    call("rows", tensors[0].dtype, ctypes.byref(arguments), index)


def rows_now(
    kernel: str,
    tensors: Sequence[Tensor],
    reset: Tensor | None,
    heads: int,
    eps: float,
    choice: int,
) -> list[Tensor]:
    """Runs the forward pass at once, unseen by autograd and by compilers.

    Args:
        kernel: a row of `PARAMETERS`.
        tensors: what the kernel takes, all of one dtype, the first of them `[B, T, D]`.
        reset: `[B, T]` bool.
        heads: H.
        eps: of a norm.
        choice: of a variant, where the kernel has one.

    Returns:
        Tensors `[B, T, D]`.
    """
    out = _like(kernel, tensors, reset, heads, eps, choice)
    _run(kernel, tensors, (), out, None, reset, heads, eps, choice)
    return out


def _like(
    kernel: str,
    tensors: Sequence[Tensor],
    reset: Tensor | None,
    heads: int,
    eps: float,
    choice: int,
) -> list[Tensor]:
    shape = tensors[0].shape
    return [tensors[0].new_empty(shape) for _ in range(num_outputs(kernel, tensors, choice))]


rows = torch.library.custom_op("ebb::rows", rows_now, mutates_args=())
rows.register_fake(_like)


def rows_backward_now(
    kernel: str,
    tensors: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    reset: Tensor | None,
    heads: int,
    eps: float,
    choice: int,
) -> list[Tensor]:
    """Gradients of the tensors that are not parameters, and, last, of all parameters, flat."""
    *out, sums = _gradients_like(kernel, tensors, cotangents, reset, heads, eps, choice)
    if sums.numel() == 0:
        _run(kernel, tensors, cotangents, out, None, reset, heads, eps, choice)
        return [*out, sums]
    blocks = -(-math.prod(tensors[0].shape[:2]) // library().rows_per_block())
    partial = sums.new_empty(blocks, sums.numel())
    _run(kernel, tensors, cotangents, out, partial, reset, heads, eps, choice)
    return [*out, partial.sum(0)]


def _gradients_like(
    kernel: str,
    tensors: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    reset: Tensor | None,
    heads: int,
    eps: float,
    choice: int,
) -> list[Tensor]:
    parameters = PARAMETERS[kernel]
    out = [x.new_empty(x.shape) for i, x in enumerate(tensors) if i not in parameters]
    size = sum(x.numel() for i, x in enumerate(tensors) if i in parameters)
    return [*out, tensors[0].new_empty(size)]


rows_backward = torch.library.custom_op("ebb::rows_backward", rows_backward_now, mutates_args=())
rows_backward.register_fake(_gradients_like)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    kernel, tensors, reset, heads, eps, choice = inputs
    ctx.kernel, ctx.settings = kernel, (heads, eps, choice)
    ctx.is_norm_of_sum = kernel == "norm" and choice == 1
    if ctx.is_norm_of_sum:
        tensors = [output[1], *tensors[2:]]
    ctx.save_for_backward(*tensors, *(() if reset is None else (reset,)))
    ctx.count = len(tensors)


def _gradients(run: Callable[..., Any], ctx: Any, cotangents: Sequence[Tensor]) -> list[Tensor]:
    """Of all tensors, in the order of the forward pass."""
    saved = ctx.saved_tensors  # may be asked for once only, where activations are checkpointed
    tensors, rest = saved[: ctx.count], saved[ctx.count :]
    *out, sums = run(ctx.kernel, tensors, cotangents, rest[0] if rest else None, *ctx.settings)
    gradients, begin = [], 0
    for index, tensor in enumerate(tensors):
        if index in PARAMETERS[ctx.kernel]:
            gradients.append(sums[begin : begin + tensor.numel()].view(tensor.shape))
            begin += tensor.numel()
        else:
            gradients.append(out.pop(0))
    # Both terms have the gradient of their sum.
    return [gradients[0], *gradients] if ctx.is_norm_of_sum else gradients


def _backward(ctx: Any, cotangents: list[Tensor]) -> tuple[Any, ...]:
    return None, _gradients(rows_backward, ctx, cotangents), None, None, None, None


rows.register_autograd(_backward, setup_context=_keep_for_backward)
rows_backward.register_autograd(refuse_second_derivative)


class _Direct(torch.autograd.Function):
    """The operator without PyTorch's dispatcher, which costs more than many a kernel."""

    @staticmethod
    def forward(
        ctx: Any,
        kernel: str,
        reset: Tensor | None,
        heads: int,
        eps: float,
        choice: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        out = tuple(rows_now(kernel, tensors, reset, heads, eps, choice))
        _keep_for_backward(ctx, (kernel, tensors, reset, heads, eps, choice), out)
        return out

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        # Only where a second derivative may be asked for is the operator there to refuse it.
        run = rows_backward if torch.is_grad_enabled() else rows_backward_now
        return None, None, None, None, None, *_gradients(run, ctx, cotangents)


def run_rows(
    kernel: str,
    tensors: Sequence[Tensor],
    reset: Tensor | None = None,
    heads: int = 1,
    eps: float = 0.0,
    choice: int = 0,
) -> Sequence[Tensor]:
    """What `rows_now` says, by the shortest way that does what will be asked for.

    That is the operator where something is traced, and where nothing needs a gradient the forward
    pass alone.
    """
    found: Sequence[Tensor]
    if torch.compiler.is_compiling() or any(
        type(x) not in (Tensor, torch.nn.Parameter) for x in tensors
    ):
        found = rows(kernel, tensors, reset, heads, eps, choice)
    elif torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        found = _Direct.apply(kernel, reset, heads, eps, choice, *tensors)  # type: ignore[no-untyped-call]
    else:
        found = rows_now(kernel, tensors, reset, heads, eps, choice)
    return found
