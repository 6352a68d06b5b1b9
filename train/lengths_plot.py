"""The plot of a study of lengths: the loss by position, and by the length of the window."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from train.figure import QUIET, context_axis, panels, save, say_empty, set_title, styles
from train.lengths import LengthStudy


def save_lengths_plot(studies: Mapping[str, LengthStudy], path: Path) -> None:
    """One line for each model, all of them read in windows of the same lengths.

    Args:
        studies: by the name of the model.
        path: of the PNG; replaced if it exists.

    Raises:
        ValueError: if it cannot be written.
    """
    figure, (by_position, by_length) = panels(list(studies))
    for study, style in zip(studies.values(), styles(), strict=False):
        _line(
            by_position, [p.most for p in study.positions], [p.loss for p in study.positions], style
        )
        lengths = [x.length for x in study.lengths]
        _line(by_length, lengths, [x.last for x in study.lengths], style)
        _band(by_length, study, style["color"])
        pale = {**style, "linewidth": 1.0, "alpha": 0.6}
        by_length.plot(lengths, [x.loss for x in study.lengths], **pale)
    (context,) = {study.context for study in studies.values()}
    positions = sorted({p.most for study in studies.values() for p in study.positions})
    lengths = sorted({x.length for study in studies.values() for x in study.lengths})
    for axes, values in ((by_position, positions), (by_length, lengths)):
        if not any(np.isfinite(line.get_ydata()).any() for line in axes.lines):
            say_empty(axes, "no loss is finite")
        context_axis(axes, values)
        axes.axvline(context, color=QUIET, linewidth=1, linestyle=(0, (2, 3)), zorder=1)
        axes.set_ylabel("Loss (nats per token)")
    by_position.set_xlabel("Tokens seen, up to")
    by_length.set_xlabel("Length of the window (tokens)")
    set_title(by_position, "By position")
    set_title(by_length, "By the length of the window, on the same tokens")
    note = (
        f"Dotted: a context of {context:,} tokens. Right, thick: the last {context:,} tokens of "
        "each of the longest windows; thin: all tokens. "
        "Band: 95 % of the difference to the shortest."
    )
    save(figure, note, path)


def _band(axes: Axes, study: LengthStudy, color: str) -> None:
    """How far the differences to the shortest windows can be told from chance."""
    sure = [x for x in study.lengths if x.margin is not None]
    low, high = ([x.last + sign * (x.margin or 0.0) for x in sure] for sign in (-1, 1))
    axes.fill_between([x.length for x in sure], low, high, color=color, alpha=0.15, linewidth=0)


def _line(axes: Axes, x: Sequence[int], y: Sequence[float], style: Mapping[str, Any]) -> None:
    axes.plot(x, y, **style, linewidth=2, marker="o", markersize=5, markeredgecolor="white")
