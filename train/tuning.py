"""The learning rate of each mixer: its recipe's, or the best of a grid that is the same for all.

Every mixer gets as many short runs as every other, of the same seed, at the same multiples of its
own recipe's rate; the lowest validation loss wins. No run that counts has that seed.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from model.config import parse_size
from model.presets import parse_mixer
from train.config import TrainConfig
from train.loop import TrainResult
from train.progress import Display
from train.recipes import recipe_of
from train.turns import Outcome, train_in_turns

PART = 5
"""A run that tries a rate takes the fifth part of the steps of one that counts."""


@dataclass(frozen=True)
class Trial:
    """A learning rate, and what it came to."""

    learning_rate: float
    validation_loss: float | None
    """Nats per token; None if the run diverged."""


def multiples(count: int) -> list[float]:
    """Of the recipe's rate, rising: 1, 2, 1/2, 4, 1/4, ... as many as asked for.

    `3` -> 1/2, 1, 2; `4` -> 1/2, 1, 2, 4.
    """
    return [2.0**n for n in range(-((count - 1) // 2), count // 2 + 1)]


def trial_steps(steps: int) -> int:
    """Of a run that tries a rate."""
    return max(1, steps // PART)


def tune(
    runs: Mapping[str, TrainConfig], count: int, turns: int, display: Display
) -> dict[str, list[Trial]]:
    """Tries the grid on every mixer, the rates of all mixers in turn.

    Args:
        runs: by mixer, what a run of it that counts is like but for its seed; its folder is where
            the trials' are.
        count: rates for each.
        turns: that a run that counts is cut into.
        display: for progress.

    Raises:
        ValueError: for settings, data or a folder that cannot be used.
        Interrupted: after Ctrl-C, when everything is saved.
    """
    trials: dict[str, list[Trial]] = {name: [] for name in runs}
    for multiple in multiples(count):
        rates = {name: multiple * recipe_rate(run.mixer, run.size) for name, run in runs.items()}
        outcomes = train_in_turns(
            {
                f"{name} at {rates[name]:g}": dataclasses.replace(
                    run,
                    steps=trial_steps(run.steps),
                    learning_rate=rates[name],
                    out=run.folder / f"{run.mixer.replace(':', '-')}-{rates[name]:g}",
                )
                for name, run in runs.items()
            },
            max(1, turns // PART),
            display,
        )
        for (name, tried), outcome in zip(trials.items(), outcomes.values(), strict=True):
            tried.append(Trial(rates[name], _loss(outcome)))
    return trials


def best_rate(trials: list[Trial], recipe: float) -> float:
    """The one with the lowest loss; the recipe's, where nothing was tried or all diverged."""
    losses = {t.learning_rate: t.validation_loss for t in trials if t.validation_loss is not None}
    return min(losses, key=losses.__getitem__) if losses else recipe


def recipe_rate(mixer: str, size: str) -> float:
    """Of a mixer, with a score or without, and a size, both as the command line has them."""
    return recipe_of(parse_mixer(mixer)[0]).learning_rate(parse_size(size).d_model)


def _loss(outcome: Outcome) -> float | None:
    return outcome.validation.loss if isinstance(outcome, TrainResult) else None
