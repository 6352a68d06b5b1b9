"""The two figures of a comparison."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from train.figure import context_axis, panels, save, say_empty, set_title, styles, ticks
from train.report.outcomes import equal_time, growing, leaders, overlap
from train.readable import listed, readable_bytes, readable_count, readable_seconds, short_context

LONGEST_TITLE = 51
TRAINING = {"linewidth": 0.7, "alpha": 0.3, "zorder": 2}
SKIPPED_START = 0.1
"""The part of training that does not set the range of the loss axis: the first fall is steep."""


def save_loss_plot(results: dict[str, Any], path: Path) -> None:
    """Validation loss against tokens and against time, training loss pale behind it."""
    figure, (by_tokens, by_time) = panels([model["mixer"] for model in results["models"]])
    models = results["models"]
    time_name, time_unit = _time_unit(models)
    _draw_losses(by_tokens, models, "tokens", 1.0)
    _draw_losses(by_time, models, "seconds", time_unit)
    by_tokens.set_xlabel("Training tokens")
    by_tokens.xaxis.set_major_formatter(ticks(_count_text))
    by_time.set_xlabel(f"Training time ({time_name})")
    by_tokens.set_ylabel("Loss (nats per token)")
    left, right = _loss_titles(results)
    set_title(by_tokens, left)
    set_title(by_time, right)
    has_training = any(run["curve"] for model in models for run in model["runs"])
    note = "Thick: validation loss. Thin: training loss." if has_training else "Validation loss."
    if any(len(model["runs"]) > 1 for model in models):
        note += " One line for each seed; training loss of the first."
    save(figure, note, path)


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
    _log_axis(time, _values(models, ("ms_per_token", "low", "high")), "{:,g}".format)
    _log_axis(memory, _values(models, ("state_bytes",)), _bytes_text)
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


def _draw_losses(axes: Axes, models: list[dict[str, Any]], x: str, unit: float) -> None:
    shown: list[float] = []
    for model, style in zip(models, styles(), strict=False):
        thick = 2.0 if len(model["runs"]) == 1 else 1.3
        for number, run in enumerate(model["runs"]):
            if number == 0:
                late = _draw_curve(axes, run["curve"], x, unit, style | TRAINING)
                shown += late[:1] if len(run["validation_curve"]) > 1 else late
            validation = style | {"linewidth": thick, "zorder": 3}
            shown += _draw_curve(axes, run["validation_curve"], x, unit, validation)
    if not shown:
        say_empty(axes, "no loss was recorded")
        return
    low, high = min(shown), max(shown)
    pad = max(0.05 * (high - low), 0.01 * abs(low), 1e-6)
    axes.set_ylim(low - pad, high + pad)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.ticklabel_format(axis="y", useOffset=False)


def _draw_curve(
    axes: Axes, points: list[dict[str, Any]], x: str, unit: float, style: dict[str, Any]
) -> list[float]:
    """Draws what is finite; returns the losses after the first steep fall, the lowest first."""
    points = [point for point in points if math.isfinite(point["loss"])]
    mark: dict[str, Any] = {"marker": "o", "markersize": 4} if len(points) == 1 else {}
    at = [point[x] / unit for point in points]
    losses = [float(point["loss"]) for point in points]
    axes.plot(at, losses, **style, **mark)
    return sorted(y for y, t in zip(losses, at, strict=True) if t >= SKIPPED_START * at[-1])


def _time_unit(models: list[dict[str, Any]]) -> tuple[str, float]:
    longest = max((run["seconds"] for model in models for run in model["runs"]), default=0.0)
    if longest < 300:
        return "seconds", 1.0
    return ("minutes", 60.0) if longest < 3 * 3600 else ("hours", 3600.0)


def _loss_titles(results: dict[str, Any]) -> tuple[str, str]:
    models = results["models"]
    finals = {m["mixer"]: [run["validation_bits_per_byte"] for run in m["runs"]] for m in models}
    finals = {mixer: v for mixer, v in finals.items() if all(map(math.isfinite, v))}
    if len(models) == 1 or not finals:
        return "Validation loss by tokens", "Validation loss by time"
    equal = equal_time(results)
    by_time = "Validation loss by time"
    if equal is not None:
        found = _winners(leaders(equal.values), len(equal.values), "lowest")
        by_time = f"After an equal {readable_seconds(equal.seconds)}, {found}"
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


def _log_axis(axes: Axes, values: list[float], text: Callable[[float], str]) -> None:
    """A log axis with ticks that can be read, and at least a factor of four from end to end."""
    if not values:
        say_empty(axes, "nothing was measured")
        return
    low, high = min(values) / 1.25, max(values) * 1.25
    widen = max(1.0, math.sqrt(4 * low / high))
    low, high = low / widen, high * widen
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    subs = (1.0,) if high / low > 500 else (1.0, 3.0) if high / low > 30 else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(ticks(text))


def _count_text(count: float) -> str:
    """`200k`, `1.5M`."""
    number, _, unit = readable_count(count).partition(" ")
    return f"{float(number.replace(',', '')):g}{unit}"


def _bytes_text(count: float) -> str:
    """`3 MB`, where a text would have `3.0 MB`."""
    return readable_bytes(count).replace(".0 ", " ")


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
