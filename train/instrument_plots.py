"""Plots of what the instruments read, by layer; the heat maps are in `heat_maps`."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from data.tokenizers import Tokenizer
from model.language_model import LanguageModel
from train import checkpoint as files
from train.figure import QUIET, log_axis, panel_rows, save, say_empty, set_title, styles, ticks
from train.heat_maps import heat_maps, is_softmax, save_attention_plot, sentence_of
from train.metrics import read_metrics
from train.readable import readable_count

ROOT = "attention_norm.sqrt_tokens"
"""The reading that the norm is compared with."""
ATTENTION, OVER_TRAINING = "attention.png", "instruments.png"


class Reader(NamedTuple):
    """A model that reads the sentence, with its tokenizer."""

    model: LanguageModel
    tokenizer: Tokenizer


def save_plots(
    folder: Path,
    model: LanguageModel,
    tokenizer: Tokenizer,
    text: str,
    *,
    readings: dict[str, float] | None = None,
    beside: Reader | None = None,
) -> list[Path]:
    """Both plots into the folder of a run; returns the files.

    Args:
        folder: its `metrics.jsonl` tells what was read in training.
        model: of the run.
        tokenizer: of the model.
        text: whose first sentence the heat maps show.
        readings: of the model now; the last of training if not given.
        beside: another model to show beside it; softmax of the same queries and keys if not given.
    """
    history = [line for line in read_metrics(folder / files.METRICS) if _is_read(line)]
    now: dict[str, Any] = readings or (history[-1] if history else {})
    maps = heat_maps(model, tokenizer, sentence_of(text))
    if beside is not None:
        maps += heat_maps(*beside, sentence_of(text))[:1]
    elif not is_softmax(model.config):
        maps += heat_maps(model, tokenizer, sentence_of(text), softmax=True)
    save_attention_plot(maps, folder / ATTENTION)
    save_layers_plot(history, now, folder / OVER_TRAINING)
    return [folder / ATTENTION, folder / OVER_TRAINING]


class Panel(NamedTuple):
    """Where one kind of reading is drawn."""

    title: str
    unit: str
    is_log: bool = False


OF_TRAINING = {
    "attention_entropy": Panel("Entropy of the implied attention", "Nats a token"),
    "attention_norm": Panel("Norm of the implied attention", "Frobenius norm", True),
    "attention_span": Panel("Span of the implied attention", "Tokens back"),
    "smallest_divisor": Panel("Smallest divisor of a row of weights", "Sum of weights", True),
    "gradient_norm": Panel("Gradient", "Norm", True),
}
"""Drawn over training."""
OF_NOW = {
    "half_life": Panel("Half-lives of the decays, by head", "Tokens", True),
    "state_norm": Panel("State along the text", "Frobenius norm"),
    "state_rank": Panel("State along the text", "Effective rank"),
}
"""Drawn as it is at the end."""


def save_layers_plot(history: Sequence[dict[str, Any]], now: dict[str, Any], path: Path) -> None:
    """A panel for each kind of reading that there is, a colour for each layer.

    Args:
        history: lines of `metrics.jsonl` with readings.
        now: the readings at the end.
        path: the file.
    """
    keys = {key for line in (*history, now) for key in line}
    layers = sorted({layer for key in keys if (layer := _layer(key)) is not None})
    kinds = {key.partition(".")[0] for key in keys if _layer(key) is not None}
    shown = {name: panel for name, panel in (OF_TRAINING | OF_NOW).items() if name in kinds}
    names = [f"layer {layer}" for layer in layers]
    figure, every = panel_rows(names, max(1, math.ceil(len(shown) / 2)))
    for axes in every[len(shown) :]:
        axes.set_visible(False)
    if not shown:
        every[0].set_visible(True)
        say_empty(every[0], "nothing was read")
    for axes, (name, panel) in zip(every, shown.items(), strict=False):
        set_title(axes, panel.title)
        axes.set_ylabel(panel.unit)
        if name in OF_TRAINING:
            values = _draw_training(axes, history, now, name, layers)
        elif name == "half_life":
            values = _draw_half_lives(axes, now, layers)
        else:
            values = _draw_along_text(axes, now, name, layers)
        if name == "attention_norm":
            lines = [line for line in history if ROOT in line]
            root = (lines[-1] if len(lines) > 1 else now).get(ROOT)
            if root is not None:
                axes.axhline(root, color=QUIET, linestyle="--", linewidth=1.2, zorder=1)
                values.append(root)
        if panel.is_log:
            log_axis(axes, values)
    note = "Means over tokens and heads; half-lives: medians over tokens and channels."
    save(figure, f"{note}\nDashed grey: the root of the tokens, softmax cannot exceed it.", path)


def _draw_training(
    axes: Axes,
    history: Sequence[dict[str, Any]],
    now: dict[str, Any],
    name: str,
    layers: Sequence[int],
) -> list[float]:
    """A line for each layer, or a point where there is but one reading; returns the values."""
    found: list[float] = []
    for layer, style in zip(layers, styles(), strict=False):
        key = f"{name}.layer{layer}"
        points = [line for line in history if key in line]
        if len(points) > 1:
            y = [float(line[key]) for line in points]
            axes.plot([line["tokens"] for line in points], y, **style, linewidth=2)
            axes.set_xlabel("Training tokens")
            axes.xaxis.set_major_formatter(ticks(readable_count))
            axes.xaxis.set_major_locator(MaxNLocator(6))
            found += y
        elif key in now:
            axes.plot(layer, now[key], marker="o", color=style["color"])
            axes.set_xlabel("Layer")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            found.append(float(now[key]))
    return found


def _draw_half_lives(axes: Axes, now: dict[str, Any], layers: Sequence[int]) -> list[float]:
    """A point for each head, or for the layer where there are none; returns the values."""
    found: list[float] = []
    for layer, style in zip(layers, styles(), strict=False):
        whole = f"half_life.layer{layer}"
        heads = [value for key, value in now.items() if key.startswith(f"{whole}.head")]
        values = heads or [now[key] for key in (whole,) if key in now]
        axes.plot(
            [layer] * len(values), values, marker="o", linestyle="", alpha=0.7, color=style["color"]
        )
        found += values
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("Layer")
    return found


def _draw_along_text(
    axes: Axes, now: dict[str, Any], name: str, layers: Sequence[int]
) -> list[float]:
    """A line for each layer, by the number of tokens read; returns the values."""
    found: list[float] = []
    for layer, style in zip(layers, styles(), strict=False):
        before = f"{name}.layer{layer}.token"
        counts = [int(key.removeprefix(before)) for key in now if key.startswith(before)]
        values = [now[f"{before}{count}"] for count in counts]
        axes.plot(counts, values, **style, linewidth=2, marker="o")
        found += values
    axes.set_xlabel("Tokens read")
    return found


def _is_read(line: dict[str, Any]) -> bool:
    """Whether instruments were read at that step."""
    return any(_layer(key) is not None for key in line)


def _layer(key: str) -> int | None:
    """`attention_entropy.layer3` -> 3."""
    found = re.search(r"\.layer(\d+)", key)
    return int(found[1]) if found else None
