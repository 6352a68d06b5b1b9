"""What the pictures of the HTML report show, apart from how it is drawn."""

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from train.intervals import interval
from train.readable import (
    readable_bytes,
    readable_count,
    readable_flops,
    short_context,
    short_number,
)
from train.report import studies
from train.report.outcomes import divergence, finished

Points = list[tuple[float, float]]

MOST_POINTS = 100
"""Of a line: more cannot be told apart on a screen, and would make the page heavy."""

SKIPPED_START = 0.1
"""The part of training that does not set the range of the loss axis: the first fall is steep."""


class Axis(NamedTuple):
    """One direction of a chart."""

    label: str
    text: Callable[[float], str]
    """Of the number at a tick."""
    log: bool = False
    ticks: Sequence[float] = ()
    """Where to put them; empty for round numbers."""
    limits: tuple[float, float] | None = None
    """None for the range of the values."""


class Line(NamedTuple):
    """Some points of one mixer."""

    mixer: int
    """Its place among the mixers, which is its colour everywhere."""
    points: Points
    faint: bool = False
    one_of_many: bool = False
    """Whether there is a line for every seed: thinner, without dots."""
    band: Sequence[tuple[float, float, float]] = ()
    """x, low and high."""
    end: str = ""
    """Why it ended early; marked with a cross."""


class Chart(NamedTuple):
    """Lines over a common pair of axes."""

    title: str
    x: Axis
    y: Axis
    lines: list[Line]
    note: str = ""
    level: float | None = None
    """A value to draw a dashed line at."""


class Estimates(NamedTuple):
    """One number and its interval for each mixer: name, mean, margin."""

    title: str
    label: str
    rows: list[tuple[int, float, float]]
    note: str = ""


def estimates(models: Sequence[dict[str, Any]]) -> Estimates | None:
    """Bits per byte with the interval over seeds; None where no run has finished."""
    rows = []
    for number, model in enumerate(models):
        values = list(finished(model, "validation_bits_per_byte").values())
        if values:
            mean, margin = interval(values)
            rows.append((number, mean, margin or 0.0))
    several = any(margin > 0 for *_, margin in rows)
    note = "Bars: the 95 % interval of the mean over seeds." if several else "One seed each."
    return Estimates("Bits per byte", "Lower is better", rows, note) if rows else None


def loss_charts(models: Sequence[dict[str, Any]]) -> list[Chart]:
    """Loss against tokens, time and, where they are known, FLOPs."""
    name, seconds = time_unit(models)
    note = "Thick: validation, a line for each seed. Thin: training, first seed."
    charts = [
        _loss_chart(models, "tokens", lambda _: 1.0, Axis("Training tokens", count_text)),
        _loss_chart(
            models, "seconds", lambda _: 1 / seconds, Axis(f"Training time ({name})", plain)
        ),
    ]
    if any(model.get("flops_per_token") for model in models):
        known = [m if m.get("flops_per_token") else {**m, "runs": []} for m in models]
        flops = Axis("Training compute (FLOPs)", readable_flops)
        charts.append(_loss_chart(known, "tokens", lambda m: m.get("flops_per_token") or 1, flops))
    if any(divergence(run) for model in models for run in model["runs"]):
        note += " ×: diverged."  # noqa: RUF001 - the cross that is drawn
    return [chart._replace(note=note) for chart in charts if chart.lines]


def generation_charts(models: Sequence[dict[str, Any]]) -> list[Chart]:
    """Time, state and, where it was measured, peak memory against the context."""
    contexts = sorted({point["context"] for model in models for point in model["generation"]})
    x = Axis("Context (tokens already read)", short_context, log=True, ticks=contexts)
    bands = "Points: medians. Bands: the middle half of the measurements."
    wanted = [
        ("ms_per_token", "Time per generated token", Axis("ms, log", short_number, log=True)),
        ("state_bytes", "Memory for the state", Axis("bytes, log", bytes_text, log=True)),
        ("peak_memory_bytes", "Peak memory", Axis("bytes, log", bytes_text, log=True)),
    ]
    charts = []
    for key, title, y in wanted:
        lines = []
        for number, model in enumerate(models):
            found = sorted(
                (p for p in model["generation"] if p.get(key)), key=lambda p: int(p["context"])
            )
            timed = key == "ms_per_token"
            band = [(p["context"], p["low"], p["high"]) for p in found] if timed else []
            lines.append(Line(number, [(p["context"], p[key]) for p in found], band=band))
        note = bands if key == "ms_per_token" else ""
        charts.append(Chart(title, x, y, [line for line in lines if line.points], note))
    return [chart for chart in charts if chart.lines]


