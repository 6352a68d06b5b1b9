"""What the instruments read in a comparison: a table, charts, and what each of them says."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from train.readable import listed, ratio_digits, short_context, short_number, three_digits
from train.report.chart import Axis, Chart, Line, Points, count_text, plain
from train.report.outcomes import divergence, finite

ROOT = "attention_norm.sqrt_tokens"
"""The reading that the norm is compared with."""
NEAR_ZERO = 1e-3
"""Of a sum of weights; what is below it is called so."""
CHANGE = 1.2
"""How many times as large a state must have become to be said to grow along the text."""

ByLayer = Mapping[str, Mapping[int, float]]
"""By mixer and layer, the mean over seeds at the end of training."""


class Kind(NamedTuple):
    """One kind of reading."""

    title: str
    unit: str
    column: str
    """Its heading in the table."""
    of_layers: Callable[[Sequence[float]], float]
    """One number of those of all layers."""
    says: Callable[[ByLayer, float], str]
    """A sentence, from the values and the root of the tokens."""
    is_log: bool = False
    in_training: bool = False
    """Whether it is drawn over training too."""


def kinds_of(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """The kinds that were read, in the order in which they are shown."""
    return [name for name in KINDS if any(by_layer(model, name) for model in models)]


def by_layer(model: Mapping[str, Any], kind: str) -> dict[int, float]:
    """At the end of training, the mean over the seeds that finished; the least of the divisors."""
    found: dict[int, list[float]] = {}
    for readings in _last(model):
        for name, value in readings.items():
            what, _, where = name.partition(".")
            if what == kind and where.startswith("layer") and where[5:].isdecimal():
                found.setdefault(int(where[5:]), []).append(float(value))
    return {layer: _of_seeds(kind)(values) for layer, values in sorted(found.items())}


def charts(models: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Of each kind the end of training by layer; of some, the course too; states along the text."""
    root = _root(models)
    found: list[Chart] = []
    for name in kinds_of(models):
        kind = KINDS[name]
        values = {m["mixer"]: by_layer(m, name) for m in models}
        note = kind.says({mixer: layers for mixer, layers in values.items() if layers}, root)
        level = root if name == "attention_norm" and root else None
        lines = [Line(n, list(layers.items())) for n, layers in enumerate(values.values())]
        ticks = sorted({float(layer) for layers in values.values() for layer in layers})
        x = Axis("Layer", "{:g}".format, ticks=ticks)
        found += _chart(f"{kind.title} by layer", x, kind, lines, note, level)
        if kind.in_training:
            x = Axis("Training tokens", count_text)
            lines = [Line(n, _course(model, name, kind)) for n, model in enumerate(models)]
            if max(len(line.points) for line in lines) > 1:
                note = _course_note(models, lines, kind)
                found += _chart(f"{kind.title} over training", x, kind, lines, note, level)
        if name in ("state_norm", "state_rank"):
            lines = [Line(n, _along(model, name)) for n, model in enumerate(models)]
            if any(line.points for line in lines):
                ticks = sorted({at for line in lines for at, _ in line.points})
                x = Axis("Tokens read", short_context, ticks=ticks)
                note = _along_note(models, lines, kind)
                found += _chart(f"{kind.title} along the text", x, kind, lines, note, None)
    return found


