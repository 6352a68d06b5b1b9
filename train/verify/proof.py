"""Cells of a proof: how far each form is from the definition, in each dtype and situation."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from train.verify.derivatives import STEPS, against_finite_differences
from train.verify.derivatives import TOLERANCE as SLOPE_TOLERANCE
from train.verify.inputs import Case
from train.verify.running import (
    TOLERANCE,
    Difference,
    Results,
    differences,
    map_tensors,
    run,
    to_dtype,
)
from train.verify.situations import Situation, Subject

T = TypeVar("T")

ALL_TOLERANCES = {**TOLERANCE, torch.bfloat16: 5e-2}
"""bfloat16 has two digits and a half: what is asked of it is of another kind."""


AMPLE = 10.0
"""Measured: a float32 error is up to 5 times what one rounding of the inputs does."""


SMALL = Case(time=4, batch=1, decay="weak", state=True, heads=1, key_dim=3, value_dim=5)
"""For slopes: each input takes two more runs."""
DRAWS = 4


class Key(NamedTuple):
    """Where a cell stands."""

    part: str
    """What was checked, such as `rwkv7 layer`."""
    check: str
    form: str
    dtype: str


@dataclass(frozen=True)
class Cell:
    """The largest error of a form in all situations of a check."""

    part: str
    check: str
    form: str
    dtype: str
    error: float
    """Relative to the largest value; infinite where it could not be measured."""
    tolerance: float
    worst: str
    """Where the largest error was found, in words."""
    widened: bool = False
    """Whether the tolerance is that of a checkpoint's own weights, which magnify rounding."""

    @property
    def ok(self) -> bool:
        """Whether the error is within the tolerance; NaN never is."""
        return self.error <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; an error that could not be measured is null."""
        measured = self.error < torch.inf
        return {**vars(self), "error": self.error if measured else None, "ok": self.ok}

    def sentence(self) -> str:
        """What is wrong, in one line."""
        return f"{self.part}, {self.check}, {self.form} form in {self.dtype}: {self.worst}"


@dataclass(frozen=True)
class Report:
    """What was found."""

    cells: list[Cell]

    @property
    def ok(self) -> bool:
        """Whether every cell is within its tolerance."""
        return all(cell.ok for cell in self.cells)

    @property
    def worst(self) -> Cell:
        """The cell that is farthest beyond its tolerance, or nearest to it."""
        return max(self.cells, key=lambda cell: cell.error / cell.tolerance)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"ok": self.ok, "cells": [cell.to_dict() for cell in self.cells]}


def prove(
    subject: Subject,
    dtypes: tuple[torch.dtype, ...],
    *,
    full: bool,
    advance: Callable[[], None] = lambda: None,
) -> list[Cell]:
    """All cells of a subject, by check.

    Args:
        subject: what to check.
        dtypes: to check it in.
        full: more situations, and longer ones.
        advance: called after each situation.
    """
    worst: dict[Key, Cell] = {}
    for situation in subject.situations(full=full):
        for cell in _cells(subject, situation, dtypes):
            key = Key(cell.part, cell.check, cell.form, cell.dtype)
            if key not in worst or _is_worse(cell, worst[key]):
                worst[key] = cell
        advance()
    cells = [*worst.values()]
    return [*cells, _slopes(subject)] if torch.float64 in dtypes else cells


def _is_worse(cell: Cell, other: Cell) -> bool:
    """Whether it is beyond its tolerance and the other is not, or else has the larger error."""
    if cell.ok != other.ok:
        return other.ok
    return not cell.error <= other.error


def _cells(
    subject: Subject, situation: Situation, dtypes: tuple[torch.dtype, ...]
) -> Iterator[Cell]:
    expectations: dict[bool, Results | str] = {}
    for dtype in situation.dtypes:
        if dtype not in dtypes:
            continue
        coarse = dtype == torch.bfloat16  # the numbers are others than those of the other two
        if coarse not in expectations:
            expectations[coarse] = _attempt(partial(_expected, subject, situation, dtype))
        for form in situation.forms or subject.forms:
            if situation.is_trivial(form, dtype):
                continue
            tolerance = situation.tolerance or ALL_TOLERANCES[dtype]
            found = _worst(subject, situation, form, dtype, expectations[coarse])
            own = 0.0
            if tolerance < found.error < torch.inf and subject.has_own_weights:
                own = AMPLE * _conditioning(subject, situation, dtype, found.tensor)
            yield Cell(
                subject.name,
                situation.check,
                form,
                str(dtype).removeprefix("torch."),
                found.error,
                max(tolerance, own),
                f"{found.problem} ({situation.detail})",
                widened=own > tolerance,
            )


def _expected(
    subject: Subject, situation: Situation, dtype: torch.dtype, moved: int = 0
) -> Results:
    """What the definition says in float64 of inputs that `dtype` holds.

    With `moved`, of inputs off by a rounding of `dtype`; each number but 0 draws other roundings.
    """
    definition = subject.function("recurrent", torch.float64, situation.chunk_size)
    if situation.expect is not None:
        definition = situation.expect(definition)
    inputs = subject.inputs(situation.case, dtype)
    inputs = {name: to_dtype(x, torch.float64) for name, x in inputs.items()}
    if moved:
        generator = torch.Generator().manual_seed(moved)
        unit = torch.finfo(dtype).eps / 2

        def rounded(x: Tensor) -> Tensor:
            if not x.is_floating_point():
                return x
            return x * (1 + unit * torch.randn(x.shape, generator=generator, dtype=x.dtype))

        inputs = {name: map_tensors(rounded, x) for name, x in inputs.items()}
    results = run(definition, inputs, gradients=situation.gradients)
    return results if situation.compared is None else situation.compared(results)


def _conditioning(subject: Subject, situation: Situation, dtype: torch.dtype, tensor: str) -> float:
    """How far rounding the inputs once moves what the definition says of a tensor, relatively.

    No form can be nearer to the definition than its inputs are.
    """
    exact = _expected(subject, situation, dtype)
    against_largest = subject.against_largest(dtype)
    moved = [
        difference.error
        for draw in (1, 2)
        for difference in differences(
            _expected(subject, situation, dtype, draw),
            exact,
            torch.float64,
            against_largest=against_largest,
        )
        if difference.tensor == tensor
    ]
    return max(moved)


def _found(subject: Subject, situation: Situation, form: str, dtype: torch.dtype) -> Results:
    """What a form says."""
    function, recurrent = (
        subject.function(name, dtype, situation.chunk_size) for name in (form, "recurrent")
    )
    inputs = situation.given(subject, situation.case, dtype)
    results = run(situation.change(function, recurrent), inputs, gradients=situation.gradients)
    return results if situation.compared is None else situation.compared(results)


def _worst(
    subject: Subject,
    situation: Situation,
    form: str,
    dtype: torch.dtype,
    expected: Results | str,
) -> Difference:
    """The largest difference between what a form says and what is expected."""
    if isinstance(expected, str):
        return Difference("", torch.inf, f"the definition fails: {expected}")
    found = _attempt(partial(_found, subject, situation, form, dtype))
    if isinstance(found, str):
        return Difference("", torch.inf, f"it fails: {found}")
    compared = differences(
        found,
        expected,
        dtype,
        against_largest=subject.against_largest(dtype),
        exceptions=subject.exceptions(dtype),
    )
    return max(compared, key=lambda difference: difference.error)


def _slopes(subject: Subject) -> Cell:
    """The definition's gradients against finite differences.

    A function may bend between the points (relu, or a small eps below a sum): then they are moved
    together, or other numbers are drawn, which does not give back a gradient that is lost.
    """
    found = Difference("", torch.inf, "")
    for seed, step in itertools.product(range(DRAWS), STEPS):
        attempt = _attempt(partial(_slope, subject, replace(SMALL, seed=seed), step))
        if isinstance(attempt, str):
            attempt = Difference("", torch.inf, f"the definition fails: {attempt}")
        found = min(attempt, found, key=lambda difference: difference.error)
        if found.error <= SLOPE_TOLERANCE:
            break
    return Cell(
        subject.name,
        "slopes",
        "recurrent",
        "float64",
        found.error,
        SLOPE_TOLERANCE,
        found.problem,
    )


def _slope(subject: Subject, case: Case, step: float) -> Difference:
    function = subject.function("recurrent", torch.float64, None)
    return against_finite_differences(function, subject.inputs(case, torch.float64), step)


def _attempt(work: Callable[[], T]) -> T | str:
    """The result, or what went wrong: a crash of what is checked is a finding, not an end."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001  # whatever a user's code may raise
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"
