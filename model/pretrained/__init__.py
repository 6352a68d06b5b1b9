"""Official RWKV checkpoints <-> ours: dicts of tensors in, dicts of tensors out; no files.

`tables` says of every version where each official weight stands in our model and which shape it has
in the file. The rest follows from it: the configuration, what is missing, and the way back. Nothing
is computed, so both ways keep every bit.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig
from model.layers import MIXERS
from model.layers.rwkv7 import RWKV7Options, default_rank
from model.presets import complete
from model.pretrained.tables import FIRST_VALUE_RESIDUAL, VERSIONS, Place, official_places


def find_version(weights: Mapping[str, Tensor]) -> str:
    """The row of `VERSIONS` that a checkpoint is of, by its names.

    Args:
        weights: under official names.

    Raises:
        ValueError: if it is not RWKV, or a version that is not supported.
    """
    time_mix = {name.partition(".att.")[2] for name in weights if name.startswith("blocks.")}
    if {"k_k", "k_a", "r_k"} & time_mix:
        return "rwkv7"
    if any(name.startswith("time_maa_") for name in time_mix):
        return "rwkv6"
    if "gate.weight" in time_mix:
        if _decays_per_channel(weights):
            return "rwkv5"
        raise ValueError(_refused("RWKV-5.1", "one decay a head"))
    if "ln_x.weight" in time_mix:
        raise ValueError(_refused("RWKV-5.0", "a norm over heads, but no gate"))
    if {"time_first", "time_decay"} & time_mix:
        return "rwkv4"
    raise ValueError(
        "these are not the weights of an RWKV model under their official names, such as "
        "emb.weight and blocks.0.att.key.weight"
    )


def from_official(
    weights: Mapping[str, Tensor], *, group_norm_eps: float | None = None
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """An official checkpoint -> our configuration and weights, in its dtypes.

    Args:
        weights: under official names; they are neither changed nor, where it can be, copied.
        group_norm_eps: of the norm over the heads, which is in no checkpoint; None for the official
            code's. RWKV-4 has no such norm.

    Raises:
        ValueError: for another version or model, or naming what is missing, unexpected or wrong.
    """
    mixer = find_version(weights)
    if group_norm_eps is not None and mixer == "rwkv4":
        raise ValueError("RWKV-4 has no norm over heads: leave group-norm-eps out")
    layers = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    has_first = any(name in weights for name in FIRST_VALUE_RESIDUAL)
    places = dict(official_places(mixer, layers, first_value_residual=has_first))
    _check_names(mixer, weights, places)
    sizes = _sizes(weights, places)
    _check_shapes(mixer, weights, places, sizes)
    options: dict[str, Any] = {}
    if group_norm_eps is not None:
        options["group_norm_eps"] = group_norm_eps
    kind = MIXERS[mixer].time_mix.Options
    options |= {f.name: sizes[f.name] for f in fields(kind) if f.name in sizes}
    if mixer == "rwkv7":
        options["first_value_residual"] = has_first
    config = complete(
        ModelConfig(
            mixer=mixer,
            vocab_size=sizes["V"],
            d_model=sizes["D"],
            num_layers=layers,
            head_dim=sizes["N"],
            ffn_dim=sizes["F"],
            options=kind(**options),
        )
    )
    return config, _own_weights(weights, places)


def to_official(
    config: ModelConfig, weights: Mapping[str, Tensor], *, complete_first: bool = False
) -> dict[str, Tensor]:
    """Our weights -> under official names, in official shapes and in our dtypes.

    Args:
        config: of the model.
        weights: all of it.
        complete_first: give RWKV-7's first layer the zeros that nothing uses where it has no value
            residual of its own: the official trainer insists on them.

    Raises:
        ValueError: if the mixer is not an official one.
    """
    config = complete(config)
    if config.mixer not in VERSIONS:
        titles = ", ".join(version.title for version in VERSIONS.values())
        raise ValueError(f"{config.mixer} has no official form; {titles} have one")
    has_first = getattr(config.options, "first_value_residual", False)
    official: dict[str, Tensor] = {}
    for name, place in official_places(config.mixer, config.num_layers, first_value_residual=True):
        if name in FIRST_VALUE_RESIDUAL and not has_first:
            if complete_first:
                official[name] = _unused(config, place, like=weights["blocks.0.time_mix.mix"])
            continue
        tensor = weights[place.own]
        if place.row is not None:
            tensor = tensor[place.row].clone()  # its own memory: writers keep whole storages
        official[name] = tensor.view(1, 1, -1) if place.shape == "1 1 D" else tensor
    return official


def _decays_per_channel(weights: Mapping[str, Tensor]) -> bool:
    """Whether RWKV-5's decays are `[H, N]`, as those of 5.2; missing ones are named later."""
    decays = [x for name, x in weights.items() if name.endswith(".att.time_decay")]
    return not decays or any(x.dim() > 1 and x.shape[1] > 1 for x in decays)


