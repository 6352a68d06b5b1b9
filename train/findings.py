"""What the numbers of a comparison say, in sentences: who wins, by how much, and where nobody does.

Each mixer is compared with the softmax baseline, or with the first mixer where there is none. Two
groups of seeds differ if Student's t does at 95 %; two speeds, if their ranges do not overlap.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean, variance
from typing import Any, NamedTuple

from train.readable import (
    count_range,
    listed,
    mean_and_deviation,
    ratio_digits,
    readable_bytes,
    readable_seconds,
    three_digits,
)

SMALLEST_GAP = 0.01
"""With one seed each, a smaller relative gap is never called a difference. One seed gives no
estimate of noise, and reruns of small models often differ by this much."""

STUDENT_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
"""Two-sided 95 % quantiles for 1, 2, ... degrees of freedom; the last also stands for more."""

SOFTMAX = ("attention", "attention:softmax", "softmax")


class EqualTime(NamedTuple):
    """Bits per byte of each mixer's seeds after the same training time."""

    seconds: float
    values: dict[str, list[float]]


def summary_lines(results: dict[str, Any]) -> list[str]:
    """Sentences computed from the results of `ebb compare`: each can come out either way."""
    models = results["models"]
    base, others = _baseline(models)
    lines = [_setup(results), *_failures(results)]
    scored = {m["mixer"]: values for m in models if (values := _finite_bits_per_byte(m))}
    if len(scored) > 2:
        lines.append(_ranking(scored))
    both_scored = [m for m in others if {m["mixer"], base["mixer"]} <= scored.keys()]
    lines += [_quality(m["mixer"], base["mixer"], scored) for m in both_scored]
    if (equal := equal_time(results)) is not None:
        lines.append(_at_equal_time(equal))
    lines += [_training_speed(model, base) for model in others]
    for model in others:
        lines += _generation(model, base)
    lines += _growth(models)
    seeds = max(len(model["runs"]) for model in models)
    if seeds == 1:
        lines.append(
            "Each model was trained with one seed only: how far the loss varies from seed to seed "
            "is unknown, so small differences mean nothing."
        )
    else:
        lines.append(
            f"Values after ± are standard deviations over {seeds} seeds; a difference in loss is "
            "called one only if Student's t-test finds it at 95 %."
        )
    return lines


