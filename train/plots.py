"""The figures of a comparison."""

import math
import textwrap
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from train.attention_maps import save_maps
from train.figure import (
    INK,
    context_axis,
    fixed_ticks,
    log_axis,
    panel_rows,
    panels,
    save,
    say_empty,
    set_title,
    styles,
    ticks,
)
from train.lengths_plot import save_lengths_plot
from train.readable import listed, readable_flops, readable_seconds, short_context
from train.report import heat, inside
from train.report.chart import (
    SKIPPED_START,
    Chart,
    bytes_text,
    count_text,
    estimates,
    task_charts,
    time_unit,
)
from train.report.outcomes import divergence, equal_time, finite, growing, leaders, overlap, scores
from train.report.studies import length_studies

LONGEST_TITLE = 51
MANY = 6
"""Charts in a figure; with more of them it has half the resolution, or its file would be large."""
TRAINING = {"linewidth": 0.7, "alpha": 0.3, "zorder": 2}


def save_plots(results: dict[str, Any], folder: Path) -> list[str]:
    """Every figure that these results have something for.

    Returns:
        Their names in the folder.
    """
    models = results["models"]
    save_loss_plot(results, folder / "loss.png")
    save_generation_plot(results, folder / "generation.png")
    names = ["loss.png", "generation.png"]
    if any(model.get("flops_per_token") for model in models):
        save_compute_plot(results, folder / "compute.png")
        names.insert(1, "compute.png")
    studies = length_studies(models)
    if len({study.context for study in studies.values()}) == 1:
        save_lengths_plot(studies, folder / "lengths.png")
        names.append("lengths.png")
    if charts := list(chain.from_iterable(task_charts(models).values())):
        said = " ".join(chart.note for chart in charts if chart.note)
        save_charts(charts, [model["mixer"] for model in models], folder / "tasks.png", said)
        names.append("tasks.png")
    if charts := inside.charts(models):
        save_charts(charts, [model["mixer"] for model in models], folder / "instruments.png")
        names.append("instruments.png")
    if maps := heat.attention_of(models):
        save_maps(maps, folder / "attention.png")
        names.append("attention.png")
    return names


def save_loss_plot(results: dict[str, Any], path: Path) -> None:
    """Validation loss against tokens and against time, training loss pale behind it."""
    figure, (by_tokens, by_time) = panels([model["mixer"] for model in results["models"]])
    models = results["models"]
    time_name, seconds = time_unit(models)
    _draw_losses(by_tokens, models, "tokens", [1.0] * len(models))
    _draw_losses(by_time, models, "seconds", [seconds] * len(models))
    by_tokens.set_xlabel("Training tokens")
    by_tokens.xaxis.set_major_formatter(ticks(count_text))
    by_time.set_xlabel(f"Training time ({time_name})")
    by_tokens.set_ylabel("Loss (nats per token)")
    left, right = _loss_titles(results)
    set_title(by_tokens, left)
    set_title(by_time, right)
    has_training = any(run["curve"] for model in models for run in model["runs"])
    note = "Thick: validation loss. Thin: training loss." if has_training else "Validation loss."
    if any(len(model["runs"]) > 1 for model in models):
        note += " One line for each seed; training loss of the first."
    if any(divergence(run) for model in models for run in model["runs"]):
        note += " ×: diverged."  # noqa: RUF001 - the cross that is drawn
    save(figure, note, path)


def save_compute_plot(results: dict[str, Any], path: Path) -> None:
    """Loss against the FLOPs of training, and bits per byte with the interval over seeds."""
    models = results["models"]
    figure, (by_flops, final) = panels([model["mixer"] for model in models])
    known = [m if m.get("flops_per_token") else {**m, "runs": []} for m in models]
    _draw_losses(by_flops, known, "tokens", [1 / (m.get("flops_per_token") or 1) for m in models])
    by_flops.set_xlabel("Training compute (FLOPs)")
    by_flops.xaxis.set_major_formatter(ticks(readable_flops))
    by_flops.set_ylabel("Loss (nats per token)")
    set_title(by_flops, "Loss by compute")
    set_title(final, "Bits per byte, lower is better")
    found = estimates(models)
    rows = sorted(found.rows, key=lambda row: -row[1]) if found else []
    colors = [style["color"] for style, _ in zip(styles(), models, strict=False)]
    for place, (mixer, mean, margin) in enumerate(rows):
        final.errorbar(mean, place, xerr=margin, color=colors[mixer], marker="o", capsize=3)
    final.set_yticks(range(len(rows)), [models[mixer]["mixer"] for mixer, *_ in rows])
    final.set_ylim(-0.7, max(len(rows), 1) - 0.3)
    final.xaxis.set_major_locator(MaxNLocator(5))
    save(figure, found.note if found else "", path)


