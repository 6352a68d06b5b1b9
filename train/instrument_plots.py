"""Plots of what the instruments read: heat maps of the implied attention, entropies, half-lives."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from torch import Tensor

from data.tokenizers import Tokenizer
from model.config import ModelConfig
from model.language_model import LanguageModel
from model.layers.attention import AttentionOptions
from train import checkpoint as files
from train.evaluate import evaluating
from train.figure import DPI, QUIET, panel_rows, save, say_empty, set_title, styles, ticks
from train.implied import implied_attention, observe, row_shares, softmax_instead
from train.metrics import read_metrics
from train.readable import readable_count

ATTENTION, OVER_TRAINING = "attention.png", "instruments.png"
MOST_TOKENS, MOST_LAYERS = 32, 4
"""In a heat map, and beside each other."""
LAST_DRAWN = 0x52F
"""The last character of the alphabets that the font is sure to have."""


class HeatMaps(NamedTuple):
    """The implied attention of one model on one sentence."""

    title: str
    words: list[str]
    """The tokens' texts."""
    layers: dict[int, Tensor]
    """`[T, T]` of some layers, whose rows sum to 1: the mean over heads of the rows' shares."""


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
    elif not _is_softmax(model.config):
        maps += heat_maps(model, tokenizer, sentence_of(text), softmax=True)
    save_attention_plot(maps, folder / ATTENTION)
    save_layers_plot(history, now, folder / OVER_TRAINING)
    return [folder / ATTENTION, folder / OVER_TRAINING]


def sentence_of(text: str) -> str:
    """The first sentence of some words, or else where the text begins."""
    for sentence in re.split(r"(?<=[.!?])\s+", " ".join(text.split())):
        if 5 <= len(sentence.split()) <= 25:
            return sentence
    return " ".join(text.split()[:25])


def heat_maps(
    model: LanguageModel, tokenizer: Tokenizer, sentence: str, *, softmax: bool = False
) -> list[HeatMaps]:
    """One, or none where there is nothing to show.

    Args:
        model: switched to evaluation mode and back.
        tokenizer: of the model.
        sentence: read from a fresh state, its first tokens only.
        softmax: what softmax would make of the same queries and keys.
    """
    ids = tokenizer.encode(sentence)[:MOST_TOKENS]
    if not ids:
        return []
    device, count = next(model.parameters()).device, model.config.num_layers
    wanted = {round(i * (count - 1) / (MOST_LAYERS - 1)) for i in range(MOST_LAYERS)}
    layers: dict[int, Tensor] = {}
    with evaluating(model):
        for layer, observed in enumerate(observe(model, torch.tensor([ids], device=device))):
            shown = softmax_instead(observed) if softmax else observed
            if layer in wanted and shown is not None:
                layers[layer] = row_shares(implied_attention(shown))[0].nanmean(dim=0).cpu()
    if not layers:
        return []
    title = "softmax, same q and k" if softmax else _name(model.config)
    return [HeatMaps(title, [_drawable(tokenizer.decode([i])) for i in ids], layers)]


def save_attention_plot(maps: Sequence[HeatMaps], path: Path) -> None:
    """A row for each model, a column for each layer; dark where a token takes much from another."""
    rows, columns = max(1, len(maps)), max((len(m.layers) for m in maps), default=1)
    size = (2.1 + 2.9 * columns, 0.8 + 3.2 * rows)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    for row in grid:
        for axes in row:
            axes.set_visible(False)
    for shown, row in zip(maps, grid, strict=False):
        for axes, (layer, matrix) in zip(row, shown.layers.items(), strict=False):
            axes.set_visible(True)
            _draw_heat_map(axes, matrix, shown.words, with_words=axes is row[0])
            set_title(axes, f"{shown.title}, layer {layer}" if axes is row[0] else f"layer {layer}")
    note = (
        "Each row: the shares that a token takes of the tokens up to it, by absolute weight; mean"
    )
    save(figure, f"{note} over heads.\nFrom white (0) to dark (1), by the root.", path)


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
            root = (history[-1] if len(history) > 1 else now)["attention_norm.sqrt_tokens"]
            axes.axhline(root, color=QUIET, linestyle="--", linewidth=1.2, zorder=1)
            values.append(root)
        if panel.is_log:
            _log_axis(axes, values)
    note = "Means over tokens and heads; half-lives: medians over tokens and channels."
    save(figure, f"{note}\nDashed grey: the root of the tokens, softmax cannot exceed it.", path)


def _draw_heat_map(axes: Axes, matrix: Tensor, words: Sequence[str], *, with_words: bool) -> None:
    by_root = PowerNorm(0.5, vmin=0.0, vmax=1.0)  # small shares can be seen
    axes.imshow(matrix.nan_to_num().numpy(), cmap="Blues", norm=by_root, interpolation="nearest")
    axes.set_xticks(range(len(words)), words, rotation=90, fontsize=5, parse_math=False)
    axes.set_yticks(range(len(words)), words, fontsize=5, parse_math=False)
    axes.tick_params(length=0, colors=QUIET, labelleft=with_words)
    for side in axes.spines.values():
        side.set_visible(False)


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


def _log_axis(axes: Axes, values: Sequence[float]) -> None:
    """Ticks in plain numbers; nothing where there is no value above zero."""
    positive = [value for value in values if value > 0]
    if not positive:
        return
    low, high = min(positive) / 1.5, max(positive) * 1.5
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    subs = (1.0,) if high / low > 500 else (1.0, 3.0) if high / low > 30 else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(ticks("{:,g}".format))


def _is_read(line: dict[str, Any]) -> bool:
    """Whether instruments were read at that step."""
    return any(_layer(key) is not None for key in line)


def _layer(key: str) -> int | None:
    """`attention_entropy.layer3` -> 3."""
    found = re.search(r"\.layer(\d+)", key)
    return int(found[1]) if found else None


def _name(config: ModelConfig) -> str:
    options = config.options
    return options.score if isinstance(options, AttentionOptions) else config.mixer


def _is_softmax(config: ModelConfig) -> bool:
    return _name(config) == "softmax"


def _drawable(word: str) -> str:
    """What the font has of a token, on one line."""
    return "".join(
        c if c.isprintable() and ord(c) <= LAST_DRAWN else "↵" if c == "\n" else "·" for c in word
    )
