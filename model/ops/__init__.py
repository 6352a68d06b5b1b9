"""Pure functions on tensors: the recurrences, each in three forms.

The recurrent form is the definition; the other two are proven equal to it by the tests.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.ops.additive import chunked_additive, parallel_additive, recurrent_additive
from model.ops.attention import chunked_attention, parallel_attention, recurrent_attention
from model.ops.delta import chunked_delta, parallel_delta, recurrent_delta
from model.ops.wkv4 import chunked_wkv4, parallel_wkv4, recurrent_wkv4

FORMS = ("parallel", "chunked", "recurrent")


class Op(NamedTuple):
    """One recurrence. All forms take the same arguments and return `(o, final_state)`."""

    parallel: Callable[..., Any]
    chunked: Callable[..., Any]
    recurrent: Callable[..., Any]

    def form(self, name: str) -> Callable[..., Any]:
        """The form of that name, which keeps to its own precision inside autocast regions too.

        Raises:
            ValueError: if there is none.
        """
        if name not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, but is {name!r}")
        function = self[FORMS.index(name)]

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            first: Tensor = args[0] if args else kwargs["k"]
            with torch.autocast(first.device.type, enabled=False):
                return function(*args, **kwargs)

        return run


OPS = {
    "additive": Op(parallel_additive, chunked_additive, recurrent_additive),
    "delta": Op(parallel_delta, chunked_delta, recurrent_delta),
    "wkv4": Op(parallel_wkv4, chunked_wkv4, recurrent_wkv4),
    "attention": Op(parallel_attention, chunked_attention, recurrent_attention),
}
