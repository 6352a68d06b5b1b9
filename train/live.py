"""Runs side by side while they train: a table, a row a run, with the course of its loss."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from train import checkpoint as files
from train.metrics import read_metrics

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 24
"""Characters of the course of a loss."""


class RunTable:
    """Read from the runs' own metrics, so that it shows what has been done, by whichever process.

    Args:
        runs: folder and number of steps of each, by the name to show.
    """

    def __init__(self, runs: Mapping[str, tuple[Path, int]]) -> None:
        self._runs = runs
        self._read: dict[Path, tuple[int, list[dict[str, Any]]]] = {}

    def __rich__(self) -> Table:
        """The table as it is now."""
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("run", no_wrap=True)
        for name in ("step", "tok/s", "loss", "val bits/B"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        for name in self._runs:
            table.add_row(name, *self._cells(name))
        return table

    def line(self, name: str) -> str:
        """The row of one run, for where there is no table."""
        step, _, loss, bits, course = self._cells(name)
        validation = f", validation {bits} bits/byte" if bits else ""
        return f"step {step}  {course}  loss {loss}{validation}"

    def _cells(self, name: str) -> tuple[str, str, str, str, str]:
        folder, steps = self._runs[name]
        lines = self._lines(folder)
        losses = [line["loss"] for line in lines if "loss" in line]
        return (
            f"{lines[-1]['step'] if lines else 0:,}/{steps:,}",
            _last(lines, "tokens_per_second", ",.0f"),
            _last(lines, "loss", ".3f"),
            _last(lines, "validation_bits_per_byte", ".3f"),
            sparkline(losses),
        )

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
