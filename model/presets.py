"""Names to shapes: `micro`, `attention:polynomial:2` and the contents of `config.json`."""

import dataclasses
from typing import Any

from model.config import MixerOptions, ModelConfig, parse_size, strict
from model.layers import MIXERS, Mixer


def find_mixer(name: Any) -> Mixer:
    """A row of `MIXERS`.

    Raises:
        ValueError: naming the mixers that exist.
    """
    if not isinstance(name, str) or name not in MIXERS:
        raise ValueError(f"there is no mixer {name!r}; choose one of {', '.join(sorted(MIXERS))}")
    return MIXERS[name]


def parse_mixer(name: str) -> tuple[str, MixerOptions]:
    """`"rwkv7"`, `"attention:square_l1"` or `"softmax"` -> the row of `MIXERS` and its options.

    What stands after a colon is up to the mixer's options, `MixerOptions.from_words`.

    Raises:
        ValueError: naming what exists.
    """
    row, *words = ("attention:softmax" if name == "softmax" else name).split(":")
    kind = find_mixer(row if row in MIXERS else name).time_mix.Options
    if not all(words):
        raise ValueError(f"{name!r} has nothing after the colon; leave the colon out")
    try:
        return row, kind.from_words(words)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def complete(config: ModelConfig) -> ModelConfig:
    """The configuration with its mixer's options in place.

    Raises:
        ValueError: for a mixer that does not exist, or a shape or options that it cannot have.
    """
    kind = find_mixer(config.mixer).time_mix
    if config.options is None:
        config = dataclasses.replace(config, options=kind.Options())
    if type(config.options) is not kind.Options:
        raise ValueError(
            f"{config.mixer} takes {kind.Options.__name__}, "
            f"but options is {type(config.options).__name__}"
        )
    kind.check(config)
    return config


def preset(size: str, mixer: str, vocab_size: int, *, ffn_dim: int | None = None) -> ModelConfig:
    """A shape by name or as `4x256`, for a mixer as the command line names it.

    A block without a channel mix is half a layer: there are twice as many (as Mamba counts them,
    arXiv 2312.00752, section 3.4).

    Raises:
        ValueError: for an unknown size or mixer.
    """
    row, options = parse_mixer(mixer)
    shape = dataclasses.asdict(parse_size(size))
    if MIXERS[row].channel_mix is None:
        shape["num_layers"] *= 2
    return complete(
        ModelConfig(mixer=row, vocab_size=vocab_size, ffn_dim=ffn_dim, options=options, **shape)
    )


def from_dict(values: dict[str, Any]) -> ModelConfig:
    """The inverse of `ModelConfig.to_dict`; a name it does not know is an error, never dropped.

    Raises:
        ValueError: naming what is unknown, missing or impossible.
    """
    if not isinstance(values, dict):
        raise ValueError(f"ModelConfig must be a table of settings, but is {values!r}")
    kind = find_mixer(values.get("mixer")).time_mix.Options
    options = strict(kind, values.get("options", {}))
    return complete(strict(ModelConfig, {**values, "options": options}))
