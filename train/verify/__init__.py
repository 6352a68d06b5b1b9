"""The proof as a product: every form of every mixer against its definition in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from model.language_model import LanguageModel
from model.layers import MIXERS, Mixer
from model.layers.layer import Layer
from model.ops import OPS, Op
from model.presets import parse_mixer
from train.verify.networks import LayerSubject, ModelSubject, seated, small_config
from train.verify.ops import OpSubject
from train.verify.proof import Cell, prove
from train.verify.situations import Subject

__all__ = ["Cell", "Report", "verify"]

MODES = ("quick", "full")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
LAYERS = 2
"""Of the random models: a first layer, which may be different, and another one."""

Target = str | Mixer | type[Layer] | Op | LanguageModel


@dataclass(frozen=True)
class Report:
    """What was found."""

    cells: list[Cell]

    @property
    def ok(self) -> bool:
        """Whether every cell is within its tolerance."""
        return all(cell.ok for cell in self.cells)

    @property
    def worst(self) -> Cell:
        """The cell that is nearest to its tolerance, or farthest beyond."""
        return max(self.cells, key=lambda cell: cell.error / cell.tolerance)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"ok": self.ok, "cells": [cell.to_dict() for cell in self.cells]}


def verify(
    *targets: Target,
    mode: str = "quick",
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    advance: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> Report:
    """Checks every form against the recurrent one in float64.

    Args:
        targets: the name of a mixer as the command line has it, a row like those of `MIXERS`, a
            time mixer's class, a row like those of `OPS`, or a model with its weights. A mixer
            brings its op, its time mixer alone and a small model of it.
        mode: `quick` or `full`.
        dtypes: of float64, float32 and bfloat16; the last is only for the logits of models.
        advance: called with the situations done, those in all, and what is being checked.

    Raises:
        ValueError: for a target that does not exist or cannot be built.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, but is {mode!r}")
    full = mode == "full"
    subjects = {s.name: s for target in targets for s in subjects_of(target)}
    total, done = sum(len(s.situations(full=full)) for s in subjects.values()), 0
    cells = []
    for subject in subjects.values():

        def step(name: str = subject.name) -> None:
            nonlocal done
            done += 1
            advance(done, total, name)

        cells += prove(subject, dtypes, full=full, advance=step)
    return Report(cells)


def subjects_of(target: Target) -> list[Subject]:
    """The parts of a target that can be checked by themselves.

    Raises:
        ValueError: for what does not exist or cannot be built.
    """
    if isinstance(target, str):
        row, options = parse_mixer(target)
        return _of_mixer(MIXERS[row], target, options)
    if isinstance(target, Mixer):
        return _of_mixer(target, _name_of(target), None)
    if isinstance(target, Op):
        known = [name for name, op in OPS.items() if op is target]
        return [OpSubject.of(known[0]) if known else OpSubject("given op", target)]
    if isinstance(target, LanguageModel):
        return [ModelSubject.of(target.config.mixer, target)]
    if isinstance(target, type) and issubclass(target, Layer):
        alone = Mixer(target, None, MIXERS["attention"].body, "", "", "")
        config = small_config(alone, target.__name__, None, LAYERS)
        return [*LayerSubject.all_of(target.__name__, target, config, None)]
    raise ValueError(f"a mixer, a layer, an op or a model can be verified, but not {target!r}")


def _name_of(mixer: Mixer) -> str:
    return next((n for n, row in MIXERS.items() if row is mixer), mixer.time_mix.__name__)


def _of_mixer(mixer: Mixer, name: str, options: Any) -> list[Subject]:
    """Its op, if it is in the table, its time mixer alone, and a small model."""
    with seated(mixer) as seat:
        config = small_config(mixer, seat, options, LAYERS)
        ops = [OpSubject.of(mixer.op)] if mixer.op in OPS else []
        layers = LayerSubject.all_of(name, mixer.time_mix, config, mixer.op)
        return [*ops, *layers, ModelSubject.random(name, mixer, config)]
