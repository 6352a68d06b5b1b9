"""Where the weights of an official RWKV checkpoint stand in our model: one table a version."""

from collections.abc import Iterator
from typing import NamedTuple


class Place(NamedTuple):
    """Where an official weight stands in our model, and its shape in the file."""

    own: str
    """Our name, within a block but for the weights around the blocks."""
    shape: str
    """`V` vocabulary, `D` width, `F` width of the channel mix, `H` heads, `N` width of a head, a
    number, or the name of an option; `5*rank` for a multiple."""
    row: int | None = None
    """Which row of our tensor, where ours holds several of theirs."""


class Version(NamedTuple):
    """An official version: its name, and its weights by their names within a block."""

    title: str
    weights: dict[str, Place]


def _rows(prefix: str, order: str) -> dict[str, Place]:
    """The parts in the token shift, which are rows of one tensor of ours."""
    return {f"{prefix}{letter}": Place("mix", "1 1 D", row) for row, letter in enumerate(order)}


def _layer(time_mix: dict[str, Place], channel_mix: dict[str, Place]) -> dict[str, Place]:
    """The weights of a block, the versions' own and those that all of them have."""
    matrices = {
        f"{name}.weight": Place(f"{name}.weight", "D D")
        for name in ("receptance", "key", "value", "output")
    }
    channel_mix = channel_mix | {
        "key.weight": Place("key.weight", "F D"),
        "value.weight": Place("value.weight", "D F"),
    }
    norms = {"ln1": "time_norm", "ln2": "channel_norm"}
    return {
        **{
            f"{official}.{kind}": Place(f"{own}.{kind}", "D")
            for official, own in norms.items()
            for kind in ("weight", "bias")
        },
        **{
            f"att.{name}": place._replace(own=f"time_mix.{place.own}")
            for name, place in (time_mix | matrices).items()
        },
        **{
            f"ffn.{name}": place._replace(own=f"channel_mix.{place.own}")
            for name, place in channel_mix.items()
        },
    }


_HEAD_NORM = {f"ln_x.{kind}": Place(f"head_norm.{kind}", "D") for kind in ("weight", "bias")}
_RECEPTANCE = {"receptance.weight": Place("receptance.weight", "D D")}
_GATE = {"gate.weight": Place("gate.weight", "D D")}

VERSIONS = {
    "rwkv4": Version(
        "RWKV-4",
        _layer(
            {
                **_rows("time_mix_", "kvr"),
                "time_decay": Place("decay", "D"),
                "time_first": Place("bonus", "D"),
            },
            {
                "time_mix_k": Place("mix_key", "1 1 D"),
                "time_mix_r": Place("mix_receptance", "1 1 D"),
                **_RECEPTANCE,
            },
        ),
    ),
    "rwkv5": Version(
        "RWKV-5.2",
        _layer(
            {
                **_rows("time_mix_", "kvrg"),
                **_GATE,  # before the decay, by which the `rwkv` package then sees that it is 5.2
                **_HEAD_NORM,
                "time_decay": Place("decay", "H N"),
                "time_faaaa": Place("bonus", "H N"),
            },
            {
                "time_mix_k": Place("mix_key", "1 1 D"),
                "time_mix_r": Place("mix_receptance", "1 1 D"),
                **_RECEPTANCE,
            },
        ),
    ),
    "rwkv6": Version(
        "RWKV-6",
        _layer(
            {
                "time_maa_x": Place("mix_base", "1 1 D"),
                **_rows("time_maa_", "wkvrg"),
                "time_maa_w1": Place("mix_down", "D 5*shift_rank"),
                "time_maa_w2": Place("mix_up", "5 shift_rank D"),
                "time_decay": Place("decay.bias", "1 1 D"),
                "time_decay_w1": Place("decay.down", "D decay_rank"),
                "time_decay_w2": Place("decay.up", "decay_rank D"),
                "time_faaaa": Place("bonus", "H N"),
                **_GATE,
                **_HEAD_NORM,
            },
            {
                "time_maa_k": Place("mix_key", "1 1 D"),
                "time_maa_r": Place("mix_receptance", "1 1 D"),
                **_RECEPTANCE,
            },
        ),
    ),
    "rwkv7": Version(
        "RWKV-7",
        _layer(
            {
                **_rows("x_", "rwkvag"),
                "w0": Place("decay.bias", "1 1 D"),
                "w1": Place("decay.down", "D decay_rank"),
                "w2": Place("decay.up", "decay_rank D"),
                "a0": Place("iclr.bias", "1 1 D"),
                "a1": Place("iclr.down", "D iclr_rank"),
                "a2": Place("iclr.up", "iclr_rank D"),
                "v0": Place("value_residual.bias", "1 1 D"),
                "v1": Place("value_residual.down", "D value_rank"),
                "v2": Place("value_residual.up", "value_rank D"),
                "g1": Place("gate.down", "D gate_rank"),
                "g2": Place("gate.up", "gate_rank D"),
                "k_k": Place("removal_scale", "1 1 D"),
                "k_a": Place("iclr_scale", "1 1 D"),
                "r_k": Place("bonus", "H N"),
                **_HEAD_NORM,
            },
            {"x_k": Place("mix_key", "1 1 D")},
        ),
    ),
}
"""By the row of `MIXERS`."""

_BEFORE = {
    "emb.weight": Place("embedding.weight", "V D"),
    "blocks.0.ln0.weight": Place("embedding_norm.weight", "D"),
    "blocks.0.ln0.bias": Place("embedding_norm.bias", "D"),
}
_AFTER = {
    "ln_out.weight": Place("norm.weight", "D"),
    "ln_out.bias": Place("norm.bias", "D"),
    "head.weight": Place("head.weight", "V D"),
}
FIRST_VALUE_RESIDUAL = ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")
"""RWKV-7's trainer makes them and nothing uses them: files come with and without."""


def official_places(
    mixer: str, layers: int, *, first_value_residual: bool
) -> Iterator[tuple[str, Place]]:
    """Every official name of a model and where it stands in ours, in the order of the network."""
    yield from _BEFORE.items()
    for layer in range(layers):
        for name, place in VERSIONS[mixer].weights.items():
            official = f"blocks.{layer}.{name}"
            if official not in FIRST_VALUE_RESIDUAL or first_value_residual:
                yield official, place._replace(own=f"blocks.{layer}.{place.own}")
    yield from _AFTER.items()