def length_charts(models: Sequence[dict[str, Any]]) -> list[Chart]:
    """Loss by position and by the length of the window."""
    found = studies.length_studies(models)
    by_position, by_length = [], []
    for number, model in enumerate(models):
        if (study := found.get(model["mixer"])) is None:
            continue
        by_position.append(Line(number, _finite([(p.most, p.loss) for p in study.positions])))
        band = [(x.length, x.last - x.margin, x.last + x.margin) for x in study.lengths if x.margin]
        band = [entry for entry in band if all(map(math.isfinite, entry))]
        by_length.append(
            Line(number, _finite([(x.length, x.last) for x in study.lengths]), band=band)
        )
    note = "Bands: the 95 % interval of the difference to the shortest window."
    charts = []
    for title, label, lines, under in (
        ("Loss by position", "Tokens seen, up to", by_position, ""),
        ("Loss by context", "Length of the window (tokens)", by_length, note),
    ):
        ticks = sorted({x for line in lines for x, _ in line.points})
        x = Axis(label, short_context, log=True, ticks=ticks)
        charts.append(Chart(title, x, Axis("nats per token", plain), lines, under))
    return [chart for chart in charts if any(line.points for line in chart.lines)]


def task_charts(models: Sequence[dict[str, Any]]) -> dict[str, list[Chart]]:
    """Those of each task; one for each width of the models where there are several."""
    charts: dict[str, list[Chart]] = {}
    for name in studies.tasks_of(models):
        points = studies.task_points(name, models)
        widths = list(dict.fromkeys(point.get("width") for point in points))
        for width in widths:
            title = f"Task: {name}" if len(widths) == 1 else f"Task: {name}, width {width}"
            of_width = [point for point in points if point.get("width") == width]
            if (found := _task_chart(title, name, of_width, models)).lines:
                charts.setdefault(name, []).append(found)
        if name in charts:
            note = studies.task_failures(name, models)
            charts[name][-1] = charts[name][-1]._replace(note=note)
    return charts


def _task_chart(
    title: str, name: str, points: list[dict[str, Any]], models: Sequence[dict[str, Any]]
) -> Chart:
    """Accuracy over the one number in which the points differ; else over their order."""
    varied = [k for k in points[0] if len({repr(p.get(k)) for p in points}) > 1]
    label, places = "Point", [float(n + 1) for n in range(len(points))]
    text: Callable[[float], str] = plain
    log = False
    if len(varied) == 1 and all(isinstance(p[varied[0]], int | float) for p in points):
        label, places = varied[0].replace("_", " "), [float(p[varied[0]]) for p in points]
        log, text = min(places) > 0 and max(places) >= 8 * min(places), short_context
    lines = []
    for number, model in enumerate(models):
        found = [
            (x, studies.task_accuracies(name, p, model))
            for x, p in zip(places, points, strict=True)
        ]
        line = [(x, 100 * fmean(one.values)) for x, one in found if one and one.values]
        lines.append(Line(number, sorted(line)))
    x = Axis(label, text, log=log, ticks=sorted(set(places)))
    y = Axis("accuracy, %", plain, limits=(0.0, 100.0))
    return Chart(title, x, y, [line for line in lines if line.points])


