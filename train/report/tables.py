"""The tables of a report, the same for markdown, HTML and the terminal."""

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from train.readable import (
    readable_bytes,
    readable_count,
    readable_flops,
    readable_seconds,
    short_context,
    three_digits,
    with_margin,
)
from train.report import inside, studies
from train.report.outcomes import divergence, finished, finite
from train.report.paths import without_folders

INSIDE = "Inside the models"
MISSING = "–"  # noqa: RUF001 - a dash in a table's cell, not a minus


class Cell(NamedTuple):
    """What is shown, and by what number it is sorted."""

    text: str
    value: float | None = None


class Column(NamedTuple):
    """A column of the results table; an empty heading leaves it out there."""

    name: str
    """Heading in the report."""
    short: str
    """Heading in the terminal."""
    cells: list[Cell]
    """One a mixer."""


class Table(NamedTuple):
    """The first column names its row."""

    title: str
    head: list[str]
    rows: list[list[Cell]]
    numbers: bool = True
    """Whether the other columns hold numbers, which are set to the right."""


def columns(results: dict[str, Any]) -> list[Column]:
    """The results by mixer; columns that no mixer has a value for are left out."""
    models = results["models"]
    parameters = [float(m["parameters"]) for m in models]
    speeds = [float(m["training_speed"]["tokens_per_second"]) for m in models]
    found = [
        Column("mixer", "mixer", [Cell(m["mixer"]) for m in models]),
        Column("parameters", "", [Cell(f"{count:,.0f}", count) for count in parameters]),
        Column("", "params", [Cell(readable_count(count), count) for count in parameters]),
        Column("validation loss", "loss", [_mean(m, "validation_loss") for m in models]),
        Column("bits/byte", "bits/\nbyte", [_mean(m, "validation_bits_per_byte") for m in models]),
        Column("perplexity", "", [_perplexity(m) for m in models]),
    ]
    if any(divergence(run) for m in models for run in m["runs"]):
        found.append(Column("runs finished", "", [_finished(m) for m in models]))
    found.append(
        Column("training tokens/s", "train\ntok/s", [Cell(f"{x:,.0f}", x) for x in speeds])
    )
    if len({m.get("steps") for m in models}) > 1:  # a budget of FLOPs buys each its own number
        found.append(Column("steps", "", [_cell(m.get("steps"), "{:,.0f}".format) for m in models]))
    optional: list[tuple[str, str, Callable[[float], str]]] = [
        ("FLOPs/token", "flops_per_token", readable_flops),
        ("learning rate", "learning_rate", "{:g}".format),
    ]
    for name, key, text in optional:
        if any(m.get(key) is not None for m in models):
            found.append(Column(name, "", [_cell(m.get(key), text) for m in models]))
    return found + _generation_columns(models)


def tables(results: dict[str, Any]) -> list[Table]:
    """Those that follow the results table, in the order in which they are shown."""
    models = results["models"]
    found = [_generation(models), _lengths(models)]
    found += [_task(name, models) for name in studies.tasks_of(models)]
    found.append(_inside(models))
    return [table for table in [*found, _tuning(models), _runs(models)] if table.rows]


def overview(results: dict[str, Any]) -> Table:
    """The results table."""
    shown = [column for column in columns(results) if column.name]
    rows = [list(cells) for cells in zip(*(column.cells for column in shown), strict=True)]
    return Table("Results", [column.name for column in shown], rows)


def _cell(value: float | None, text: Callable[[float], str], missing: str = MISSING) -> Cell:
    if value is None:
        return Cell(missing)
    return Cell(text(value), value) if finite(value) else Cell("not finite")


def _mean(model: dict[str, Any], key: str) -> Cell:
    values = list(finished(model, key).values())
    return Cell(with_margin(values), fmean(values)) if values else Cell("diverged")


def _perplexity(model: dict[str, Any]) -> Cell:
    losses = finished(model, "validation_loss").values()
    values = [math.exp(loss) if loss < 700 else math.inf for loss in losses]
    return Cell(with_margin(values, digits=1), fmean(values)) if values else Cell("diverged")


def _finished(model: dict[str, Any]) -> Cell:
    done = len(finished(model, "validation_loss"))
    return Cell(f"{done} of {len(model['runs'])}", done)


def _generation_columns(models: Sequence[dict[str, Any]]) -> list[Column]:
    """At the smallest and at the largest context."""
    contexts = sorted({point["context"] for m in models for point in m["generation"]})
    found = []
    measures: list[tuple[str, str, Callable[[float], str]]] = [
        ("ms/token", "ms_per_token", three_digits),
        ("state", "state_bytes", readable_bytes),
    ]
    for name, key, text in measures:
        for context in contexts[:1] + contexts[1:][-1:]:
            points = [{p["context"]: p[key] for p in m["generation"]} for m in models]
            cells = [_cell(values.get(context), text) for values in points]
            short = f"{name}\nat {short_context(context)}"
            found.append(Column(f"{name} at {context:,}", short, cells))
    return found


