"""Runs of anything that is `(**inputs) -> (o, state)`: an op, a layer or a whole model.

Inputs go by name, so that one run, one cut and one comparison serve all three.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.state import tensors

Inputs = dict[str, Any]
Results = dict[str, Tensor]
Function = Callable[..., tuple[Any, Any]]

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Largest difference from the float64 recurrent form, relative to its largest value."""

TIMED = ("q", "k", "v", "a", "b", "log_decay", "reset", "x", "v_first", "tokens")
"""Names of inputs with a time axis, `[B, T, ...]`."""


class Difference(NamedTuple):
    """How far a tensor is from what it should be."""

    tensor: str
    error: float
    """Relative to the largest value it should have; infinite where it cannot be measured."""
    problem: str
    """In words, with the numbers."""


def is_timed(name: str, value: Any) -> bool:
    """Whether an input has a time axis; what is one for a channel, `[D]`, has none."""
    return name in TIMED and isinstance(value, Tensor) and value.dim() > 1


def length(inputs: Inputs) -> int:
    """T."""
    return next(int(x.shape[1]) for name, x in inputs.items() if is_timed(name, x))


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The function of every tensor in a tensor or (nested) tuple; other values as they are."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        parts = (map_tensors(function, x) for x in value)
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def to_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Every floating-point tensor in that dtype; all others as they are."""
    return map_tensors(lambda x: x.to(dtype) if x.is_floating_point() else x, value)


def flatten(name: str, value: Any) -> Results:
    """The tensors in a tensor or a (nested) tuple of tensors, by name."""
    return dict(tensors(value, name)) if isinstance(value, Tensor | tuple) else {}


def all_tensors(inputs: Inputs) -> Results:
    """Those in all inputs, by name."""
    return {name: x for n, value in inputs.items() for name, x in flatten(n, value).items()}


def run(function: Function, inputs: Inputs, *, gradients: bool = True) -> Results:
    """`o`, `final_state` and, under random cotangents of both, `grad ...` of every input."""
    if not gradients:
        with torch.no_grad():
            o, state = function(**inputs)
        return {"o": o, **flatten("final_state", state)}

    def leaf(x: Tensor) -> Tensor:
        return x.detach().clone().requires_grad_(x.is_floating_point())

    leaves = {name: map_tensors(leaf, x) for name, x in inputs.items()}
    o, state = function(**leaves)
    results = {"o": o, **flatten("final_state", state)}
    generator = torch.Generator().manual_seed(1)
    outputs = [x for x in results.values() if x.requires_grad]
    cotangents = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outputs]
    wanted = {name: x for name, x in all_tensors(leaves).items() if x.requires_grad}
    slopes = torch.autograd.grad(outputs, [*wanted.values()], cotangents, materialize_grads=True)
    named = {f"grad {name}": x for name, x in zip(wanted, slopes, strict=True)}
    return {name: x.detach() for name, x in results.items()} | named


def differences(
    actual: Results,
    expected: Results,
    dtype: torch.dtype,
    *,
    against_largest: float = 0.0,
    exceptions: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> list[Difference]:
    """Every tensor's distance from what is expected, in the order of `expected`.

    Args:
        actual: what was found.
        expected: what should have been, in any dtype.
        dtype: what the floating-point tensors of `actual` must have.
        against_largest: a gradient is measured against the largest value it should have, or
            against this fraction of the largest of all gradients, if that is more.
        exceptions: tensors that have another dtype, by name.
    """
    if missing := expected.keys() ^ actual.keys():
        return [Difference(name, torch.inf, f"{name} is there once only") for name in missing]
    sizes = {name: _largest(x) for name, x in expected.items()}
    least = max((size for name, size in sizes.items() if name.startswith("grad ")), default=0.0)
    return [
        _difference(
            name,
            actual[name],
            reference,
            exceptions.get(name, dtype),
            max(sizes[name], against_largest * least if name.startswith("grad ") else 0.0),
        )
        for name, reference in expected.items()
    ]


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _difference(
    name: str, value: Tensor, reference: Tensor, dtype: torch.dtype, size: float
) -> Difference:
    """Shape, dtype and finiteness first, then values, relative to `size`."""
    wanted = dtype if reference.is_floating_point() else reference.dtype
    if value.shape != reference.shape:
        problem = f"{name} is {[*value.shape]}, not {[*reference.shape]}"
    elif value.dtype != wanted:
        problem = f"{name} is {value.dtype}, not {wanted}"
    elif not value.isfinite().all():
        problem = f"{name} is not finite"
    else:
        distance = _largest(value.to(reference.dtype) - reference)
        error = distance / size if size else (torch.inf if distance else 0.0)
        return Difference(
            name, error, f"{name} is off by {distance:.2e}, {error:.2e} of the largest value"
        )
    return Difference(name, torch.inf, problem)


def outputs_before(function: Function, cut: int) -> Function:
    """The function, less its final state and its outputs from `cut` on."""
    return lambda **inputs: (function(**inputs)[0][:, :cut], None)


def without_state(function: Function) -> Function:
    """The function, less its final state."""
    return lambda **inputs: (function(**inputs)[0], None)


def cut_time(inputs: Inputs, part: slice) -> Inputs:
    """The inputs for some of the tokens."""
    return {n: x[:, part] if is_timed(n, x) else x for n, x in inputs.items()}


def with_future(inputs: Inputs, others: Inputs, cut: int) -> Inputs:
    """The inputs with those of others from the token `cut` on."""
    return {
        name: torch.cat([x[:, :cut], others[name][:, cut:]], dim=1) if is_timed(name, x) else x
        for name, x in inputs.items()
    }


def with_other_rows(inputs: Inputs, others: Inputs) -> Inputs:
    """The inputs with all rows but the first from others; what is not in those stays."""

    def join(x: Any, other: Any) -> Any:
        if isinstance(x, tuple):
            parts = [join(mine, theirs) for mine, theirs in zip(x, other, strict=True)]
            return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
        return torch.cat([x[:1], other[1:]])

    mixed = {n: join(inputs[n], x) for n, x in others.items() if belongs_to_rows(n, x)}
    return inputs | mixed


def belongs_to_rows(name: str, value: Any) -> bool:
    """Whether an input or result has the batch as its first dimension."""
    given = name.removeprefix("grad ")
    return is_timed(given, value) or given == "o" or given.startswith(("final_", "initial_"))


def first_row(results: Results) -> Results:
    """The results of the first row of the batch, less those that all rows have in common."""
    return {name: x[:1] for name, x in results.items() if belongs_to_rows(name, x)}


def filled_with_nan(value: Any) -> Any:
    """NaN in place of all floating-point numbers."""
    return map_tensors(
        lambda x: torch.full_like(x, torch.nan) if x.is_floating_point() else x, value
    )


def in_pieces(function: Function, *places: int, then: Function | None = None) -> Function:
    """The function, run piece by piece from each place to the next with the state carried along.

    With `then`, all pieces but the first are run by that.
    """

    def pieces(*, initial_state: Any = None, **inputs: Any) -> tuple[Tensor, Any]:
        outputs, state, run_piece = [], initial_state, function
        for begin, end in pairwise((0, *places, length(inputs))):
            o, state = run_piece(**cut_time(inputs, slice(begin, end)), initial_state=state)
            outputs.append(o)
            run_piece = then or function
        return torch.cat(outputs, dim=1), state

    return pieces


def apart(function: Function, starts: tuple[int, ...]) -> Function:
    """The function, run on each of the documents that begin at these places on its own.

    What stands before the first of them goes on from the initial state.
    """

    def separate(*, initial_state: Any = None, **inputs: Any) -> tuple[Tensor, Any]:
        outputs, state = [], initial_state
        for begin, end in pairwise(sorted({0, *starts, length(inputs)})):
            state = None if begin in starts else initial_state
            o, state = function(**cut_time(inputs, slice(begin, end)), initial_state=state)
            outputs.append(o)
        return torch.cat(outputs, dim=1), state

    return separate
