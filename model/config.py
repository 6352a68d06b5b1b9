"""The shape of a network: one frozen dataclass for all mixers, one small one for each mixer."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class AttentionOptions:
    """Softmax attention with rotary positions."""

    score: str = "softmax"
    """What makes weights of scores; named after a colon: `attention:softmax`."""
    rotary_base: float = 10_000.0
    """Base of the rotary frequencies (RoFormer, arXiv 2104.09864)."""


@dataclass(frozen=True)
class LinearTransformerOptions:
    """Linear attention with the feature map elu + 1 (arXiv 2006.16236)."""

    eps: float = 1e-6
    """Added to the normaliser."""


@dataclass(frozen=True)
class RWKV6Options:
    """RWKV-6 (arXiv 2404.05892)."""

    shift_rank: int = 32
    """Rank of the data-dependent token shift."""
    decay_rank: int = 64
    """Rank of the data-dependent decay."""
    group_norm_eps: float = 64e-5
    """In no checkpoint: the official code's constant."""


@dataclass(frozen=True)
class RWKV7Options:
    """RWKV-7 (arXiv 2503.14456). Ranks left at None follow the width."""

    decay_rank: int | None = None
    iclr_rank: int | None = None
    value_rank: int | None = None
    gate_rank: int | None = None
    group_norm_eps: float = 64e-5
    """In no checkpoint: the official code's constant."""


MixerOptions = AttentionOptions | LinearTransformerOptions | RWKV6Options | RWKV7Options
OPTIONS: dict[str, type[MixerOptions]] = {
    "attention": AttentionOptions,
    "linear_transformer": LinearTransformerOptions,
    "rwkv6": RWKV6Options,
    "rwkv7": RWKV7Options,
}
SCORES = ("softmax",)


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


def parse_mixer(name: str) -> tuple[str, MixerOptions]:
    """`"rwkv7"`, `"attention:softmax"` or `"softmax"` -> the row of `MIXERS` and its options.

    Raises:
        ValueError: naming the mixers that exist.
    """
    mixer, colon, score = ("attention:softmax" if name == "softmax" else name).partition(":")
    if mixer not in OPTIONS:
        raise ValueError(f"there is no mixer {name!r}; choose one of {', '.join(sorted(OPTIONS))}")
    if not colon:
        return mixer, OPTIONS[mixer]()
    if not score:
        raise ValueError(f"{name!r} has nothing after the colon; leave the colon out")
    if mixer != "attention":
        raise ValueError(f"{mixer} takes nothing after a colon, but {name!r} has {score!r} there")
    if score not in SCORES:
        raise ValueError(f"attention knows no score {score!r}; choose one of {', '.join(SCORES)}")
    return mixer, AttentionOptions(score=score)


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the shapes and the arithmetic of a network."""

    mixer: str = "rwkv7"
    """A row of `model.layers.MIXERS`."""
    vocab_size: int = 257
    d_model: int = 256
    """Width D of the residual stream."""
    num_layers: int = 4
    head_dim: int = 64
    """Width K of a head; `d_model / head_dim` heads."""
    ffn_dim: int | None = None
    """Width inside the channel mix; None for the mixer's own multiple of D."""
    options: MixerOptions = field(default_factory=RWKV7Options)
    """What only this mixer has."""

    def __post_init__(self) -> None:
        """Refuses what cannot be built.

        Raises:
            ValueError: naming the setting.
        """
        if self.mixer not in OPTIONS:
            raise ValueError(
                f"there is no mixer {self.mixer!r}; choose one of {', '.join(sorted(OPTIONS))}"
            )
        if not isinstance(self.options, OPTIONS[self.mixer]):
            raise ValueError(
                f"{self.mixer} takes {OPTIONS[self.mixer].__name__}, "
                f"but options is {type(self.options).__name__}"
            )
        _check_numbers(self)
        _check_numbers(self.options)
        if self.d_model % self.head_dim:
            raise ValueError(
                f"d_model must be a multiple of head_dim, but {self.d_model} is none of "
                f"{self.head_dim}"
            )
        if isinstance(self.options, AttentionOptions):
            if self.options.score not in SCORES:
                raise ValueError(
                    f"attention knows no score {self.options.score!r}; "
                    f"choose one of {', '.join(SCORES)}"
                )
            if self.head_dim % 2:
                raise ValueError(f"rotary positions need an even head_dim, not {self.head_dim}")

    @property
    def num_heads(self) -> int:
        """H."""
        return self.d_model // self.head_dim

    @classmethod
    def preset(
        cls, size: str, mixer: str, vocab_size: int, *, ffn_dim: int | None = None
    ) -> "ModelConfig":
        """A shape by name, for a mixer as the command line names it.

        Raises:
            ValueError: for an unknown size or mixer.
        """
        if size not in SIZES:
            raise ValueError(f"there is no size {size!r}; choose one of {', '.join(SIZES)}")
        row, options = parse_mixer(mixer)
        shape = dataclasses.asdict(SIZES[size])
        return cls(mixer=row, vocab_size=vocab_size, ffn_dim=ffn_dim, options=options, **shape)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """The inverse of `to_dict`; a name it does not know is an error, never dropped.

        Raises:
            ValueError: naming what is unknown, missing or impossible.
        """
        if not isinstance(values, dict):
            raise ValueError(f"{cls.__name__} must be a table of settings, but is {values!r}")
        mixer = values.get("mixer")
        if not isinstance(mixer, str) or mixer not in OPTIONS:
            raise ValueError(
                f"there is no mixer {mixer!r}; choose one of {', '.join(sorted(OPTIONS))}"
            )
        options = _strict(OPTIONS[mixer], values.get("options", {}))
        return _strict(cls, {**values, "options": options})


def _check_numbers(settings: "ModelConfig | MixerOptions") -> None:
    """Refuses numbers that are not positive; None stands only where it is the default."""
    for setting in dataclasses.fields(settings):
        name, value = setting.name, getattr(settings, setting.name)
        if setting.type in (int, int | None):
            optional = setting.default is None
            if not (optional and value is None) and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be a positive integer, but is {value!r}")
        elif setting.type is float and not (type(value) in (int, float) and 0 < value < math.inf):
            raise ValueError(f"{name} must be a positive number, but is {value!r}")


def _strict(kind: type[T], values: dict[str, Any]) -> T:
    """`kind(**values)`, or a ValueError that names what does not fit."""
    if not isinstance(values, dict):
        raise ValueError(f"{kind.__name__} must be a table of settings, but is {values!r}")
    names = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]  # always dataclasses
    if unknown := sorted(set(values) - names):
        raise ValueError(f"{kind.__name__} has no setting {', '.join(unknown)}")
    return kind(**values)
