"""Equal parameters for different mixers, by the width of the channel mix."""

import dataclasses
import math

from model.config import ModelConfig
from model.language_model import shapes_only
from model.layers import MIXERS


def num_parameters(config: ModelConfig) -> int:
    """Of a model of that shape, counted without allocating it."""
    return shapes_only(config).num_parameters()


def matched(config: ModelConfig, parameters: int, multiple: int = 8) -> ModelConfig:
    """The shape with the FFN width that brings it nearest to a number of parameters.

    The count grows linearly with the width, so two counts fix the line. The width is a multiple of
    8, which matrix products like, or of what the mixer asks for; that moves the count by less than
    1 %, but for models as small as those of the tasks, which take any multiple.

    Raises:
        ValueError: if the rest of the model alone is larger.
    """
    least = MIXERS[config.mixer].time_mix.width_step(config)
    one, two = (num_parameters(dataclasses.replace(config, ffn_dim=n * least)) for n in (1, 2))
    step = math.lcm(multiple, least)
    width = step * round(least * (1 + (parameters - one) / (two - one)) / step)
    if width < step:
        raise ValueError(
            f"{config.mixer} has {one:,} parameters without its channel mix, more than the "
            f"{parameters:,} that it is to be matched with: choose a larger --size"
        )
    return dataclasses.replace(config, ffn_dim=width)
