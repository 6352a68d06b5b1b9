"""Runs side by side while they train: a table, a row a run, with the course of its loss."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from train import checkpoint as files
from train.metrics import read_metrics

BARS = "▁▂▃▄▅▆▇█"
LEAST_WIDTH, WIDTH = 8, 24
"""Characters of the course of a loss; where there is not even the least, it is left out."""
HEAD = ("run", "step", "tok/s", "loss", "val bits/B")
GAP = 2
"""Spaces between columns."""
BROKEN_OFF = "diverged"
"""Stands in the place of the loss."""


class RunTable:
    """Read from the runs' own metrics, so that it shows what has been done, by whichever process.

    Args:
        runs: folder and number of steps of each, by the name to show.
    """

    def __init__(self, runs: Mapping[str, tuple[Path, int]]) -> None:
        self._runs = runs
        self._read: dict[Path, tuple[int, list[dict[str, Any]]]] = {}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table as it is now, in the width that there is."""
        rows = [(name, *self._cells(name)) for name in self._runs]
        widths = [
            max(cell_len(text) for text in column) for column in zip(HEAD, *rows, strict=True)
        ]
        room = options.max_width - sum(widths) - GAP * len(HEAD)
        table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="dim")
        table.add_column(HEAD[0], overflow="fold")
        for name in HEAD[1:]:
            table.add_column(name, justify="right", no_wrap=True)
        has_course = room >= LEAST_WIDTH
        if has_course:
            table.add_column("", no_wrap=True)
        for name, *cells in rows:
            course = [sparkline(self._losses(name), min(WIDTH, room))] if has_course else []
            table.add_row(*(Text(text) for text in (name, *cells, *course)))
        yield table

    def line(self, name: str) -> str:
        """The row of one run, for where there is no table."""
        step, _, loss, bits = self._cells(name)
        words = [f"step {step}", sparkline(self._losses(name)), f"loss {loss}" if loss else ""]
        if loss == BROKEN_OFF:
            words[-1] = loss
        validation = f", validation {bits} bits/byte" if bits else ""
        return "  ".join(word for word in words if word) + validation

    def _cells(self, name: str) -> tuple[str, str, str, str]:
        folder, steps = self._runs[name]
        lines = self._lines(folder)
        is_over = (folder / files.DIVERGED).exists()
        return (
            f"{lines[-1]['step'] if lines else 0:,}/{steps:,}",
            _last(lines, "tokens_per_second", ",.0f"),
            BROKEN_OFF if is_over else _last(lines, "loss", ".3f"),
            _last(lines, "validation_bits_per_byte", ".3f"),
        )

    def _losses(self, name: str) -> list[float]:
        """All that are numbers."""
        lines = self._lines(self._runs[name][0])
        return [line["loss"] for line in lines if math.isfinite(line.get("loss", math.nan))]

    def _lines(self, folder: Path) -> list[dict[str, Any]]:
        """Read again only when the file has changed: a live display asks some times a second."""
        path = folder / files.METRICS
        size = path.stat().st_size if path.exists() else 0
        if folder not in self._read or self._read[folder][0] != size:
            self._read[folder] = size, read_metrics(path)
        return self._read[folder][1]


def sparkline(values: Sequence[float], width: int = WIDTH) -> str:
    """`[3, 2, 1]` -> `█▅▁`: bars between the lowest and the highest, means where there are many."""
    if not values:
        return ""
    count = min(width, len(values))
    edges = [len(values) * n // count for n in range(count + 1)]
    means = [fmean(values[a:b]) for a, b in pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    top = len(BARS) - 1
    return "".join(BARS[round(top * (mean - low) / span) if span else 0] for mean in means)


def _last(lines: Sequence[Mapping[str, Any]], key: str, style: str) -> str:
    """The newest value of that key; empty before the first."""
    return next((format(line[key], style) for line in reversed(lines) if key in line), "")