def tuning_charts(models: Sequence[dict[str, Any]]) -> list[Chart]:
    """Validation loss over the learning rates that were tried."""
    lines, failed = [], 0
    for number, model in enumerate(models):
        grid = [(t["learning_rate"], t["validation_loss"]) for t in model.get("tuning") or []]
        lines.append(Line(number, _finite(sorted(grid, key=lambda trial: trial[0]))))
        failed += len(grid) - len(lines[-1].points)
    lines = [line for line in lines if line.points]
    note = f"Not drawn: {failed} that diverged." if failed else ""
    ticks = sorted({x for line in lines for x, _ in line.points})
    x = Axis("Learning rate", short_number, log=True, ticks=ticks)
    title = "Validation loss by learning rate"
    return [Chart(title, x, Axis("nats per token", plain), lines, note)] if lines else []


def time_unit(models: Sequence[dict[str, Any]]) -> tuple[str, float]:
    """A unit for the longest run, and its seconds."""
    longest = max((run["seconds"] for model in models for run in model["runs"]), default=0.0)
    if longest < 300:
        return "seconds", 1.0
    return ("minutes", 60.0) if longest < 3 * 3600 else ("hours", 3600.0)


def count_text(count: float) -> str:
    """`200k`, `1.5M`."""
    number, _, unit = readable_count(count).partition(" ")
    return f"{float(number.replace(',', '')):g}{unit}"


def plain(value: float) -> str:
    """Of an axis that is not log: as many digits as its ticks may need."""
    return f"{value:,.6g}"


def bytes_text(count: float) -> str:
    """`3 MB`, where a text would have `3.0 MB`."""
    return readable_bytes(count).replace(".0 ", " ")


def _loss_chart(
    models: Sequence[dict[str, Any]],
    key: str,
    unit: Callable[[dict[str, Any]], float],
    x: Axis,
) -> Chart:
    lines: list[Line] = []
    shown: list[float] = []
    for number, model in enumerate(models):
        for place, run in enumerate(model["runs"]):
            scale, failure = unit(model), divergence(run)
            validation = _thinned(_curve(run["validation_curve"], key, scale))
            training = _averaged(_curve(run["curve"], key, scale))
            if place == 0 or (failure and not validation):
                lines.append(Line(number, training, faint=True))
            end = "" if failure is None else f"diverged: {failure.reason}"
            shape = validation or (training[-1:] if end else [])
            many = len(model["runs"]) > 1 and len(shape) > 1
            lines.append(Line(number, shape, one_of_many=many, end=end))
            if failure is None:
                late = _late(training) if place == 0 else []
                shown += _late(validation) + (late[:1] if len(validation) > 1 else late)
    lines = [line for line in lines if line.points]
    every = shown or [y for line in lines for _, y in _late_points(line.points)]
    low, high = (min(every), max(every)) if every else (0.0, 1.0)
    pad = max(0.05 * (high - low), 0.01 * abs(low), 1e-6)
    y = Axis("nats per token", plain, limits=(low - pad, high + pad))
    title = f"Loss by {x.label.removeprefix('Training ').partition(' (')[0]}"
    return Chart(title, x, y, lines)


def _curve(points: Sequence[dict[str, Any]], key: str, scale: float) -> Points:
    return _finite([(point[key] * scale, point["loss"]) for point in points])


def _finite(points: Sequence[tuple[float, float | None]]) -> Points:
    return [(x, y) for x, y in points if y is not None and math.isfinite(y)]


def _late_points(points: Points) -> Points:
    return [(x, y) for x, y in points if x >= SKIPPED_START * points[-1][0]]


def _late(points: Points) -> list[float]:
    """The losses after the first steep fall, the lowest first."""
    return sorted(y for _, y in _late_points(points))


def _thinned(points: Points) -> Points:
    """Evenly fewer, the last always."""
    every = math.ceil(len(points) / MOST_POINTS)
    return points[::-1][::every][::-1] if every > 1 else points


def _averaged(points: Points) -> Points:
    """Means of neighbours, as many as there is room for."""
    every = math.ceil(len(points) / MOST_POINTS)
    if every < 2:
        return points
    groups = [points[start : start + every] for start in range(0, len(points), every)]
    return [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups]
