"""The situations in which a function must agree with its definition, whatever it is.

A situation says what is given to the form under test and what is done with it (cut into pieces,
fed another future), and what is done with the definition to know the right answer.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from train.verify.inputs import Case
from train.verify.running import (
    Function,
    Inputs,
    Results,
    apart,
    filled_with_nan,
    first_row,
    in_pieces,
    outputs_before,
    with_future,
    with_other_rows,
    without_state,
)


class Subject(Protocol):
    """What is checked: `(**inputs) -> (o, state)` in several forms, the recurrent one its law."""

    @property
    def name(self) -> str:
        """Of this part, such as `rwkv7 layer`."""

    @property
    def forms(self) -> tuple[str, ...]:
        """All of them."""

    @property
    def has_own_weights(self) -> bool:
        """Whether its weights are a user's, which may magnify rounding, and not drawn for this."""

    def function(self, form: str, dtype: torch.dtype, chunk_size: int | None) -> Function:
        """One form."""

    def inputs(self, case: Case, dtype: torch.dtype) -> Inputs:
        """What to give it; the same numbers in float32 and float64."""

    def against_largest(self, dtype: torch.dtype) -> float:
        """The fraction of the largest gradient that others are measured against at least."""

    def exceptions(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """Results that have another dtype, by name."""

    def situations(self, *, full: bool) -> list["Situation"]:
        """What to check."""


def _as_it_is(function: Function, recurrent: Function) -> Function:
    return function


def _given(subject: Subject, case: Case, dtype: torch.dtype) -> Inputs:
    return subject.inputs(case, dtype)


@dataclass(frozen=True)
class Situation:
    """One check in one case."""

    check: str
    """The row of the report that it belongs to."""
    detail: str
    """What is particular about it."""
    case: Case
    given: Callable[[Subject, Case, torch.dtype], Inputs] = _given
    """What the form under test gets; the definition gets the subject's inputs as they are."""
    change: Callable[[Function, Function], Function] = _as_it_is
    """What is done with the form under test; the second argument is the recurrent form."""
    expect: Callable[[Function], Function] | None = None
    """What is done with the definition; None for nothing."""
    compared: Callable[[Results], Results] | None = None
    """The part of the results that is compared; None for all."""
    gradients: bool = True
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32)
    forms: tuple[str, ...] | None = None
    """None for all."""
    chunk_size: int | None = None
    """None for the op's own."""
    tolerance: float | None = None
    """None for that of the dtype."""

    def is_trivial(self, form: str, dtype: torch.dtype) -> bool:
        """Whether the definition would be compared with itself."""
        same = self.given is _given and self.change is _as_it_is and self.expect is None
        return same and form == "recurrent" and dtype == torch.float64


def lengths(case: Case, times: list[int], **settings: int) -> list[Situation]:
    """All results at each length; a quarter as many numbers from 256 tokens on."""
    return [
        Situation("lengths", f"T = {time}", _shorter(replace(case, time=time)), **settings)  # type: ignore[arg-type]  # only chunk_size
        for time in times
    ]


def _shorter(case: Case) -> Case:
    return replace(case, heads=1, batch=min(case.batch, 2)) if case.time > 200 else case


def splitting(case: Case, count: int, steps: int = 6) -> list[Situation]:
    """The state is carried over random cuts, and over each of some steps."""
    generator = torch.Generator().manual_seed(case.time)
    found = []
    for number in range(count):
        cuts = torch.randperm(case.time - 1, generator=generator)[: 1 + number] + 1
        found.append(_split(case, *sorted(cuts.tolist())))
    short = replace(case, time=steps)
    return [*found, _split(short, *range(1, short.time))]


def _split(case: Case, *places: int) -> Situation:
    return Situation(
        "split",
        f"T = {case.time}, cut at {', '.join(map(str, places))}",
        case,
        change=lambda function, _: in_pieces(function, *places),
    )


def prefill_then_steps(case: Case, steps: int = 4) -> Situation:
    """One pass over nearly all tokens, then the recurrent form, a token at a time."""
    places = range(case.time - steps, case.time)
    return Situation(
        "prefill + steps",
        f"T = {case.time}, {steps} steps",
        case,
        change=lambda function, recurrent: in_pieces(function, *places, then=recurrent),
    )


def causality(case: Case, cuts: list[int]) -> list[Situation]:
    """Other tokens after the cut change no output before it, and get no gradient from there."""

    def changed(cut: int) -> Callable[[Subject, Case, torch.dtype], Inputs]:
        def given(subject: Subject, case: Case, dtype: torch.dtype) -> Inputs:
            inputs = subject.inputs(case, dtype)
            others = subject.inputs(replace(case, seed=case.seed + 1), dtype)
            return with_future(inputs, others, cut)

        return given

    def before(cut: int) -> Situation:
        return Situation(
            "causality",
            f"T = {case.time}, other tokens from {cut} on",
            case,
            given=changed(cut),
            change=lambda function, _: outputs_before(function, cut),
            expect=lambda function: outputs_before(function, cut),
        )

    return [before(cut) for cut in cuts]


def rows(case: Case, *, poison: tuple[str, ...] = ()) -> Situation:
    """What the other rows of a batch hold does not reach the first: other numbers, or NaN.

    What all rows share (bonus, parameters) has a gradient from all of them; it is not compared.

    Args:
        case: the first row's.
        poison: the inputs that are NaN in the other rows; none of them for other numbers.
    """

    def given(subject: Subject, case: Case, dtype: torch.dtype) -> Inputs:
        inputs = subject.inputs(case, dtype)
        others = subject.inputs(replace(case, seed=case.seed + 1), dtype)
        if poison:
            others = {n: filled_with_nan(x) for n, x in inputs.items() if n in poison}
        return with_other_rows(inputs, others)

    kind = f"NaN as {', '.join(poison)} of the others" if poison else "other rows"
    return Situation(
        "rows apart", f"T = {case.time}, {kind}", case, given=given, compared=first_row
    )


def resets(case: Case, starts: tuple[int, ...]) -> Situation:
    """Documents in one sequence are as each of them run apart, and so is what goes on after them.

    The final state is judged by the outputs of a continuation: it may keep what it hides.
    """
    going_on = case.time - 5
    assert max(starts) < going_on

    def given(subject: Subject, case: Case, dtype: torch.dtype) -> Inputs:
        reset = torch.zeros(case.batch, case.time, dtype=torch.bool)
        reset[:, list(starts)] = True
        return subject.inputs(case, dtype) | {"reset": reset}

    return Situation(
        "resets",
        f"T = {case.time}, documents from {', '.join(map(str, starts))}",
        replace(case, reset=False),
        given=given,
        change=lambda function, _: without_state(in_pieces(function, going_on)),
        expect=lambda function: without_state(apart(function, starts)),
    )