def _refused(version: str, what: str) -> str:
    return (
        f"this is {version} ({what}), an early form that ebb does not have: give a checkpoint of "
        "RWKV-4, 5.2, 6 or 7"
    )


def _check_names(mixer: str, names: Collection[str], expected: Collection[str]) -> None:
    """Refuses a set of names that is not exactly the expected one."""
    missing = [name for name in expected if name not in names]
    unexpected = sorted(name for name in names if name not in expected)
    wrong = [
        f"{listed} {what}"
        for listed, what in (
            (_some(missing), "missing"),
            (_some(unexpected), "not part of this version"),
        )
        if listed
    ]
    if wrong:
        raise ValueError(f"this is not a whole {VERSIONS[mixer].title} model: {'; '.join(wrong)}")


def _some(names: list[str], most: int = 6) -> str:
    """`a, b and 7 more are`; nothing for none."""
    if not names:
        return ""
    shown = ", ".join(names[:most])
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{shown}{more} {'is' if len(names) == 1 else 'are'}"


def _sizes(weights: Mapping[str, Tensor], places: Mapping[str, Place]) -> dict[str, int]:
    """The length of every kind of dimension: what most weights say, so that one cannot mislead."""
    votes: dict[str, Counter[int]] = {}
    for name, place in places.items():
        for dimension, length in zip(place.shape.split(), weights[name].shape, strict=False):
            factor, _, symbol = dimension.rpartition("*")
            if not symbol.isdigit():
                votes.setdefault(symbol, Counter())[length // int(factor or 1)] += 1
    sizes = {symbol: counter.most_common(1)[0][0] for symbol, counter in votes.items()}
    width = sizes["D"]
    sizes.setdefault("N", math.gcd(width, 64))  # RWKV-4 has no heads: any that divides will do
    if sizes["N"] == 0 or width % sizes["N"]:
        raise ValueError(f"the width {width} is not a multiple of that of a head, {sizes['N']}")
    return sizes | {"H": width // sizes["N"]}


def _check_shapes(
    mixer: str,
    weights: Mapping[str, Tensor],
    places: Mapping[str, Place],
    sizes: Mapping[str, int],
) -> None:
    """Refuses a shape that does not follow from the sizes, and numbers that are no weights."""
    wrong = []
    for name, place in places.items():
        expected, tensor = _shape(place, sizes), weights[name]
        if tensor.layout is not torch.strided or not tensor.is_floating_point():
            raise ValueError(
                f"{name} holds {str(tensor.dtype).removeprefix('torch.')}, which ebb does not "
                "read: give weights in float32, bfloat16 or float16"
            )
        if [*tensor.shape] != expected:
            wrong.append(f"{name} is {[*tensor.shape]}, not {expected}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"shapes do not fit together as {VERSIONS[mixer].title}: {'; '.join(wrong[:3])}{more}"
        )


def _shape(place: Place, sizes: Mapping[str, int]) -> list[int]:
    lengths = []
    for dimension in place.shape.split():
        factor, _, symbol = dimension.rpartition("*")
        length = int(symbol) if symbol.isdigit() else sizes[symbol]
        lengths.append(int(factor or 1) * length)
    return lengths


def _own_weights(weights: Mapping[str, Tensor], places: Mapping[str, Place]) -> dict[str, Tensor]:
    """Under our names; only what becomes rows of one tensor is copied."""
    own: dict[str, Tensor] = {}
    rows: dict[str, list[str]] = {}
    for name, place in places.items():
        if place.row is not None:
            rows.setdefault(place.own, []).append(name)
        else:
            tensor = weights[name]
            own[place.own] = tensor.reshape(-1) if place.shape == "1 1 D" else tensor
    for name, parts in rows.items():
        if len(dtypes := {weights[part].dtype for part in parts}) > 1:
            raise ValueError(
                f"{' and '.join(sorted(str(d).removeprefix('torch.') for d in dtypes))} are mixed "
                f"in {', '.join(parts)}, which ebb keeps in one tensor: give them one dtype"
            )
        own[name] = torch.stack([weights[part].reshape(-1) for part in parts])
    return own


def _unused(config: ModelConfig, place: Place, like: Tensor) -> Tensor:
    """Zeros in the shape of the other layers' value residual."""
    assert isinstance(config.options, RWKV7Options)
    width = config.d_model
    rank = config.options.value_rank or default_rank(1.7, width)
    return like.new_zeros(_shape(place, {"D": width, "value_rank": rank}))
