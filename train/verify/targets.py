"""From what a user names to the parts that can be checked by themselves."""

from typing import Any

from model.language_model import LanguageModel
from model.layers import MIXERS, Mixer
from model.layers.layer import Layer
from model.ops import OPS, Op
from model.presets import parse_mixer
from train.verify.networks import LayerSubject, ModelSubject
from train.verify.ops import OpSubject
from train.verify.random_networks import seated, small_config
from train.verify.situations import Subject

LAYERS = 2
"""Of the random models: a first layer, which may be different, and another one."""

Target = str | Mixer | type[Layer] | Op | LanguageModel
"""The name of a mixer as the command line has it, a row like those of `MIXERS`, a time mixer's
class, a row like those of `OPS`, or a model with its weights."""


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