def save_charts(charts: Sequence[Chart], names: Sequence[str], path: Path, note: str = "") -> None:
    """Charts of the HTML report, two in a row."""
    figure, every = panel_rows(names, math.ceil(len(charts) / 2))
    for axes in every[len(charts) :]:
        axes.set_axis_off()
    for axes, chart in zip(every, charts, strict=False):
        lines = {line.mixer: line for line in chart.lines}
        for mixer, style in zip(range(len(names)), styles(), strict=False):
            if mixer in lines:
                x, y = zip(*lines[mixer].points, strict=True)
                axes.plot(x, y, **style, linewidth=2, marker="o", markersize=5)
        if chart.x.log:
            context_axis(axes, [int(tick) for tick in chart.x.ticks])
        else:
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.xaxis.set_major_formatter(ticks(chart.x.text))
            if chart.x.ticks:
                fixed_ticks(axes, chart.x.ticks)
        if chart.y.log:
            values = [y for line in chart.lines for _, y in line.points]
            log_axis(axes, [*values, *([chart.level] if chart.level else [])], chart.y.text)
        if chart.level is not None:
            axes.axhline(chart.level, color=INK, linestyle="--", linewidth=1.2, zorder=1)
        if chart.y.limits is not None:
            low, high = chart.y.limits
            axes.set_ylim(low - 0.03 * (high - low), high + 0.03 * (high - low))
        axes.set_xlabel(chart.x.label)
        axes.set_ylabel(chart.y.label)
        set_title(axes, chart.title)
    if len(charts) > MANY:
        figure.set_dpi(figure.dpi / 2)
    save(figure, textwrap.fill(note, 120), path)


def save_generation_plot(results: dict[str, Any], path: Path) -> None:
    """Milliseconds a token and bytes of state against the context, both on log axes."""
    models = results["models"]
    contexts = sorted({point["context"] for model in models for point in model["generation"]})
    labels = Labels(
        "Context (tokens already read)",
        "Time per generated token (ms)",
        "Memory for the state",
        *_generation_titles(models, contexts),
    )
    save_growth_plot(models, labels, path)


class Labels(NamedTuple):
    """What the axes of a growth plot are, and what it says."""

    x: str
    time: str
    memory: str
    time_title: str
    memory_title: str


def save_growth_plot(models: list[dict[str, Any]], labels: Labels, path: Path) -> None:
    """`generation` of each model: points of `ms_per_token` and `state_bytes` at each `context`."""
    figure, (time, memory) = panels([model["mixer"] for model in models])
    contexts = sorted({point["context"] for model in models for point in model["generation"]})
    for model, style in zip(models, styles(), strict=False):
        points = sorted(model["generation"], key=lambda point: int(point["context"]))
        x = [point["context"] for point in points]
        low, high = ([point[key] for point in points] for key in ("low", "high"))
        time.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
        for axes, key in ((time, "ms_per_token"), (memory, "state_bytes")):
            y = [point[key] for point in points]
            axes.plot(x, y, **style, linewidth=2, marker="o", markersize=5, markeredgecolor="white")
    log_axis(time, _values(models, ("ms_per_token", "low", "high")))
    log_axis(memory, _values(models, ("state_bytes",)), bytes_text)
    for axes in (time, memory):
        context_axis(axes, contexts)
        axes.set_xlabel(labels.x)
    time.set_ylabel(labels.time)
    memory.set_ylabel(labels.memory)
    set_title(time, labels.time_title)
    set_title(memory, labels.memory_title)
    save(
        figure, "Points: medians. Bands: the middle half of the measurements. Both axes log.", path
    )


