"""The part of `ebb info CHECKPOINT --instruments`."""

import math
from pathlib import Path
from typing import Any

import torch

from data.loader import Batch
from train.checkpoint import load_checkpoint
from train.half_lives import known_text
from train.instruments import INSTRUMENTS, ROWS, TOKENS, by_layer, read_instruments
from train.readable import three_digits


def instruments_info(folder: Path, beside: Path | None) -> dict[str, Any]:
    """What the instruments read of a checkpoint on the built-in text, and where their plots are.

    Args:
        folder: of the checkpoint; the plots are written there.
        beside: another one, whose attention is drawn beside.

    Raises:
        ValueError: for a checkpoint that cannot be read, or has no tokenizer.
    """
    from train.instrument_plots import Reader, save_plots  # matplotlib is slow to import

    model, tokenizer, _ = load_checkpoint(folder)
    other = None if beside is None else Reader(*load_checkpoint(beside)[:2])
    text, ids = known_text(tokenizer, ROWS * TOKENS + 1)
    time = (len(ids) - 1) // ROWS
    inputs, targets = (torch.tensor(x[: ROWS * time]).view(ROWS, time) for x in (ids, ids[1:]))
    readings = read_instruments(model, Batch(inputs, targets, None), INSTRUMENTS)
    plots = save_plots(folder, model, tokenizer, text, readings=readings, beside=other)
    rows = by_layer(readings)
    names = list(dict.fromkeys(name for row in rows for name in row))
    root = three_digits(readings["attention_norm.sqrt_tokens"])
    return {
        f"instruments, on {time} tokens of the built-in text (their root is {root})": [
            {
                name: row[name] if name == "layer" else three_digits(row.get(name, math.nan))
                for name in names
            }
            for row in rows
        ],
        "plots": {path.stem: str(path) for path in plots},
    }