def sentences(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the charts say, each under its title."""
    return [f"{chart.title}: {chart.note}" for chart in charts(models)]


def _chart(
    title: str, x: Axis, kind: Kind, lines: Sequence[Line], note: str, level: float | None
) -> list[Chart]:
    """One, or none where there is nothing to draw; on a log axis only what is above zero."""
    drawn = [
        line._replace(points=[p for p in line.points if p[1] > 0 or not kind.is_log])
        for line in lines
    ]
    drawn = [line for line in drawn if line.points]
    unit = f"{kind.unit}, log" if kind.is_log else kind.unit
    y = Axis(unit, short_number if kind.is_log else plain, log=kind.is_log)
    return [Chart(title, x, y, drawn, note, level)] if drawn else []


def _last(model: Mapping[str, Any]) -> list[dict[str, float]]:
    """The last readings of each run that finished."""
    runs = [run for run in model["runs"] if divergence(run) is None]
    return [run["instruments"][-1] for run in runs if run.get("instruments")]


def _root(models: Sequence[Mapping[str, Any]]) -> float:
    """Of the tokens that were read; 0 where it is not known."""
    return max((r.get(ROOT, 0.0) for model in models for r in _last(model)), default=0.0)


def _course(model: Mapping[str, Any], name: str, kind: Kind) -> Points:
    """One number of all layers at each validation, of the seeds that finished."""
    found: dict[float, list[float]] = {}
    for run in model["runs"]:
        if divergence(run) is None:
            for readings in run.get("instruments") or []:
                values = _whole_layers(readings, name)
                if values:
                    found.setdefault(readings["tokens"], []).append(kind.of_layers(values))
    return [(tokens, _of_seeds(name)(values)) for tokens, values in sorted(found.items())]


def _of_seeds(kind: str) -> Callable[[Sequence[float]], float]:
    return min if KINDS[kind].of_layers is min else fmean


def _whole_layers(readings: Mapping[str, float], name: str) -> list[float]:
    return [v for key, v in readings.items() if key.startswith(f"{name}.l") and key.count(".") == 1]


def _along(model: Mapping[str, Any], name: str) -> Points:
    """After so many tokens, the mean over layers and seeds."""
    found: dict[int, list[float]] = {}
    for readings in _last(model):
        for key, value in readings.items():
            what, _, where = key.partition(".")
            _, _, tokens = where.partition(".token")
            if what == name and tokens.isdecimal():
                found.setdefault(int(tokens), []).append(float(value))
    return [(tokens, fmean(values)) for tokens, values in sorted(found.items())]


def _course_note(models: Sequence[Mapping[str, Any]], lines: Sequence[Line], kind: Kind) -> str:
    """From where to where it went between the first validation and the last."""
    changes = []
    for line in lines:
        if len(line.points) > 1:
            first, last = (three_digits(line.points[place][1]) for place in (0, -1))
            how = f"from {first} to {last}" if first != last else f"stayed at {first}"
            changes.append(f"{models[line.mixer]['mixer']} {how}")
    which = "largest" if kind.of_layers is max else "smallest" if kind.of_layers is min else "mean"
    return f"The {which} of all layers went, in training: {', '.join(changes)}."


def _along_note(models: Sequence[Mapping[str, Any]], lines: Sequence[Line], kind: Kind) -> str:
    """What the states still do at the end of the text."""
    found: dict[str, list[str]] = {"still grows": [], "still shrinks": [], "has settled": []}
    for line in lines:
        if len(line.points) > 1:
            (_, before), (_, last) = line.points[-2:]
            how = "still grows" if last > CHANGE * before else "has settled"
            how = "still shrinks" if CHANGE * last < before else how
            found[how].append(models[line.mixer]["mixer"])
    parts = [f"{how} in {listed(names)}" for how, names in found.items() if names]
    return f"In the last quarter of the text the {kind.column} {', '.join(parts)}." if parts else ""


def _summed(values: ByLayer, of_layers: Callable[[Sequence[float]], float]) -> dict[str, float]:
    return {mixer: of_layers(list(layers.values())) for mixer, layers in values.items()}


def _ends(values: ByLayer, most: str, least: str, unit: str) -> str:
    """Who has the most and who the least of something, by the mean over layers."""
    found = _summed(values, fmean)
    order = sorted(found, key=lambda mixer: -found[mixer])
    high, low = (three_digits(found[order[place]]) for place in (0, -1))
    if len(order) > 1 and high == low:
        return f"No difference between {listed(order)}: {high} {unit} in the mean over layers."
    text = f"{order[0]} {most}: {high} {unit} in the mean over layers"
    return f"{text}; {order[-1]} {least}: {low}." if len(order) > 1 else f"{text}."


def _norm(values: ByLayer, root: float) -> str:
    largest = _summed(values, max)
    name = max(largest, key=lambda mixer: largest[mixer])
    text = f"The largest is that of {name}, {three_digits(largest[name])} in one layer"
    if not root:
        return f"{text}."
    over = [mixer for mixer, value in largest.items() if value > root]
    found = listed(over) if over else "none"
    verb = "exceed" if len(over) > 1 else "exceeds"
    limit = f"{three_digits(root)}, the root of the tokens (dashed)"
    return f"{text}; softmax cannot exceed {limit}, and {found} {verb} it."


def _divisor(values: ByLayer, root: float) -> str:
    least = _summed(values, min)
    shown = ", ".join(f"{mixer} {three_digits(value)}" for mixer, value in least.items())
    near = [mixer for mixer, value in least.items() if value < NEAR_ZERO]
    text = f"The least that a row of weights is divided by: {shown}"
    if not near:
        return f"{text}; none comes near zero, where weights would jump."
    return f"{text}; so near zero the weights and gradients of {listed(near)} can jump."


def _entropy(values: ByLayer, root: float) -> str:
    means = _summed(values, fmean)
    alike = ", ".join(f"{mixer} {three_digits(math.exp(v))}" for mixer, v in means.items())
    return f"It is as wide as an even look at so many tokens: {alike}."


def _half_life(values: ByLayer, root: float) -> str:
    shown = []
    for mixer, layers in values.items():
        low, high = (three_digits(f(layers.values())) for f in (min, max))
        shown.append(f"{mixer} {low} to {high}" if low != high else f"{mixer} {low} in all layers")
    text = "By its decay alone, half of what a layer wrote is gone after so many tokens"
    return f"{text}: {', '.join(shown)}."


def _gradient(values: ByLayer, root: float) -> str:
    shown = []
    for mixer, layers in values.items():
        low, high = min(layers.values()), max(layers.values())
        shown.append(f"{mixer} {ratio_digits(high / low) if low > 0 else '(the smallest is zero)'}")
    return f"The largest layer's is so many times the smallest's: {', '.join(shown)}."


KINDS = {
    "attention_norm": Kind(
        "Norm of the attention matrix",
        *("Frobenius norm", "largest norm", max, _norm),
        is_log=True,
        in_training=True,
    ),
    "smallest_divisor": Kind(
        "Smallest divisor of the weights",
        *("sum of weights", "smallest divisor", min, _divisor),
        is_log=True,
        in_training=True,
    ),
    "attention_entropy": Kind(
        "Entropy of the attention",
        *("nats", "entropy, nats", fmean, _entropy),
        in_training=True,
    ),
    "attention_span": Kind(
        "Span of the attention",
        *("tokens back", "span, tokens", fmean),
        lambda values, _: _ends(values, "looks farthest back", "nearest", "tokens"),
    ),
    "half_life": Kind(
        "Half-life of the decays",
        *("tokens", "half-life, tokens", fmean, _half_life),
        is_log=True,
    ),
    "state_norm": Kind(
        "Norm of the state",
        *("Frobenius norm", "state norm", fmean),
        lambda values, _: _ends(values, "has the largest state", "the smallest", "(norm)"),
    ),
    "state_rank": Kind(
        "Effective rank of the state",
        *("directions", "state rank", fmean),
        lambda values, _: _ends(values, "uses most directions of its state", "fewest", "of them"),
    ),
    "gradient_norm": Kind(
        "Gradient",
        *("norm", "largest gradient", max, _gradient),
        is_log=True,
        in_training=True,
    ),
}
"""By name in `metrics.jsonl`, in the order in which they are shown."""


def cell(model: Mapping[str, Any], kind: str) -> float | None:
    """The number in the table: of all layers at once."""
    layers = by_layer(model, kind)
    value = KINDS[kind].of_layers(list(layers.values())) if layers else None
    return value if finite(value) else None
