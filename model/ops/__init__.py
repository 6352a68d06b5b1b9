"""Pure functions on tensors: the recurrences, each in three forms.

The recurrent form is the definition; the other two are proven equal to it by the tests, and so are
the native kernels, which take the chunked form's place on a CPU.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.ops import native
from model.ops.additive import chunked_additive, parallel_additive, recurrent_additive
from model.ops.attention import chunked_attention, parallel_attention, recurrent_attention
from model.ops.delta import chunked_delta, parallel_delta, recurrent_delta
from model.ops.wkv4 import chunked_wkv4, parallel_wkv4, recurrent_wkv4

FORMS = ("parallel", "chunked", "recurrent")
BACKENDS = ("auto", "torch", "native")


class Op(NamedTuple):
    """One recurrence. All forms take the same arguments and return `(o, final_state)`."""

    parallel: Callable[..., Any]
    chunked: Callable[..., Any]
    recurrent: Callable[..., Any]
    native: Callable[..., Any] | None = None
    """Compiled for the CPU, where there is such a kernel: another way to run the chunked form."""

    def form(self, name: str, backend: str = "auto") -> Callable[..., Any]:
        """The form of that name, which keeps to its own precision inside autocast regions too.

        Args:
            name: one of FORMS.
            backend: `torch` for PyTorch; `native` for the compiled kernels, which have a chunked
                form only, and no second derivative; `auto` for these where they are compiled, the
                tensors are on the CPU and no `chunk_size` is asked for, and else for PyTorch.

        Raises:
            ValueError: if there is none.
        """
        if name not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, but is {name!r}")
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, but is {backend!r}")
        function: Callable[..., Any] = (self.parallel, self.chunked, self.recurrent)[
            FORMS.index(name)
        ]
        compiled: Callable[..., Any] | None = None
        if backend == "native":
            if name != "chunked" or self.native is None:
                raise ValueError(
                    "there are native kernels only for the chunked form of recurrences"
                )
            native.library()
            function = self.native
        elif backend == "auto" and name == "chunked" and native.is_available():
            compiled = self.native

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            first: Tensor = args[0] if args else kwargs["k"]
            chosen = function
            if compiled and first.device.type == "cpu" and "chunk_size" not in kwargs:
                chosen = compiled
            with torch.autocast(first.device.type, enabled=False):
                return chosen(*args, **kwargs)

        return run


OPS = {
    "additive": Op(parallel_additive, chunked_additive, recurrent_additive, native.native_additive),
    "delta": Op(parallel_delta, chunked_delta, recurrent_delta, native.native_delta),
    "wkv4": Op(parallel_wkv4, chunked_wkv4, recurrent_wkv4, native.native_wkv4),
    "attention": Op(parallel_attention, chunked_attention, recurrent_attention),
}
