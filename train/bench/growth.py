"""How cost grows with the context: a log-log plot of each task that has several contexts."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.bench.rows import Row
from train.plots import Labels, save_growth_plot
from train.readable import short_context

LABELS = {
    "train": ("Context (tokens of a sequence)", "Time per token (ms)"),
    "prefill": ("Prompt (tokens)", "Time per token (ms)"),
    "decode": ("Context (tokens already read)", "Time per generated token (ms)"),
    "ops": ("Tokens of a sequence", "Time per token (ms)"),
}


def save_growth_plots(rows: Sequence[Row], out: Path) -> list[Path]:
    """A plot `<stem>-<task>.png` beside `out` for each task with several contexts of one model."""
    paths = []
    for task, (x, time) in LABELS.items():
        models = _models([row for row in rows if row.task == task])
        if not models:
            continue
        path = out.with_name(f"{out.stem}-{task}.png")
        largest = max(point["context"] for model in models for point in model["generation"])
        title = f"Time per token, up to {short_context(largest)} tokens"
        labels = Labels(x, time, "Peak memory", title, "Peak memory of the process")
        save_growth_plot(models, labels, path)
        paths.append(path)
    return paths


def _models(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A line of the plot for everything that was measured at more than one context."""
    lines: dict[str, list[Row]] = {}
    formats = {row.weights for row in rows}
    for row in rows:
        name = row.mixer if row.form is None else f"{row.mixer}, {row.form}"
        if len(formats) > 1:
            name += f", {row.weights}"
        if len({(row.num_layers, row.d_model) for row in rows}) > 1:
            name += f", {row.num_layers} x {row.d_model}"
        lines.setdefault(name, []).append(row)
    return [
        {"mixer": name, "generation": [_point(row) for row in found]}
        for name, found in lines.items()
        if len(found) > 1
    ]


def _point(row: Row) -> dict[str, Any]:
    memory = row.peak_memory_bytes
    return {
        "context": row.context,
        "ms_per_token": 1e3 / row.tokens_per_s,
        "low": 1e3 / row.tokens_per_s_high,
        "high": 1e3 / row.tokens_per_s_low,
        "state_bytes": math.nan if memory is None else memory,
    }
