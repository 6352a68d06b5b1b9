"""What was measured beyond one loss, in sentences: longer contexts, tasks, learning rates."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from train.lengths import LengthLoss, LengthStudy, PositionLoss
from train.readable import listed, with_margin
from train.report.outcomes import finite, leaders


def length_studies(models: Sequence[dict[str, Any]]) -> dict[str, LengthStudy]:
    """The study of each mixer that has one, of its first seed."""
    return {m["mixer"]: _study(m["lengths"]) for m in models if m.get("lengths")}


def lengths(models: Sequence[dict[str, Any]]) -> list[str]:
    """Which mixer predicts best far beyond the trained context, and what each gains from it."""
    found = length_studies(models)
    lines: list[str] = []
    longest = {name: study.lengths[-1] for name, study in found.items()}
    if len({(s.context, s.lengths[-1].length) for s in found.values()}) == 1 and len(found) > 1:
        study = next(iter(found.values()))
        values = {n: x.last if finite(x.last) else math.inf for n, x in longest.items()}
        order = sorted(values, key=lambda name: values[name])
        shown = [f"{n} {values[n]:.3f}" for n in order if math.isfinite(values[n])]
        shown += [f"{name} none that is finite" for name in order if math.isinf(values[name])]
        times = study.lengths[-1].length // study.context
        lines.append(
            f"At the end of windows of {study.lengths[-1].length:,} tokens ({times} times the "
            f"trained context) the loss in nats per token is: {', '.join(shown)} (first seed only)."
        )
    for name, study in found.items():
        lines += [f"{name}: {line[0].lower()}{line[1:]}" for line in study.findings()]
    return lines


def tasks(models: Sequence[dict[str, Any]]) -> list[str]:
    """Who is best at each task, at the last of its points, which is the hardest."""
    return [_task(name, models) for name in tasks_of(models) if task_points(name, models)]


def tuning(models: Sequence[dict[str, Any]]) -> list[str]:
    """Which learning rate was picked, and whether its grid was wide enough."""
    grids = {m["mixer"]: m["tuning"] for m in models if m.get("tuning")}
    if not grids:
        return []
    rates = {m["mixer"]: m.get("learning_rate") for m in models if m["mixer"] in grids}
    picked = ", ".join(f"{name} {rate:g}" for name, rate in rates.items() if rate is not None)
    tried = max(len(grid) for grid in grids.values())
    if tried == 1:
        return []
    lines = [f"Of {tried} learning rates tried with each mixer the best was taken: {picked}."]
    edge = [
        name
        for name, grid in grids.items()
        if len(grid) > 1 and rates[name] in _ends([trial["learning_rate"] for trial in grid])
    ]
    if edge:
        lines.append(
            f"The best rate of {listed(edge)} is at an end of the grid: a better one may lie "
            "beyond it."
        )
    return lines


def point_text(point: Mapping[str, Any]) -> str:
    """`num pairs 8, gap 2`."""
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in point.items())


def accuracies(entry: Mapping[str, Any]) -> list[float]:
    """One for each seed; the mean alone where the seeds were not kept."""
    values = [float(value) for value in entry.get("seeds") or [] if finite(value)]
    return values or ([float(entry["accuracy"])] if finite(entry["accuracy"]) else [])


def percent(values: Sequence[float]) -> str:
    """`93.1 %`, or `93.1 ± 2.0 %` with the 95 % interval of the mean."""
    return f"{with_margin([100 * value for value in values], digits=1)} %"


def tasks_of(models: Sequence[dict[str, Any]]) -> list[str]:
    """The names of all tasks, in the order in which they were measured."""
    return list(dict.fromkeys(task for model in models for task in model.get("tasks") or {}))


def task_points(name: str, models: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points of a task, the easiest first, as they were measured."""
    points: list[dict[str, Any]] = []
    for model in models:
        for entry in (model.get("tasks") or {}).get(name, []):
            if entry["point"] not in points:
                points.append(entry["point"])
    return points


def task_values(name: str, point: Mapping[str, Any], model: Mapping[str, Any]) -> list[float]:
    """Accuracies of a mixer at a point; empty where nothing was measured."""
    entries = (model.get("tasks") or {}).get(name, [])
    return next((accuracies(entry) for entry in entries if entry["point"] == point), [])


def _task(name: str, models: Sequence[dict[str, Any]]) -> str:
    point = task_points(name, models)[-1]
    found = {m["mixer"]: values for m in models if (values := task_values(name, point, m))}
    at = f"{name} at its last point ({point_text(point)})"
    if not found:
        return f"{at}: nothing was measured."
    negated = {mixer: {n: -v for n, v in enumerate(values)} for mixer, values in found.items()}
    order = sorted(found, key=lambda mixer: -fmean(found[mixer]))
    shown = ", ".join(f"{mixer} {percent(found[mixer])}" for mixer in order)
    best, *tied = leaders(negated)
    if len(found) == 1:
        return f"{at}: {shown}."
    verdict = f"no difference found between {listed([best, *tied])}" if tied else f"{best} is ahead"
    unknown = "" if any(len(values) > 1 for values in found.values()) else ", with one seed each"
    return f"{at}: {verdict}{unknown} ({shown})."


def _ends(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _study(saved: Mapping[str, Any]) -> LengthStudy:
    kept: dict[str, Any] = {f.name: saved[f.name] for f in dataclasses.fields(LengthStudy)}
    kept["lengths"] = tuple(LengthLoss(**_numbers(entry)) for entry in saved["lengths"])
    kept["positions"] = tuple(PositionLoss(**_numbers(entry)) for entry in saved["positions"])
    return LengthStudy(**kept)


def _numbers(entry: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN: null stands for it, but for a margin that one span cannot give."""
    return {k: math.nan if v is None and k != "margin" else v for k, v in entry.items()}
