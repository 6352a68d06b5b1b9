"""What training and generation cost, in sentences; each can come out either way.

Two speeds differ if the middle halves of their measurements do not overlap.
"""

from itertools import pairwise
from typing import Any

from train.readable import listed, ratio_digits, readable_bytes, three_digits
from train.report.outcomes import SOFTMAX, growing, overlap


def training_speed(model: dict[str, Any], base: dict[str, Any]) -> str:
    """Who trains faster, and by how much."""
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


def generation(model: dict[str, Any], base: dict[str, Any]) -> list[str]:
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


def growth(models: list[dict[str, Any]]) -> list[str]:
    """Whose state grows with the context, as measured."""
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
