"""The initial values of a whole model, and the optimiser's parameter groups, which belong to it.

For RWKV both are a part of the model: with a library's defaults it learns far worse. A layer's own
values stand beside its equations, in `Layer.initialize`.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from model.layers import MIXERS, RWKV
from model.layers.initializers import orthogonal_
from model.layers.layer import Layer

if TYPE_CHECKING:
    from model.language_model import LanguageModel


@torch.no_grad()
def initialize(model: "LanguageModel") -> None:
    """Draws all weights of a new model from torch's global generator."""
    if MIXERS[model.config.mixer].body is RWKV:
        nn.init.uniform_(model.embedding.weight, -1e-4, 1e-4)
        orthogonal_(model.head.weight, 0.5)
    else:
        # What a block reads is normalised, what it adds is not: from GPT-2's 0.02 the stream is all
        # additions after a few steps (Spike No More, arXiv 2312.16903). RWKV normalises it instead.
        nn.init.normal_(model.embedding.weight, std=1.0)
        nn.init.normal_(model.head.weight, std=0.02)
    for layer, block in enumerate(model.blocks):
        for module in block.children():
            if isinstance(module, Layer):
                module.initialize(layer, model.config.num_layers)


def parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for the optimiser: weight decay on matrices only, some rates scaled.

    A mixer names parameters whose learning rate is scaled in `LEARNING_RATE_SCALES`, as RWKV does
    with the decay (RWKV-LM, train_temp, `configure_optimizers`).

    Args:
        model: a `LanguageModel`.
        learning_rate: the base rate; every group's own rate is in `lr`, its factor in `lr_scale`.
        weight_decay: for linear layers, embedding and head.
    """
    scales = dict(_learning_rate_scales(model))
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        decays = name.endswith(".weight") and parameter.dim() >= 2
        key = (scales.get(name, 1.0), weight_decay if decays else 0.0)
        groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate * scale,
            "lr_scale": scale,
            "weight_decay": decay,
        }
        for (scale, decay), parameters in groups.items()
    ]


def _learning_rate_scales(model: nn.Module) -> Iterator[tuple[str, float]]:
    for path, module in model.named_modules():
        if isinstance(module, Layer):
            for name, scale in module.LEARNING_RATE_SCALES.items():
                yield f"{path}.{name}", scale
