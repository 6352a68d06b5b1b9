"""`ebb verify`: the proof on the command line."""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from model.layers import MIXERS
from model.ops.scores import SCORES
from model.presets import parse_mixer
from train.checkpoint import load_model
from train.progress import Display
from train.settings import at_least
from train.verify import Cell, Report, Target, verify
from train.verify.proof import AMPLE
from train.verify.workers import verify_names

T = TypeVar("T")

FEW = 2
"""Mixers that are checked before other processes would have started."""
CHECK_WIDTH = 17
ERROR_WIDTH = 7
WIDTH = 100
"""Columns that the table fits into."""


@dataclass(frozen=True)
class VerifyConfig:
    """Check every form of every mixer against its definition, token by token in float64.

    Outputs, final states and all gradients, at many lengths, cut anywhere, with resets and strong
    decays; each op, each time mixer alone, and small models of them. A checkpoint is checked with
    its own weights. The table has the largest error of each check, relative to the largest value.
    """

    checkpoint: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[CHECKPOINT ...]")
    ] = ()
    """Folders of runs, to check the models in them instead of all mixers."""
    mixers: str | None = None
    """Names with commas between, as in `ebb train`; all mixers and scores if neither these nor a
    checkpoint are given."""
    quick: bool = False
    """What fits into a minute; this is the default."""
    full: bool = False
    """Longer sequences, more combinations: some minutes."""
    threads: int | None = None
    """Processes, each with one thread, for many mixers (one a core if not given); threads for a
    checkpoint (one if not given: its tensors are mostly too small for more)."""
    json: bool = False
    """Print one JSON object instead of a table."""

    def __post_init__(self) -> None:
        """Refuses what cannot be done.

        Raises:
            ValueError: naming the setting.
        """
        if self.quick and self.full:
            raise ValueError("choose one of --quick and --full")
        at_least("threads", self.threads, 1)
        for name in self.names:
            parse_mixer(name)

    @property
    def names(self) -> list[str]:
        """The mixers that are asked for."""
        return [] if self.mixers is None else [name.strip() for name in self.mixers.split(",")]


def verify_command(config: VerifyConfig) -> None:
    """Runs `ebb verify`.

    Raises:
        ValueError: for a checkpoint that cannot be read; or, when all is printed, for an error
            beyond its tolerance.
    """
    models = [load_model(folder)[0] for folder in config.checkpoint]
    names = config.names if config.names or models else every_mixer()
    threads = config.threads or os.cpu_count() or 1
    cells: list[Cell] = []
    with Display() as display:
        if names and threads > 1 and len(names) > FEW:
            with progress(display) as advance:
                report = verify_names(names, full=config.full, processes=threads, advance=advance)
            cells, names = report.cells, []
        targets: list[Target] = [*names, *models]
        if targets:
            torch.set_num_threads(config.threads or 1 if models else 1)
            with progress(display) as advance:
                mode = "full" if config.full else "quick"
                cells += verify(*targets, mode=mode, advance=advance).cells
    report = Report(cells)
    if config.json:
        sys.stdout.write(json.dumps(report.to_dict()) + "\n")
    else:
        show(report)
    if not report.ok:
        raise ValueError(f"not proven: {report.worst.sentence()}")


@contextlib.contextmanager
def progress(display: Display) -> Iterator[Callable[[int, int, str], None]]:
    """A bar that is told with each step how much there is to do."""
    with contextlib.ExitStack() as stack:
        updates: list[Callable[[int, str], None]] = []

        def advance(done: int, total: int, name: str) -> None:
            if not updates:
                updates.append(stack.enter_context(display.noted_task("verify", total)))
            updates[0](done, name)

        yield advance


def every_mixer() -> list[str]:
    """All rows of `MIXERS`; those that take a score with each score, in each kind of state."""
    names = []
    for name, row in MIXERS.items():
        if any(field.name == "score" for field in dataclasses.fields(row.time_mix.Options)):
            names += [f"{name}:{score}" for score in SCORES]
            names += [f"{name}:{score}:constant" for score, kind in SCORES.items() if kind.exact]
        else:
            names.append(name)
    return names


def show(report: Report) -> None:
    """A table on stdout: a row for each check of each part, a column for each dtype and form."""
    dtypes, forms = (ordered(getattr(c, n) for c in report.cells) for n in ("dtype", "form"))
    found = {(cell.dtype, cell.form) for cell in report.cells}
    columns = [(dtype, form) for dtype in dtypes for form in forms if (dtype, form) in found]
    cells = {(c.part, c.check, c.dtype, c.form): c for c in report.cells}
    console = Console(file=sys.stdout, highlight=False, width=WIDTH)
    for number, part in enumerate(ordered(cell.part for cell in report.cells)):
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_header=number == 0)
        table.add_column("largest error\n", width=CHECK_WIDTH)
        for dtype, form in columns:
            heading = f"{dtype.replace('bfloat', 'bf')}\n{form}"
            table.add_column(heading, justify="right", width=max(len(form), ERROR_WIDTH))
        for check in ordered(cell.check for cell in report.cells if cell.part == part):
            row = [cells.get((part, check, *column)) for column in columns]
            table.add_row(f"  {check}", *map(entry, row))
        if number:
            console.print()
        console.print(Text(part, "bold"))
        console.print(table)
    if any(cell.widened for cell in report.cells):
        console.print(
            f"~ beyond the usual tolerance, but within {AMPLE:.0f} times what rounding the inputs "
            "once does to the definition: these weights magnify rounding in every form."
        )


def entry(cell: Cell | None) -> Text:
    """An error in one digit, `!` beyond the tolerance, `~` within a widened one."""
    if cell is None:
        return Text("")
    if cell.ok and cell.widened:
        return Text(f"{cell.error:.0e}~", "yellow")
    return Text(f"{cell.error:.0e}", "green") if cell.ok else Text(f"{cell.error:.0e}!", "bold red")


def ordered(values: Iterable[T]) -> list[T]:
    """Each once, in the order in which they come first."""
    return list(dict.fromkeys(values))
