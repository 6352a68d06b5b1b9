"""An op as something to check: every form and backend that its row has."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from model.ops import OPS, Op, native
from train.verify.definitions import DEFINITIONS
from train.verify.inputs import CASES, Case, check_arguments, make_inputs
from train.verify.running import Function, Inputs
from train.verify.situations import (
    Situation,
    causality,
    lengths,
    prefill_then_steps,
    resets,
    rows,
    splitting,
)

SMALL_CHUNK = 16
"""So that short sequences, too, have several chunks."""
SITUATIONS_OF = ("reset_state", "head_mixed_reset", "bonus_mixed_reset", "normalize_mixed")
"""Cases that are cut, continued and so on: the first, and those with arguments of their own."""
POISON = ("q", "k", "v", "a", "b", "initial_state")
"""What may be NaN in other rows: all but decays, the strongest of which chooses the blocks."""
DECAYING = ("channel_decay", "head_decay", "state")
"""Of these the first that an op can do is the one for its lengths."""


@dataclass(frozen=True)
class OpSubject:
    """One row of `model.ops.OPS`, or one like it."""

    name: str
    op: Op
    definition: Function | None = None
    """Written out independently; the recurrent form alone if there is none."""

    def __post_init__(self) -> None:
        """Refuses an op that cannot be given anything.

        Raises:
            ValueError: naming the argument.
        """
        check_arguments(self.op)

    @classmethod
    def of(cls, name: str) -> "OpSubject":
        """A row of `OPS`."""
        return cls(f"{name} op", OPS[name], DEFINITIONS.get(name))

    @property
    def forms(self) -> tuple[str, ...]:
        """Every field of the row that holds a function; native kernels where they are compiled."""
        missing = () if native.is_available() else ("native",)
        return tuple(
            n for n in self.op._fields if getattr(self.op, n) is not None and n not in missing
        )

    has_own_weights = False

    def function(self, form: str, dtype: torch.dtype, chunk_size: int | None) -> Function:
        """One form."""
        function: Callable[..., Any] = getattr(self.op, form)
        if chunk_size is not None and "chunk_size" in inspect.signature(function).parameters:
            return partial(function, chunk_size=chunk_size)
        return function

    def inputs(self, case: Case, dtype: torch.dtype) -> Inputs:
        """Random arguments, of those that the op has."""
        return make_inputs(self.op, case.reduced_to(self.op), dtype)

    def against_largest(self, dtype: torch.dtype) -> float:
        """The cases are drawn so that every gradient can stand for itself."""
        return 0.0

    def exceptions(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """None: the state of an op is in the dtype of its inputs, from float32 on."""
        return {}

    @property
    def chunk_size(self) -> int:
        """C, of the chunked form; 64 where it does not say."""
        parameter = inspect.signature(self.op.chunked).parameters.get("chunk_size")
        return int(parameter.default) if parameter is not None else 64

    def situations(self, *, full: bool) -> list[Situation]:
        """All that an op must stand."""
        cases = {name: case for name, case in CASES.items() if case.applies_to(self.op)}
        chunk = self.chunk_size
        around = [1, 2, chunk - 1, chunk, chunk + 1, 97, 1000]
        main = next(cases[name] for name in DECAYING if name in cases)
        own = [cases[name] for name in SITUATIONS_OF if name in cases]
        found = lengths(replace(main, reset=True), [time for time in around if time > 2])
        found += lengths(main, [1, 2])
        if main.decay is not None:
            cases["0 to -50 and -inf"] = replace(main, decay="to_fifty", reset=True)
        for name, case in cases.items():
            found += self._arguments(name, case, full=full)
        if self.definition is not None:
            found += [self._literally(name, case) for name, case in cases.items()]
        for case in own if full else own[:2]:
            found += self._contract(replace(case, time=37), count=4 if full else 2)
        return found

    def _arguments(self, name: str, case: Case, *, full: bool) -> list[Situation]:
        """Every combination of arguments, strong decays by themselves."""
        is_strong = case.decay not in (None, "zero", "weak", "steady")
        check = "strong decays" if is_strong else "arguments"
        times = [15, 37, 64, 257] if full else [37]
        return [
            Situation(
                check,
                f"{name}, T = {time}",
                replace(case, time=time, heads=1 if time > 200 else case.heads),
                chunk_size=SMALL_CHUNK,
            )
            for time in times
        ]

    def _literally(self, name: str, case: Case) -> Situation:
        definition = self.definition
        assert definition is not None
        return Situation(
            "definition",
            f"{name}, T = 7",
            replace(case, time=7, heads=1, key_dim=3, value_dim=5),
            expect=lambda _: definition,
        )

    def _contract(self, case: Case, count: int) -> list[Situation]:
        """What holds for any case: cuts, rows, documents, time."""
        found = [
            *splitting(case, count),
            prefill_then_steps(case),
            *causality(case, [1, 20]),
            rows(replace(case, batch=3)),
            rows(replace(case, batch=3), poison=POISON),
            resets(case, (1, 17, 18)),
            resets(case, (0, 16)),
        ]
        return [replace(situation, chunk_size=SMALL_CHUNK) for situation in found]
