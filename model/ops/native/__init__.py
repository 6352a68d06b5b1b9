"""Native CPU kernels of the recurrences, under the signatures of their recurrent forms.

They are compiled when the package is installed, where there is a C++ compiler. Without them the
PyTorch forms run; `status()` says which it is.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops import additive, delta
from model.ops.decay import state_dtype
from model.ops.native.loading import is_available, library, status, switched
from model.ops.native.scan import scan_now, scan_op, scan_with_gradient
from model.ops.native.wkv4 import wkv4_now, wkv4_op
from model.ops.wkv4 import WKV4State
from model.ops.wkv4 import prepare as prepare_wkv4

__all__ = [
    "is_available",
    "library",
    "native_additive",
    "native_delta",
    "native_wkv4",
    "status",
    "switched",
]


def native_additive(
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
    """`recurrent_additive`, compiled: token by token, each panel of the state in the L1 cache.

    Arguments, results and errors as `recurrent_additive`; there is no second derivative.
    """
    additive.check_arguments(q, k, v, log_decay, bonus, normalize, reset, initial_state)
    dtype = state_dtype(q, k, v)
    values = F.pad(v.to(dtype), (0, 1), value=1.0) if normalize else v
    o, state = _scan(dtype, q, k, values, None, None, log_decay, bonus, reset, initial_state, scale)
    return additive.divided(o, normalize, eps).to(v.dtype), state


def native_delta(
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
    """`recurrent_delta`, compiled: token by token, each panel of the state in the L1 cache.

    Arguments, results and errors as `recurrent_delta`; there is no second derivative.
    """
    delta.check_arguments(q, k, v, a, b, log_decay, reset, initial_state)
    dtype = state_dtype(q, k, v)
    o, state = _scan(dtype, q, k, v, a, b, log_decay, None, reset, initial_state, scale)
    return o.to(v.dtype), state


def native_wkv4(
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor,
    bonus: Tensor,
    reset: Tensor | None = None,
    initial_state: WKV4State | None = None,
) -> tuple[Tensor, WKV4State]:
    """`recurrent_wkv4`, compiled: token by token, a few channels at a time, in float64.

    Arguments, results and errors as `recurrent_wkv4`; there is no second derivative.
    """
    dtype, output_dtype = state_dtype(k, v), v.dtype
    k, v, decay, bonus, state = prepare_wkv4(k, v, log_decay, bonus, reset, initial_state)
    tensors = [k, v.double(), decay, bonus, reset, *(x.double() for x in state)]
    keep, is_plain = _needs(tensors)
    run: Any = wkv4_now if is_plain and not keep else wkv4_op
    o, *final, _ = run(*tensors, keep)
    return o.to(output_dtype), WKV4State(*(x.to(dtype) for x in final))


def _needs(tensors: list[Tensor | None]) -> tuple[bool, bool]:
    """Whether a backward pass may follow; and whether PyTorch's dispatcher can be left out.

    That is where nothing is traced: it costs more than a token.

    Raises:
        ValueError: for a tensor that is not on the CPU.
    """
    given = [x for x in tensors if x is not None]
    for x in given:
        if not x.is_cpu:
            raise ValueError(f"the native kernels need all tensors on the CPU, not on {x.device}")
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    is_plain = all(type(x) in (Tensor, torch.nn.Parameter) for x in given)
    return keep, is_plain and not torch.compiler.is_compiling()


def _scan(
    dtype: torch.dtype,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    log_decay: Tensor | None,
    bonus: Tensor | None,
    reset: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The operators, or their forward passes alone where nothing will ask for more."""
    tensors: list[Any] = [
        None if x is None else x.to(dtype) for x in (q, k, v, a, b, log_decay, bonus, initial_state)
    ]
    tensors.insert(-1, reset)
    keep, is_plain = _needs(tensors)
    run: Any = (scan_with_gradient if keep else scan_now) if is_plain else scan_op
    o, state, *_ = run(*tensors, scale, keep)
    return o, state
