"""Checkpoints as RWKV's authors write them: every name with its shape, spelled out by hand."""

import torch
from torch import Tensor

TITLES = {"rwkv4": "RWKV-4", "rwkv5": "RWKV-5.2", "rwkv6": "RWKV-6", "rwkv7": "RWKV-7"}


def official_shapes(
    version: str,
    *,
    layers: int = 3,
    width: int = 24,
    head: int = 8,
    ffn: int = 56,
    vocab: int = 31,
    first_value_residual: bool = True,
) -> dict[str, tuple[int, ...]]:
    """Ranks are 5, 3, 6 and 7, so that no two sizes are the same."""
    channel, matrix, heads = (1, 1, width), (width, width), (width // head, head)
    time_mix = dict.fromkeys(
        ("receptance.weight", "key.weight", "value.weight", "output.weight"), matrix
    )
    channel_mix = {"key.weight": (ffn, width), "value.weight": (width, ffn)}
    if version != "rwkv4":
        time_mix |= {"ln_x.weight": (width,), "ln_x.bias": (width,)}
    if version != "rwkv7":
        channel_mix["receptance.weight"] = matrix
    if version == "rwkv4":
        time_mix |= {"time_decay": (width,), "time_first": (width,)}
        time_mix |= {f"time_mix_{letter}": channel for letter in "kvr"}
        channel_mix |= {f"time_mix_{letter}": channel for letter in "kr"}
    elif version == "rwkv5":
        time_mix |= {"time_decay": heads, "time_faaaa": heads, "gate.weight": matrix}
        time_mix |= {f"time_mix_{letter}": channel for letter in "kvrg"}
        channel_mix |= {f"time_mix_{letter}": channel for letter in "kr"}
    elif version == "rwkv6":
        time_mix |= {"time_decay": channel, "time_faaaa": heads, "gate.weight": matrix}
        time_mix |= {f"time_maa_{letter}": channel for letter in "xwkvrg"}
        time_mix |= {"time_maa_w1": (width, 25), "time_maa_w2": (5, 5, width)}
        time_mix |= {"time_decay_w1": (width, 3), "time_decay_w2": (3, width)}
        channel_mix |= {f"time_maa_{letter}": channel for letter in "kr"}
    else:
        time_mix |= {f"x_{letter}": channel for letter in "rwkvag"}
        for letter, rank in (("w", 5), ("a", 3), ("v", 6), ("g", 7)):
            time_mix |= {f"{letter}1": (width, rank), f"{letter}2": (rank, width)}
        time_mix |= dict.fromkeys(("w0", "a0", "v0", "k_k", "k_a"), channel)
        time_mix["r_k"] = heads
        channel_mix["x_k"] = channel
    shapes: dict[str, tuple[int, ...]] = {"emb.weight": (vocab, width)}
    shapes |= {"blocks.0.ln0.weight": (width,), "blocks.0.ln0.bias": (width,)}
    for layer in range(layers):
        for norm in ("ln1", "ln2"):
            shapes[f"blocks.{layer}.{norm}.weight"] = (width,)
            shapes[f"blocks.{layer}.{norm}.bias"] = (width,)
        for name, shape in time_mix.items():
            if layer or first_value_residual or name not in ("v0", "v1", "v2"):
                shapes[f"blocks.{layer}.att.{name}"] = shape
        shapes |= {f"blocks.{layer}.ffn.{name}": shape for name, shape in channel_mix.items()}
    return shapes | {
        "ln_out.weight": (width,),
        "ln_out.bias": (width,),
        "head.weight": (vocab, width),
    }


def official_weights(
    version: str, dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: int
) -> dict[str, Tensor]:
    """Random ones of these shapes, small enough for a network to stay finite."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: (0.3 * torch.randn(shape, generator=draw)).to(dtype)
        for name, shape in official_shapes(version, **sizes).items()
    }


def same_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether names, dtypes, shapes and every bit are the same."""
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype
        and first[name].shape == second[name].shape
        and bits(first[name]) == bits(second[name])
        for name in first
    )


def bits(tensor: Tensor) -> bytes:
    """All of it, a NaN's payload included."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
