"""Heat maps of the implied attention on one sentence."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from data.tokenizers import Tokenizer
from model.config import ModelConfig
from model.language_model import LanguageModel
from model.layers.attention import AttentionOptions
from train.evaluate import evaluating
from train.figure import DPI, QUIET, save, set_title
from train.implied import implied_attention, observe, row_shares, softmax_instead

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
    size = (0.8 + 3.2 * columns, 0.8 + 3.7 * rows)
    room = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.12)
    figure = Figure(figsize=size, dpi=DPI, layout=room, facecolor="white")
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


def _draw_heat_map(axes: Axes, matrix: Tensor, words: Sequence[str], *, with_words: bool) -> None:
    by_root = PowerNorm(0.5, vmin=0.0, vmax=1.0)  # small shares can be seen
    axes.imshow(matrix.nan_to_num().numpy(), cmap="Blues", norm=by_root, interpolation="nearest")
    axes.set_xticks(range(len(words)), words, rotation=90, fontsize=5, parse_math=False)
    axes.set_yticks(range(len(words)), words, fontsize=5, parse_math=False)
    axes.tick_params(length=0, colors=QUIET, labelleft=with_words)
    axes.set_xlabel("Key position", fontsize=8, color=QUIET)
    axes.set_ylabel("Query position" if with_words else "", fontsize=8, color=QUIET)
    for side in axes.spines.values():
        side.set_visible(False)


def _name(config: ModelConfig) -> str:
    options = config.options
    return options.score if isinstance(options, AttentionOptions) else config.mixer


def is_softmax(config: ModelConfig) -> bool:
    """Whether a model's attention is that of softmax anyway."""
    return _name(config) == "softmax"


def _drawable(word: str) -> str:
    """What the font has of a token, on one line."""
    return "".join(
        c if c.isprintable() and ord(c) <= LAST_DRAWN else "↵" if c == "\n" else "·" for c in word
    )