def _tuning(models: Sequence[dict[str, Any]]) -> Table:
    rows = [
        [
            Cell(model["mixer"]),
            Cell(f"{trial['learning_rate']:g}", trial["learning_rate"]),
            _cell(trial["validation_loss"], "{:.4f}".format, "diverged"),
            Cell("taken" if trial["learning_rate"] == model.get("learning_rate") else ""),
        ]
        for model in models
        for trial in model.get("tuning") or []
    ]
    return Table("Learning rates tried", ["mixer", "learning rate", "validation loss", ""], rows)


def _generation(models: Sequence[dict[str, Any]]) -> Table:
    """By context, so that the mixers stand together; a mixer may lack some."""
    has_peak = any(p.get("peak_memory_bytes") for m in models for p in m["generation"])
    head = ["mixer", "context", "ms/token", "middle half", "state", "state and weights"]
    rows = []
    for context in sorted({point["context"] for m in models for point in m["generation"]}):
        for model in models:
            points = {point["context"]: point for point in model["generation"]}
            if context in points:
                cells = _generation_cells(points[context], model["weight_bytes"])
                rows.append([Cell(model["mixer"]), *(cells if has_peak else cells[:-1])])
    return Table("Generation", head + (["peak memory"] if has_peak else []), rows)


def _generation_cells(point: dict[str, Any], weight_bytes: int) -> list[Cell]:
    middle, low, high = (three_digits(point[key]) for key in ("ms_per_token", "low", "high"))
    sizes = (point["state_bytes"], point["state_bytes"] + weight_bytes)
    return [
        Cell(f"{point['context']:,}", point["context"]),
        Cell(middle, point["ms_per_token"]),
        Cell(f"{low} to {high}", point["low"]),
        *(Cell(readable_bytes(size), size) for size in sizes),
        _cell(point.get("peak_memory_bytes"), readable_bytes),
    ]


def _lengths(models: Sequence[dict[str, Any]]) -> Table:
    found = studies.length_studies(models)
    lengths = sorted({x.length for study in found.values() for x in study.lengths})
    by_length = {name: {x.length: x.last for x in s.lengths} for name, s in found.items()}
    rows = [
        [
            Cell(f"{length:,}", length),
            *(_cell(values.get(length), "{:.4f}".format) for values in by_length.values()),
        ]
        for length in lengths
    ]
    return Table("Longer contexts", ["tokens in a window", *found], rows)


def _task(name: str, models: Sequence[dict[str, Any]]) -> Table:
    took_part = [m for m in models if (m.get("tasks") or {}).get(name)]
    rows = []
    for place, point in enumerate(studies.task_points(name, models)):
        row = [Cell(studies.point_text(point), place)]
        for model in took_part:
            found = studies.task_accuracies(name, point, model)
            if found is None:
                row.append(Cell(MISSING))
            else:
                row.append(Cell(found.text, fmean(found.values) if found.values else None))
        rows.append(row)
    return Table(f"Task: {name}", ["point", *(m["mixer"] for m in took_part)], rows)


def _inside(models: Sequence[dict[str, Any]]) -> Table:
    kinds = inside.kinds_of(models)
    rows = [
        [Cell(m["mixer"]), *(_cell(inside.cell(m, kind), three_digits, gap) for kind in kinds)]
        for m in models
        for gap in ["diverged" if not finished(m, "validation_loss") else MISSING]
    ]
    return Table(INSIDE, ["mixer", *(inside.KINDS[k].column for k in kinds)], rows if kinds else [])


def _runs(models: Sequence[dict[str, Any]]) -> Table:
    head = ["run", "mixer", "seed", "validation loss", "bits/byte", "tokens", "time", "tokens/s"]
    rows = [
        [
            Cell(without_folders(run["folder"])),
            Cell(model["mixer"]),
            Cell(str(run["seed"]), run["seed"]),
            *_run_losses(run),
            Cell(f"{run['tokens']:,}", run["tokens"]),
            Cell(readable_seconds(run["seconds"]), run["seconds"]),
            _cell(run["tokens_per_second"], "{:,.0f}".format),
        ]
        for model in models
        for run in model["runs"]
    ]
    return Table("Runs", head, rows)


def _run_losses(run: dict[str, Any]) -> list[Cell]:
    if (found := divergence(run)) is not None:
        at = "" if found.step is None else f" at step {found.step:,}"
        return [Cell(f"diverged{at}"), Cell(MISSING)]
    keys = ("validation_loss", "validation_bits_per_byte")
    return [Cell(f"{run[key]:.4f}", run[key]) for key in keys]
