"""What stands in `results.json`, as the report asks for it; keys that came later may be missing."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any, NamedTuple

from train.intervals import gap

SOFTMAX = ("attention", "attention:softmax", "softmax")

Scores = Mapping[int, float]
"""A value for each seed."""


class Divergence(NamedTuple):
    """A run that did not end in a loss."""

    seed: int
    step: int | None
    reason: str


class Equal(NamedTuple):
    """Bits per byte of each mixer after the same training time or compute."""

    amount: float
    values: dict[str, Scores]


def is_softmax(mixer: str) -> bool:
    """Whether a mixer is the softmax baseline."""
    return mixer in SOFTMAX


def baseline(models: list[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The model that the others are compared with, and the others: softmax, or the first."""
    base = next((model for model in models if is_softmax(model["mixer"])), models[0])
    return base, [model for model in models if model is not base]


def divergence(run: Mapping[str, Any]) -> Divergence | None:
    """Why a run has no final loss; None if it has one."""
    if (found := run.get("diverged")) is not None:
        return Divergence(run["seed"], found["step"], found["reason"])
    if finite(run["validation_loss"]) and finite(run["validation_bits_per_byte"]):
        return None
    return Divergence(run["seed"], None, "its validation loss is not a finite number")


def finite(value: Any) -> bool:
    """Whether a value is a number at all: a loss may be None, infinite or NaN."""
    return value is not None and math.isfinite(value)


def finished(model: Mapping[str, Any], key: str) -> dict[int, float]:
    """A value of the runs that ended in a loss, by seed."""
    return {run["seed"]: float(run[key]) for run in model["runs"] if divergence(run) is None}


def samples(models: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The models that wrote something, one of whose runs at least has finished."""
    return [m for m in models if m.get("sample") and finished(m, "validation_loss")]


def scores(models: Sequence[dict[str, Any]]) -> dict[str, Scores]:
    """Bits per byte of the mixers of which no run diverged: luck with the others is no merit."""
    found = {model["mixer"]: finished(model, "validation_bits_per_byte") for model in models}
    return {m["mixer"]: v for m in models if len(v := found[m["mixer"]]) == len(m["runs"])}


def leaders(values: Mapping[str, Scores]) -> list[str]:
    """The mixer with the lowest mean first, then those that do not differ from it."""
    best, *rest = sorted(values, key=lambda mixer: fmean(values[mixer].values()))
    return [best, *(mixer for mixer in rest if not gap(values[best], values[mixer]).clear)]


def overlap(a: Mapping[str, float], b: Mapping[str, float]) -> bool:
    """Whether two measured ranges `low` to `high` have a point in common."""
    return a["low"] <= b["high"] and b["low"] <= a["high"]


def equal_time(results: dict[str, Any]) -> Equal | None:
    """Every mixer where the shortest run ended, linear between validations.

    Returns:
        None for one mixer, or where some run had not been validated by then. Mixers that diverged
        are left out.
    """
    return _equal(results["models"], "seconds", {})


def equal_compute(results: dict[str, Any]) -> Equal | None:
    """Every mixer after the FLOPs of the cheapest run; as `equal_time` otherwise.

    Returns:
        None also where the FLOPs of a mixer are not known, or are the same for all.
    """
    costs = {model["mixer"]: model.get("flops_per_token") for model in results["models"]}
    if not all(costs.values()) or len(set(costs.values())) == 1:
        return None
    return _equal(results["models"], "tokens", costs)


def growing(models: Sequence[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """The mixers whose state grew with the context, and those whose state did not."""
    grown: list[str] = []
    constant: list[str] = []
    for model in models:
        sizes = [point["state_bytes"] for point in model["generation"]]
        if len(sizes) > 1:
            (grown if max(sizes) > min(sizes) else constant).append(model["mixer"])
    return grown, constant


def num_seeds(models: Sequence[dict[str, Any]]) -> int:
    """Seeds of the mixer that has most."""
    return max(len(model["runs"]) for model in models)


def _equal(
    models: Sequence[dict[str, Any]], key: str, costs: Mapping[str, float | None]
) -> Equal | None:
    whole = scores(models)
    curves = {
        m["mixer"]: {
            run["seed"]: [
                (point[key] * (costs.get(m["mixer"]) or 1.0), point["bits_per_byte"])
                for point in run["validation_curve"]
                if finite(point["bits_per_byte"])
            ]
            for run in m["runs"]
        }
        for m in models
        if m["mixer"] in whole
    }
    every = [curve for runs in curves.values() for curve in runs.values()]
    if len(curves) < 2 or not all(every):
        return None
    amount = min(curve[-1][0] for curve in every)
    if any(curve[0][0] > amount for curve in every):
        return None
    return Equal(
        amount,
        {
            mixer: {seed: _value_at(curve, amount) for seed, curve in runs.items()}
            for mixer, runs in curves.items()
        },
    )


def _value_at(curve: Sequence[tuple[float, float]], amount: float) -> float:
    for (before, low), (after, high) in pairwise(curve):
        if before <= amount < after:
            return low + (amount - before) / (after - before) * (high - low)
    return curve[-1][1]
