"""What the numbers of a comparison say, in sentences: who wins, by how much, and where nobody does.

Each mixer is compared with the softmax baseline, or with the first mixer where there is none. A
difference in loss is one if it exceeds the noise from seed to seed (`train.intervals`).
"""

import math
from statistics import fmean
from typing import Any, NamedTuple

from train.intervals import gap
from train.readable import (
    count_range,
    listed,
    readable_flops,
    readable_seconds,
    with_margin,
)
from train.report import costs, studies
from train.report.outcomes import (
    Equal,
    Scores,
    baseline,
    divergence,
    equal_compute,
    equal_time,
    finished,
    is_softmax,
    leaders,
    num_seeds,
    scores,
)
from train.report.paths import without_folders


class Section(NamedTuple):
    """Sentences on one question."""

    title: str
    lines: list[str]


def summary_lines(results: dict[str, Any]) -> list[str]:
    """Sentences computed from the results of `ebb compare`: each can come out either way."""
    return [line for section in summary(results) for line in section.lines]


def summary(results: dict[str, Any]) -> list[Section]:
    """The same by question, the verdict first; a question that was not asked is left out."""
    models = results["models"]
    base, others = baseline(models)
    writing = [line for model in others for line in costs.generation(model, base)]
    sections = [
        Section("In short", [*_verdict(results), _setup(results), *_failures(results)]),
        Section("Quality", _qualities(results)),
        Section("Training speed", [costs.training_speed(model, base) for model in others]),
        Section("Generation and memory", [*writing, *costs.growth(models)]),
        Section("Longer contexts", studies.lengths(models)),
        Section("Tasks", studies.tasks(models)),
        Section("How sure this is", [*studies.tuning(models), _noise(models)]),
    ]
    return [section for section in sections if section.lines]


def _verdict(results: dict[str, Any]) -> list[str]:
    """Whether softmax won; nothing where it did not take part or has no score."""
    base, others = baseline(results["models"])
    scored = scores(results["models"])
    rivals = [m["mixer"] for m in others if m["mixer"] in scored]
    name = base["mixer"]
    if not is_softmax(name) or name not in scored or not rivals:
        return []
    found = {mixer: gap(scored[name], scored[mixer]) for mixer in rivals}
    ahead = [mixer for mixer, g in found.items() if g.clear and g.mean < 0]
    tied = [mixer for mixer, g in found.items() if not g.clear]
    behind = [mixer for mixer, g in found.items() if g.clear and g.mean > 0]
    softmax = "softmax" if "softmax" in name else f"softmax ({name})"
    if not ahead and not tied:
        text = f"{softmax} wins at predicting this text: it is ahead of "
        text += _by_how_much(behind, found)
    elif not ahead:
        text = f"No difference found between {softmax} and {listed(tied)} in predicting this text"
        text += f"; softmax is ahead of {_by_how_much(behind, found)}" if behind else ""
    else:
        verb = "beats" if len(ahead) == 1 else "beat"
        text = f"{softmax} is not needed to predict this text: "
        text += f"{_by_how_much(ahead, found)} {verb} it"
        text += f"; no difference found to {listed(tied)}" if tied else ""
        text += f"; softmax is ahead of {_by_how_much(behind, found)}" if behind else ""
    text += " (gaps in bits per byte)" if ahead or behind else ""
    if any(g.margin is None for g in found.values()):
        text += ". One seed each: the noise from seed to seed is unknown, so "
        text += "this may be chance" if ahead or behind else "a difference may be hidden"
    return [f"{text[0].upper()}{text[1:]}."]


def _by_how_much(mixers: list[str], found: dict[str, Any]) -> str:
    return listed([f"{mixer} (by {abs(found[mixer].mean):.3f})" for mixer in mixers])


def _setup(results: dict[str, Any]) -> str:
    models, seeds = results["models"], num_seeds(results["models"])
    parameters = count_range([m["parameters"] for m in models])
    whole = [run["tokens"] for m in models for run in m["runs"] if divergence(run) is None]
    tokens = count_range(whole or [run["tokens"] for m in models for run in m["runs"]])
    return (
        f"{listed([m['mixer'] for m in models])}: {parameters} parameters, trained on {tokens} "
        f"tokens of {without_folders(results['data']['name'])} with "
        f"{'one seed' if seeds == 1 else f'{seeds} seeds'}{' each' if len(models) > 1 else ''}."
    )


