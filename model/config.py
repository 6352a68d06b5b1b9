"""The shape of a network: one frozen dataclass for all mixers, and what their own options share."""

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class MixerOptions:
    """Base of what only one mixer has. A mixer's own stand beside it, in its file in `layers`.

    Numbers must be positive; a setting whose default is None may stay None.
    """

    def __post_init__(self) -> None:
        """Refuses values out of range.

        Raises:
            ValueError: naming the setting.
        """
        check_numbers(self)

    @classmethod
    def from_words(cls, words: Sequence[str]) -> Self:
        """The options that stand after a mixer's name: `deltanet:negative_eigenvalues`.

        A word is the name of a switch, or `setting=value`.

        Raises:
            ValueError: for a word that is neither, or a setting given twice.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for word in words:
            name, equals, text = word.partition("=")
            if name not in fields or (not equals and fields[name].type is not bool):
                known = [n if f.type is bool else f"{n}=..." for n, f in fields.items()]
                raise ValueError(
                    f"{word!r} is no option of this mixer; it takes {', '.join(known) or 'none'}"
                )
            if name in values:
                raise ValueError(f"{name} is given twice; leave one out")
            values[name] = _parse(name, text, fields[name].type) if equals else True
        return cls(**values)


@dataclass(frozen=True)
class Size:
    """The part of a shape that a preset fixes."""

    num_layers: int
    d_model: int
    head_dim: int


SIZES = {
    "nano": Size(num_layers=4, d_model=128, head_dim=32),
    "micro": Size(num_layers=4, d_model=256, head_dim=64),
    "tiny": Size(num_layers=8, d_model=512, head_dim=64),
    "small": Size(num_layers=12, d_model=768, head_dim=64),
}


def parse_size(text: str) -> Size:
    """`micro`, or layers and width: `4x256`, in heads of 64, or of 32 where that is no divisor.

    Raises:
        ValueError: for anything else.
    """
    if text in SIZES:
        return SIZES[text]
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    layers, width = map(int, found.groups()) if found else (0, 0)
    if not layers or not width or width % 32:
        raise ValueError(
            f"there is no size {text!r}; choose one of {', '.join(SIZES)}, or layers and width "
            "such as 4x192 (the width a multiple of 32)"
        )
    return Size(layers, width, 64 if width % 64 == 0 else 32)


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the shapes and the arithmetic of a network.

    That mixer and options fit together is seen to by `model.presets.complete`, which knows them.
    """

    mixer: str = "rwkv7"
    """A row of `model.layers.MIXERS`."""
    vocab_size: int = 257
    d_model: int = 256
    """Width D of the residual stream."""
    num_layers: int = 4
    head_dim: int = 64
    """Width K of a head; `d_model / head_dim` heads."""
    ffn_dim: int | None = None
    """Width inside the channel mix; None for the mixer's own multiple of D. In a mixer without a
    channel mix (Mamba-2), the width inside the mixer."""
    options: MixerOptions | None = None
    """What only this mixer has; None for its defaults."""

    def __post_init__(self) -> None:
        """Refuses what cannot be built.

        Raises:
            ValueError: naming the setting.
        """
        check_numbers(self)
        if self.d_model % self.head_dim:
            raise ValueError(
                f"d_model must be a multiple of head_dim, but {self.d_model} is none of "
                f"{self.head_dim}"
            )

    @property
    def num_heads(self) -> int:
        """H."""
        return self.d_model // self.head_dim

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


def strict(kind: type[T], values: dict[str, Any]) -> T:
    """`kind(**values)`; a name that it does not know is an error, never dropped.

    Raises:
        ValueError: naming what is unknown or impossible.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{kind.__name__} must be a table of settings, but is {values!r}")
    names = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]  # always dataclasses
    if unknown := sorted(set(values) - names):
        raise ValueError(f"{kind.__name__} has no setting {', '.join(unknown)}")
    return kind(**values)


def check_numbers(settings: ModelConfig | MixerOptions) -> None:
    """Refuses numbers that are not positive; None stands only where it is the default.

    Raises:
        ValueError: naming the setting.
    """
    for setting in dataclasses.fields(settings):
        name, value = setting.name, getattr(settings, setting.name)
        if setting.default is None and value is None:
            continue
        if setting.type in (int, int | None):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a positive integer, but is {value!r}")
        elif setting.type in (float, float | None):
            if not (type(value) in (int, float) and 0 < value < math.inf):
                raise ValueError(f"{name} must be a positive number, but is {value!r}")
        elif setting.type is bool and type(value) is not bool:
            raise ValueError(f"{name} must be true or false, but is {value!r}")


def _parse(name: str, text: str, kind: Any) -> Any:
    """The value of a setting that is written `name=text`."""
    try:
        if kind in (int, int | None):
            return int(text)
        if kind in (float, float | None):
            return float(text)
    except ValueError as error:
        number = "number" if kind in (float, float | None) else "whole number"
        raise ValueError(f"{name} must be a {number}, but is {text!r}") from error
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError(f"{name} must be true or false, but is {text!r}")
        return text == "true"
    return text
