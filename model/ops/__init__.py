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
        def run(q: Tensor, *args: Any, **kwargs: Any) -> Any:
            with torch.autocast(q.device.type, enabled=False):
                return function(q, *args, **kwargs)

        return run


OPS = {
    "additive": Op(parallel_additive, chunked_additive, recurrent_additive),
    "delta": Op(parallel_delta, chunked_delta, recurrent_delta),
    "attention": Op(parallel_attention, chunked_attention, recurrent_attention),
}