def _draw_losses(axes: Axes, models: list[dict[str, Any]], x: str, units: Sequence[float]) -> None:
    """A run that diverged is drawn as far as it came, and does not set the range of the axis."""
    shown: list[float] = []
    diverged: list[float] = []
    ends: list[tuple[float, float, str]] = []
    for model, unit, style in zip(models, units, styles(), strict=False):
        thick = 2.0 if len(model["runs"]) == 1 else 1.3
        for number, run in enumerate(model["runs"]):
            failed = divergence(run) is not None
            kept = diverged if failed else shown
            if number == 0:
                late = _draw_curve(axes, run["curve"], x, unit, style | TRAINING)
                kept += late[:1] if len(run["validation_curve"]) > 1 else late
            validation = style | {"linewidth": thick, "zorder": 3}
            kept += _draw_curve(axes, run["validation_curve"], x, unit, validation)
            if failed and (end := _end(run, x)) is not None:
                ends.append((end[0] / unit, end[1], style["color"]))
    shown = shown or diverged
    if not shown:
        say_empty(axes, "no loss was recorded")
        return
    low, high = min(shown), max(shown)
    pad = max(0.05 * (high - low), 0.01 * abs(low), 1e-6)
    axes.set_ylim(low - pad, high + pad)
    axes.set_xlim(left=0)
    for at, loss, color in ends:  # where it broke off, or above that at the edge
        place = min(max(loss, low), high)
        axes.plot(at, place, color=color, marker="x", markersize=8, markeredgewidth=2, zorder=4)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.ticklabel_format(axis="y", useOffset=False)


def _end(run: dict[str, Any], x: str) -> tuple[float, float] | None:
    """The last point of a run that has a loss."""
    points = [p for p in [*run["validation_curve"], *run["curve"]] if finite(p["loss"])]
    return max(((float(p[x]), float(p["loss"])) for p in points), default=None)


def _draw_curve(
    axes: Axes, points: list[dict[str, Any]], x: str, unit: float, style: dict[str, Any]
) -> list[float]:
    """Draws what is finite; returns the losses after the first steep fall, the lowest first."""
    points = [point for point in points if finite(point["loss"])]
    mark: dict[str, Any] = {"marker": "o", "markersize": 4} if len(points) == 1 else {}
    at = [point[x] / unit for point in points]
    losses = [float(point["loss"]) for point in points]
    axes.plot(at, losses, **style, **mark)
    return sorted(y for y, t in zip(losses, at, strict=True) if t >= SKIPPED_START * at[-1])


def _loss_titles(results: dict[str, Any]) -> tuple[str, str]:
    models = results["models"]
    finals = scores(models)
    if len(models) == 1 or not finals:
        return "Validation loss by tokens", "Validation loss by time"
    equal = equal_time(results)
    by_time = "Validation loss by time"
    if equal is not None:
        found = _winners(leaders(equal.values), len(equal.values), "lowest")
        by_time = f"After an equal {readable_seconds(equal.amount)}, {found}"
    return f"After all tokens, {_winners(leaders(finals), len(finals), 'lowest')}", by_time


def _winners(order: list[str], of: int, word: str) -> str:
    """`a is lowest`; `a and b lead` where two of more cannot be told apart."""
    if len(order) == 1:
        return f"{order[0]} is {word}"
    text = f"{listed(order)} lead"
    return text if len(order) == 2 < of and len(text) <= 30 else "there is no clear winner"


def _values(models: list[dict[str, Any]], keys: Sequence[str]) -> list[float]:
    points = (point for model in models for point in model["generation"])
    return [float(value) for point in points for key in keys if (value := point[key]) > 0]


def _generation_titles(models: list[dict[str, Any]], contexts: list[int]) -> tuple[str, str]:
    time, memory = "Time per generated token", "Memory for the state"
    if not contexts:
        return time, memory
    largest = contexts[-1]
    at_largest = sorted(
        (
            (model["mixer"], point)
            for model in models
            for point in model["generation"]
            if point["context"] == largest
        ),
        key=lambda item: float(item[1]["ms_per_token"]),
    )
    if len(at_largest) > 1:
        fastest = at_largest[0][1]
        ahead = [mixer for mixer, point in at_largest if overlap(fastest, point)]
        found = _winners(ahead, len(at_largest), "fastest")
        time = f"At {short_context(largest)} tokens, {found}"
    return time, _state_title(*growing(models)) or memory


def _state_title(grown: list[str], constant: list[str]) -> str:
    """Names where there is room, counts where there is not; empty if nothing is known."""
    by_name = [f"constant for {listed(constant)}"] if constant else []
    by_count = [f"constant for {len(constant)} mixers"] if constant else []
    if grown:
        by_name.append(f"growing for {listed(grown)}")
        by_count.append(by_name[-1] if len(grown) == 1 else f"growing for {len(grown)}")
    if not by_name:
        return ""
    title = f"State: {', '.join(by_name)}"
    return title if len(title) <= LONGEST_TITLE else f"State: {', '.join(by_count)}"