def _failures(results: dict[str, Any]) -> list[str]:
    guessing = math.log(results["data"]["vocab_size"])
    lines: list[str] = []
    for model in results["models"]:
        name, found = model["mixer"], [d for run in model["runs"] if (d := divergence(run))]
        if found:
            how = [
                f"seed {d.seed}{'' if d.step is None else f' at step {d.step:,}'} ({d.reason})"
                for d in found
            ]
            lines.append(
                f"{name} diverged in {len(found)} of {len(model['runs'])} runs: {listed(how)}. It "
                "is left out of the comparisons of loss."
            )
        losses = list(finished(model, "validation_loss").values())
        if losses and fmean(losses) >= guessing:
            lines.append(
                f"{name} has learned nothing: its validation loss, {fmean(losses):.3f}, "
                f"is no lower than that of guessing among all tokens, {guessing:.3f}."
            )
    return lines


def _qualities(results: dict[str, Any]) -> list[str]:
    base, others = baseline(results["models"])
    scored = scores(results["models"])
    lines = [_ranking(scored)] if len(scored) - (base["mixer"] in scored) > 1 else []
    both = [m["mixer"] for m in others if {m["mixer"], base["mixer"]} <= scored.keys()]
    lines += [_quality(mixer, base["mixer"], scored) for mixer in both]
    if (equal := equal_time(results)) is not None:
        lines.append(_at_equal(f"training time of {readable_seconds(equal.amount)}", equal))
    if (equal := equal_compute(results)) is not None:
        lines.append(_at_equal(f"compute of {readable_flops(equal.amount)} FLOPs", equal))
    return lines


def _ranking(scored: dict[str, Scores]) -> str:
    best, *tied = leaders(scored)
    score = with_margin(list(scored[best].values()))
    text = f"Best at predicting the validation text: {best}, {score} bits per byte"
    return f"{text}, with no difference found to {listed(tied)}." if tied else f"{text}."


def _quality(mixer: str, base: str, scored: dict[str, Scores]) -> str:
    better, worse = sorted((mixer, base), key=lambda name: fmean(scored[name].values()))
    low, high = scored[better], scored[worse]
    values = (
        f"{with_margin(list(low.values()))} against {with_margin(list(high.values()))} "
        "bits per byte"
    )
    found = gap(low, high)
    difference = "" if found.margin is None else f"{found.mean:.3f} ± {found.margin:.3f}"
    if not found.clear:
        reason = f"the difference, {difference}, is within seed noise"
        if found.margin is None:
            reason = "one seed each cannot tell a gap this small"
        return (
            f"No difference found between {better} and {worse} in predicting the validation text: "
            f"{values}; {reason}."
        )
    fewer = 100 * (1 - fmean(low.values()) / fmean(high.values()))
    noise = f"; the difference, {difference}, exceeds the seed noise" if difference else ""
    return (
        f"{better} predicts the validation text better than {worse}: {values} "
        f"({fewer:.1f} % fewer){noise}."
    )


def _at_equal(what: str, equal: Equal) -> str:
    best, *tied = leaders(equal.values)
    order = sorted(equal.values, key=lambda mixer: fmean(equal.values[mixer].values()))
    values = ", ".join(f"{m} {with_margin(list(equal.values[m].values()))}" for m in order)
    if tied:
        found = f"no difference found between {listed([best, *tied])}"
        found += ", ahead of the rest" if len(order) > len(tied) + 1 else ""
    else:
        found = f"{best} is ahead"
    return f"After an equal {what}, {found} (bits per byte: {values})."


def _noise(models: list[dict[str, Any]]) -> str:
    seeds = num_seeds(models)
    if seeds == 1:
        return (
            "Each model was trained with one seed only: how far the loss varies from seed to seed "
            "is unknown, so small differences mean nothing."
        )
    return (
        f"Values after ± are half the 95 % interval of the mean over {seeds} seeds (Student's t). "
        "A difference in loss is called one only if its own 95 % interval, seed by seed, leaves "
        "zero out; one in twenty such intervals does so by chance."
    )
