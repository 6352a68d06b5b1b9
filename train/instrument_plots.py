"""Plots of what the instruments read: heat maps of the implied attention, entropies, half-lives."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from torch import Tensor

from data.tokenizers import Tokenizer
from model.config import ModelConfig
from model.language_model import LanguageModel
from model.layers.attention import AttentionOptions
from train import checkpoint as files
from train.evaluate import evaluating
from train.figure import DPI, INK, QUIET, panels, save, say_empty, set_title, styles, ticks
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


def save_layers_plot(history: Sequence[dict[str, Any]], now: dict[str, Any], path: Path) -> None:
    """The entropy of each layer's attention over training, and the half-lives of its heads now."""
    known = [*history, now]
    layers = sorted({layer for line in known for key in line if (layer := _layer(key)) is not None})
    figure, (left, right) = panels([f"layer {layer}" for layer in layers])
    set_title(left, "Entropy of the implied attention")
    set_title(right, "Half-lives of the decays, by head")
    _draw_entropies(left, history, now, layers)
    _draw_half_lives(right, now, layers)
    save(figure, "Means over tokens and heads; half-lives: medians over tokens and channels.", path)


def _draw_heat_map(axes: Axes, matrix: Tensor, words: Sequence[str], *, with_words: bool) -> None:
    by_root = PowerNorm(0.5, vmin=0.0, vmax=1.0)  # small shares can be seen
    axes.imshow(matrix.nan_to_num().numpy(), cmap="Blues", norm=by_root, interpolation="nearest")
    axes.set_xticks(range(len(words)), words, rotation=90, fontsize=5, parse_math=False)
    axes.set_yticks(range(len(words)), words, fontsize=5, parse_math=False)
    axes.tick_params(length=0, colors=QUIET, labelleft=with_words)
    for side in axes.spines.values():
        side.set_visible(False)


def _draw_entropies(
    axes: Axes, history: Sequence[dict[str, Any]], now: dict[str, Any], layers: Sequence[int]
) -> None:
    name = "attention_entropy.layer"
    axes.set_ylabel("Nats a token")
    drawn = False
    for layer, style in zip(layers, styles(), strict=False):
        points = [line for line in history if f"{name}{layer}" in line]
        if len(points) > 1:
            y = [line[f"{name}{layer}"] for line in points]
            axes.plot([line["tokens"] for line in points], y, **style, linewidth=2)
            axes.set_xlabel("Training tokens")
            axes.xaxis.set_major_formatter(ticks(lambda count: readable_count(count)))
            drawn = True
        elif f"{name}{layer}" in now:
            axes.plot(layer, now[f"{name}{layer}"], marker="o", color=style["color"])
            axes.set_xlabel("Layer")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            drawn = True
    if not drawn:
        say_empty(axes, "the instrument attention was not switched on")


def _draw_half_lives(axes: Axes, now: dict[str, Any], layers: Sequence[int]) -> None:
    found: list[float] = []
    for layer, style in zip(layers, styles(), strict=False):
        whole = f"half_life.layer{layer}"
        heads = [value for key, value in now.items() if key.startswith(f"{whole}.head")]
        values = heads or [now[key] for key in (whole,) if key in now]
        axes.plot(
            [layer] * len(values), values, marker="o", linestyle="", alpha=0.7, color=style["color"]
        )
        found += values
    if not found:
        say_empty(axes, "no decays, or the instrument was not switched on")
        return
    axes.set_yscale("log")
    axes.set_ylim(min(found) / 2, max(found) * 2)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(ticks("{:,g}".format))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("Layer")
    axes.set_ylabel("Tokens")
    axes.yaxis.label.set_color(INK)


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
