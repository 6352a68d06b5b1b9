"""What all plots share. Drawn without pyplot: no global state, no window, no dates."""

import math
from collections.abc import Callable, Sequence
from itertools import cycle, product
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from train.checkpoint import write_atomically
from train.readable import short_context, short_number
from train.report.ticks import log_ticks

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")
"""Okabe and Ito's colours, which colour-blind people can tell apart; the yellow is too pale."""

DASHES = ("-", "--", ":")
"""Once all colours are taken they come again, dashed."""

DPI = 200
INK, QUIET, GRID = "#222222", "#5F5F5F", "#E4E4E4"


def panels(names: Sequence[str]) -> tuple[Figure, tuple[Axes, Axes]]:
    """Two panels under one legend: a fixed colour for each name, by its place."""
    figure, (left, right) = panel_rows(names, 1)
    return figure, (left, right)


def panel_rows(names: Sequence[str], rows: int) -> tuple[Figure, list[Axes]]:
    """The same with more rows of two, from left to right and down."""
    figure = _empty(10.5, rows)
    every: list[Axes] = list(figure.subplots(rows, 2).flat)
    for axes in every:
        _style(axes)
    handles = [
        Line2D([], [], linewidth=2.5, **style) for _, style in zip(names, styles(), strict=False)
    ]
    figure.legend(
        handles,
        names,
        loc="outside upper left",
        ncols=min(len(names), 6),
        frameon=False,
        fontsize=10,
        labelcolor=INK,
        handlelength=2.2,
    )
    return figure, every


def panel() -> tuple[Figure, Axes]:
    """One panel without a legend."""
    figure = _empty(7.0)
    axes = figure.subplots()
    _style(axes)
    return figure, axes


def styles() -> "cycle[dict[str, Any]]":
    """Colour and dash of each line in turn."""
    return cycle({"color": color, "linestyle": dash} for dash, color in product(DASHES, PALETTE))


def set_title(axes: Axes, text: str) -> None:
    """Above a panel, at its left."""
    axes.set_title(text, loc="left", fontsize=11, fontweight="bold", color=INK, pad=8)


def save(figure: Figure, note: str, path: Path) -> None:
    """The same results give the same bytes: no date, and no version of matplotlib."""
    figure.supxlabel(note, x=0.01, ha="left", fontsize=8.5, color=QUIET)
    options: dict[str, Any] = {"format": "png", "metadata": {"Software": None}, "dpi": figure.dpi}
    write_atomically(path, lambda beside: figure.savefig(beside, **options))


def say_empty(axes: Axes, text: str) -> None:
    """In place of lines."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=QUIET)
    axes.set_xticks([])
    axes.set_yticks([])


def ticks(text: Callable[[float], str]) -> FuncFormatter:
    """A number at an axis as `text` has it."""
    return FuncFormatter(lambda value, _: text(value))


def context_axis(axes: Axes, contexts: Sequence[int]) -> None:
    """Ticks where something was measured, the largest context always, eight at most."""
    if not contexts:
        return
    axes.set_xscale("log")
    axes.set_xlim(contexts[0] / 1.25, contexts[-1] * 1.25)
    fixed_ticks(axes, contexts)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ticks(short_context))


def log_axis(
    axes: Axes, values: Sequence[float], text: Callable[[float], str] = short_number
) -> None:
    """A log y axis with ticks that can be read, and a factor of four at least from end to end.

    Args:
        axes: to change.
        values: that are drawn there; what is not above zero has no place.
        text: of a tick.
    """
    values = [value for value in values if value > 0]
    if not values:
        say_empty(axes, "nothing above zero was measured")
        return
    low, high = min(values) / 1.25, max(values) * 1.25
    widen = max(1.0, math.sqrt(4 * low / high))
    low, high = low / widen, high * widen
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(FixedLocator(log_ticks(low, high)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(ticks(text))


def fixed_ticks(axes: Axes, places: Sequence[float]) -> None:
    """On the x axis; the last place always, eight at most."""
    every = math.ceil(len(places) / 8)
    axes.xaxis.set_major_locator(FixedLocator(places[::-1][::every]))


def _empty(width: float, rows: int = 1) -> Figure:
    figure = Figure(figsize=(width, 4.6 * rows), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _style(axes: Axes) -> None:
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#AAAAAA")
    axes.tick_params(colors=QUIET, labelsize=9, length=3, color="#AAAAAA", which="both")
    axes.xaxis.label.set(color=INK, fontsize=10)
    axes.yaxis.label.set(color=INK, fontsize=10)