def differ(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two groups of seeds differ by more than their noise explains."""
    gap = abs(fmean(a) - fmean(b))
    freedom = len(a) + len(b) - 2
    if freedom == 0:
        return gap > SMALLEST_GAP * min(abs(fmean(a)), abs(fmean(b)))
    squares = sum((len(x) - 1) * variance(x) for x in (a, b) if len(x) > 1)
    error = math.sqrt(squares / freedom * (1 / len(a) + 1 / len(b)))
    return gap > STUDENT_T[min(freedom, len(STUDENT_T)) - 1] * error


def leaders(values: Mapping[str, Sequence[float]]) -> list[str]:
    """The mixer with the lowest mean first, then those that do not differ from it."""
    best, *rest = sorted(values, key=lambda mixer: fmean(values[mixer]))
    return [best, *(mixer for mixer in rest if not differ(values[best], values[mixer]))]


def overlap(a: Mapping[str, float], b: Mapping[str, float]) -> bool:
    """Whether two measured ranges `low` to `high` have a point in common."""
    return a["low"] <= b["high"] and b["low"] <= a["high"]


def equal_time(results: dict[str, Any]) -> EqualTime | None:
    """Every mixer where the shortest run ended, linear between validations.

    Returns:
        None for one mixer, or where some run had not been validated by then. Mixers that diverged
        are left out.
    """
    curves = {
        m["mixer"]: [
            [p for p in run["validation_curve"] if math.isfinite(p["bits_per_byte"])]
            for run in m["runs"]
        ]
        for m in results["models"]
        if _finite_bits_per_byte(m)
    }
    every = [curve for runs in curves.values() for curve in runs]
    if len(curves) < 2 or not all(every):
        return None
    seconds = min(curve[-1]["seconds"] for curve in every)
    if any(curve[0]["seconds"] > seconds for curve in every):
        return None
    values = {mixer: [_value_at(curve, seconds) for curve in c] for mixer, c in curves.items()}
    return EqualTime(seconds, values)


def is_softmax(mixer: str) -> bool:
    """Whether a mixer is the softmax baseline."""
    return mixer in SOFTMAX


def growing(models: Sequence[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """The mixers whose state grew with the context, and those whose state did not."""
    grown: list[str] = []
    constant: list[str] = []
    for model in models:
        sizes = [point["state_bytes"] for point in model["generation"]]
        if len(sizes) > 1:
            (grown if max(sizes) > min(sizes) else constant).append(model["mixer"])
    return grown, constant


def _baseline(models: list[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    base = next((model for model in models if is_softmax(model["mixer"])), models[0])
    return base, [model for model in models if model is not base]


def _finite_bits_per_byte(model: dict[str, Any]) -> list[float]:
    values = [run["validation_bits_per_byte"] for run in model["runs"]]
    return values if all(math.isfinite(value) for value in values) else []


def _value_at(curve: list[dict[str, Any]], seconds: float) -> float:
    for before, after in pairwise(curve):
        if before["seconds"] <= seconds < after["seconds"]:
            part = (seconds - before["seconds"]) / (after["seconds"] - before["seconds"])
            step = after["bits_per_byte"] - before["bits_per_byte"]
            return float(before["bits_per_byte"] + part * step)
    return float(curve[-1]["bits_per_byte"])


def _setup(results: dict[str, Any]) -> str:
    models, seeds = results["models"], max(len(m["runs"]) for m in results["models"])
    parameters = count_range([m["parameters"] for m in models])
    tokens = count_range([run["tokens"] for m in models for run in m["runs"]])
    return (
        f"{listed([m['mixer'] for m in models])}: {parameters} parameters, trained on {tokens} "
        f"tokens of {results['settings']['data'].rstrip('/').rpartition('/')[2]} with "
        f"{'one seed' if seeds == 1 else f'{seeds} seeds'}{' each' if len(models) > 1 else ''}."
    )


def _failures(results: dict[str, Any]) -> list[str]:
    guessing = math.log(results["data"]["vocab_size"])
    lines: list[str] = []
    for model in results["models"]:
        losses = [run["validation_loss"] for run in model["runs"]]
        if not all(math.isfinite(loss) for loss in losses):
            lines.append(f"{model['mixer']} diverged: its validation loss is not a finite number.")
        elif fmean(losses) >= guessing:
            lines.append(
                f"{model['mixer']} has learned nothing: its validation loss, {fmean(losses):.3f}, "
                f"is no lower than that of guessing among all tokens, {guessing:.3f}."
            )
    return lines


def _ranking(scored: dict[str, list[float]]) -> str:
    best, *tied = leaders(scored)
    text = (
        f"Best at predicting the validation text: {best}, {fmean(scored[best]):.3f} bits per byte"
    )
    return f"{text}, with no difference found to {listed(tied)}." if tied else f"{text}."


def _quality(mixer: str, base: str, scored: dict[str, list[float]]) -> str:
    better, worse = sorted((mixer, base), key=lambda name: fmean(scored[name]))
    values = (
        f"{mean_and_deviation(scored[better])} against {mean_and_deviation(scored[worse])} "
        "bits per byte"
    )
    if not differ(scored[better], scored[worse]):
        single = len(scored[better]) + len(scored[worse]) == 2
        reason = "one seed each cannot tell a gap this small" if single else "within seed noise"
        return (
            f"No difference found between {better} and {worse} in predicting the validation text: "
            f"{values}; {reason}."
        )
    fewer = 100 * (1 - fmean(scored[better]) / fmean(scored[worse]))
    return (
        f"{better} predicts the validation text better than {worse}: {values} "
        f"({fewer:.1f} % fewer)."
    )


def _at_equal_time(equal: EqualTime) -> str:
    best, *tied = leaders(equal.values)
    order = sorted(equal.values, key=lambda mixer: fmean(equal.values[mixer]))
    values = ", ".join(f"{mixer} {mean_and_deviation(equal.values[mixer])}" for mixer in order)
    time = readable_seconds(equal.seconds)
    if tied:
        found = f"no difference found between {listed([best, *tied])}"
        found += ", ahead of the rest" if len(order) > len(tied) + 1 else ""
    else:
        found = f"{best} is ahead"
    return f"After an equal training time of {time}, {found} (bits per byte: {values})."


def _training_speed(model: dict[str, Any], base: dict[str, Any]) -> str:
    slow, fast = sorted(
        (model, base), key=lambda m: float(m["training_speed"]["tokens_per_second"])
    )
    speeds = [m["training_speed"] for m in (fast, slow)]
    high, low = (speed["tokens_per_second"] for speed in speeds)
    values = f"{high:,.0f} against {low:,.0f} tokens a second"
    if overlap(*speeds):
        return (
            f"No difference found in training speed between {fast['mixer']} and {slow['mixer']}: "
            f"{values}, and the measured ranges overlap."
        )
    ratio = ratio_digits(high / low)
    return f"{fast['mixer']} trains {ratio} times as fast as {slow['mixer']}: {values}."


def _generation(model: dict[str, Any], base: dict[str, Any]) -> list[str]:
    """One sentence at the largest common context, and one about all the others."""
    by_context = [{p["context"]: p for p in m["generation"]} for m in (model, base)]
    contexts = sorted(by_context[0].keys() & by_context[1].keys())
    if not contexts:
        return []
    points = [(c, by_context[0][c], by_context[1][c]) for c in contexts]
    largest, mine, theirs = points[-1]
    mixer, name = model["mixer"], base["mixer"]
    speed_winner, speed = _speed_clause(mixer, mine, name, theirs)
    size_winner, size = _size_clause(mixer, mine["state_bytes"], name, theirs["state_bytes"])
    if speed_winner is not None and speed_winner == size_winner:
        clauses = f"{speed} and {size.removeprefix(f'{size_winner} ')}"
    else:
        clauses = f"{speed}; {size}"
    lines = [f"At a context of {largest:,} tokens {clauses}."]
    if len(points) > 1:
        lines.append(_crossover(mixer, name, points))
    return lines


def _speed_clause(
    a: str, point_a: dict[str, Any], b: str, point_b: dict[str, Any]
) -> tuple[str | None, str]:
    (fast, quick), (slow, other) = sorted(
        ((a, point_a), (b, point_b)), key=lambda item: float(item[1]["ms_per_token"])
    )
    low, high = quick["ms_per_token"], other["ms_per_token"]
    values = f"{three_digits(low)} against {three_digits(high)} ms"
    if overlap(point_a, point_b):
        return None, (
            f"no difference was found in the time {fast} and {slow} take for a token ({values})"
        )
    return (
        fast,
        f"{fast} generates a token {ratio_digits(high / low)} times as fast as {slow} ({values})",
    )


def _size_clause(a: str, bytes_a: int, b: str, bytes_b: int) -> tuple[str | None, str]:
    (small, low), (_, high) = sorted(((a, bytes_a), (b, bytes_b)), key=lambda item: item[1])
    if low == high:
        return None, f"both need {readable_bytes(low)} for their state"
    values = f"{readable_bytes(low)} against {readable_bytes(high)}"
    ratio = f"{ratio_digits(high / max(low, 1))} times less memory"
    return small, f"{small} needs {ratio} for its state ({values})"


def _crossover(
    mixer: str, base: str, points: list[tuple[int, dict[str, Any], dict[str, Any]]]
) -> str:
    """Who is faster where; contexts at which the measured ranges overlap count for nobody."""
    clear = [
        (context, mixer if mine["ms_per_token"] < theirs["ms_per_token"] else base)
        for context, mine, theirs in points
        if not overlap(mine, theirs)
    ]
    if not clear:
        return f"At no context was a difference in time found between {mixer} and {base}."
    first = clear[0][1]
    changes = [(before[0], after[0]) for before, after in pairwise(clear) if before[1] != after[1]]
    smallest, mine, theirs = points[0]
    at_start = _speed_clause(mixer, mine, base, theirs)[1]
    if len(changes) > 1:
        return (
            f"Which of {mixer} and {base} is faster changes {len(changes)} times between "
            f"{clear[0][0]:,} and {clear[-1][0]:,} tokens: there is no clear crossover."
        )
    if changes:
        (last_before, first_after) = changes[0]
        second = base if first == mixer else mixer
        return (
            f"Crossover: up to {last_before:,} tokens of context {first} is the faster of the two, "
            f"from {first_after:,} on {second} is; at {smallest:,} tokens {at_start}."
        )
    slower = base if first == mixer else mixer
    if len(clear) == 1:
        where = f"at {clear[0][0]:,} tokens, the only context where a difference was found"
    else:
        where = f"at every context from {clear[0][0]:,} to {clear[-1][0]:,} tokens"
        where += " where a difference was found" if len(clear) < len(points) else ""
    return (
        f"There is no crossover: {first} is faster than {slower} {where}; at {smallest:,} tokens "
        f"{at_start}."
    )


def _growth(models: list[dict[str, Any]]) -> list[str]:
    grown, constant = growing(models)
    lines: list[str] = []
    for model in models:
        if model["mixer"] in grown:
            points = sorted(model["generation"], key=lambda point: int(point["context"]))
            first, last = points[0], points[-1]
            what = "KV cache" if model["mixer"].startswith(SOFTMAX) else "state"
            lines.append(
                f"The {what} of {model['mixer']} grows with the context: from "
                f"{readable_bytes(first['state_bytes'])} at {first['context']:,} tokens to "
                f"{readable_bytes(last['state_bytes'])} at {last['context']:,}."
            )
    if constant:
        lines.append(f"The state of {listed(constant)} does not grow with the context.")
    return lines
