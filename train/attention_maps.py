"""Heat maps of a comparison, as `results.json` keeps them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data.tokenizers import Tokenizer
from model.language_model import LanguageModel


def attention_maps(
    model: LanguageModel, tokenizer: Tokenizer, text: str, *, with_softmax: bool
) -> list[dict[str, Any]]:
    """The implied attention on the first sentence of a text.

    Args:
        model: switched to evaluation mode and back.
        tokenizer: of the model.
        text: any.
        with_softmax: also what softmax makes of the same queries and keys, where there are some.

    Returns:
        For each map `title`, `words`, and `layers`: by layer the lower triangle of the shares, a
        string for each row, in thousandths.
    """
    from train.heat_maps import heat_maps, sentence_of  # matplotlib is slow to import

    sentence = sentence_of(text)
    found = heat_maps(model, tokenizer, sentence)
    found += heat_maps(model, tokenizer, sentence, softmax=True) if with_softmax else []
    return [
        {
            "title": one.title,
            "words": one.words,
            "layers": {
                str(layer): [
                    " ".join(f"{1000 * share:.0f}" for share in row[: place + 1])
                    for place, row in enumerate(matrix.nan_to_num().tolist())
                ]
                for layer, matrix in one.layers.items()
            },
        }
        for one in found
    ]


def save_maps(maps: Sequence[dict[str, Any]], path: Path) -> None:
    """As a picture."""
    from train.heat_maps import HeatMaps, save_attention_plot

    save_attention_plot(
        [
            HeatMaps(
                one["title"],
                one["words"],
                {int(layer): _square(rows) for layer, rows in one["layers"].items()},
            )
            for one in maps
        ],
        path,
    )


def _square(rows: Sequence[str]) -> torch.Tensor:
    shares = [[int(share) / 1000 for share in row.split()] for row in rows]
    return torch.tensor([[*row, *[0.0] * (len(shares) - len(row))] for row in shares])
