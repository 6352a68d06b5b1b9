"""What was measured beyond one loss, in sentences: longer contexts, tasks, learning rates."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from train.lengths import LengthLoss, LengthStudy, PositionLoss
from train.readable import listed, with_margin
from train.report.outcomes import finite, leaders


class Accuracies(NamedTuple):
    """Of a mixer at one point of a task."""

    values: list[float]
    """One for each seed that did not diverge; the mean alone where the seeds were not kept."""
    diverged: int = 0
    """Seeds that did."""

    @property
    def text(self) -> str:
        """`93.1 ± 2.0 %`, the 95 % interval of the mean; and what diverged."""
        if not self.values:
            return "diverged"
        shown = f"{with_margin([100 * value for value in self.values], digits=1)} %"
        return f"{shown}, {self.diverged} diverged" if self.diverged else shown


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
    """Who is best at each task, at the last of its points, the hardest; and what diverged."""
    names = [name for name in tasks_of(models) if task_points(name, models)]
    return [line for name in names for line in _task(name, models)]


def tuning(models: Sequence[dict[str, Any]]) -> list[str]:
    """Which learning rate was picked, and whether its grid was wide enough."""
    grids = {m["mixer"]: m["tuning"] for m in models if m.get("tuning")}
    if not grids:
        return []
    tried = max(len(grid) for grid in grids.values())
    if tried == 1:
        return []
    rates = {m["mixer"]: m.get("learning_rate") for m in models if m["mixer"] in grids}
    failed = {
        name: sum(not finite(trial["validation_loss"]) for trial in grid)
        for name, grid in grids.items()
    }
    known = {name: f"{name} {rate:g}" for name, rate in rates.items() if rate is not None}
    best = [text for name, text in known.items() if failed[name] < len(grids[name])]
    own = [text for name, text in known.items() if failed[name] == len(grids[name])]
    some = [
        f"{name} at {count} of {len(grids[name])}"
        for name, count in failed.items()
        if 0 < count < len(grids[name])
    ]
    lines = []
    if best:
        of = f"Of {tried} learning rates tried with each mixer the best was taken"
        lines.append(f"{of}: {', '.join(best)}.")
    if own:
        lines.append(f"Diverged at every rate tried, so that its recipe's is taken: {listed(own)}.")
    if some:
        lines.append(f"Diverged at some of the rates tried: {listed(some)}.")
    edge = [
        name
        for name, grid in grids.items()
        if failed[name] < len(grid) > 1
        and rates[name] in _ends([trial["learning_rate"] for trial in grid])
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


def task_accuracies(
    name: str, point: Mapping[str, Any], model: Mapping[str, Any]
) -> Accuracies | None:
    """Of a mixer at a point; None where it was not asked."""
    for entry in (model.get("tasks") or {}).get(name, []):
        if entry["point"] == point:
            seeds = entry.get("seeds") or [entry["accuracy"]]
            values = [float(value) for value in seeds if finite(value)]
            return Accuracies(values, len(seeds) - len(values))
    return None


def task_failures(name: str, models: Sequence[dict[str, Any]]) -> str:
    """Which mixers diverged at a task, and how often; empty where none did."""
    found = []
    for model in models:
        widths: dict[Any, Accuracies] = {}  # a trial is asked at several points
        for point in task_points(name, models):
            if (asked := task_accuracies(name, point, model)) is not None:
                widths[point.get("width")] = asked
        failed = sum(asked.diverged for asked in widths.values())
        if failed:
            trials = failed + sum(len(asked.values) for asked in widths.values())
            found.append(f"{model['mixer']} in {failed} of {trials} trials")
    return f"Diverged at {name}: {listed(found)}." if found else ""


def _task(name: str, models: Sequence[dict[str, Any]]) -> list[str]:
    """A mixer of which a trial diverged is not compared: luck with the others is no merit."""
    point = task_points(name, models)[-1]
    asked = {m["mixer"]: a for m in models if (a := task_accuracies(name, point, m)) is not None}
    found = {mixer: a for mixer, a in asked.items() if not a.diverged}
    failures = task_failures(name, models)
    rule = "A mixer is not compared where one of its trials diverged."
    lines = [f"{failures} {rule}"] if failures else []
    if not found:
        return lines
    at = f"{name} at its last point ({point_text(point)})"
    negated = {mixer: {n: -v for n, v in enumerate(a.values)} for mixer, a in found.items()}
    order = sorted(found, key=lambda mixer: -fmean(found[mixer].values))
    shown = ", ".join(f"{mixer} {found[mixer].text}" for mixer in order)
    if len(found) == 1:
        return [f"{at}: {shown}.", *lines]
    best, *tied = leaders(negated)
    verdict = f"no difference found between {listed([best, *tied])}" if tied else f"{best} is ahead"
    unknown = "" if any(len(a.values) > 1 for a in found.values()) else ", with one seed each"
    return [f"{at}: {verdict}{unknown} ({shown}).", *lines]


def _ends(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _study(saved: Mapping[str, Any]) -> LengthStudy:
    kept: dict[str, Any] = {f.name: saved[f.name] for f in dataclasses.fields(LengthStudy)}
    unknown = "margin" if saved["spans"] == 1 else ""
    kept["lengths"] = tuple(LengthLoss(**_numbers(entry, unknown)) for entry in saved["lengths"])
    kept["positions"] = tuple(PositionLoss(**_numbers(entry)) for entry in saved["positions"])
    return LengthStudy(**kept)


def _numbers(entry: Mapping[str, Any], unknown: str = "") -> dict[str, Any]:
    """JSON knows no NaN: null stands for it, but for what is not known."""
    return {k: math.nan if v is None and k != unknown else v for k, v in entry.items()}
