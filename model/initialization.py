"""All initialisation, and the optimiser's parameter groups, which belong to it.

For RWKV both are a part of the model: with a library's defaults it learns far worse.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from model.layers.attention import Attention
from model.layers.channel_mix import RWKV6ChannelMix, RWKV7ChannelMix, SwiGLU
from model.layers.linear_transformer import LinearTransformer
from model.layers.low_rank import LowRank
from model.layers.rwkv6 import RWKV6
from model.layers.rwkv7 import RWKV7

if TYPE_CHECKING:
    from model.language_model import LanguageModel


@torch.no_grad()
def initialize(model: "LanguageModel") -> None:
    """Draws all weights of a new model from torch's global generator."""
    layers = model.config.num_layers
    rwkv = model.config.mixer.startswith("rwkv")
    if rwkv:
        nn.init.uniform_(model.embedding.weight, -1e-4, 1e-4)
        _orthogonal(model.head.weight, 0.5)
    else:
        nn.init.normal_(model.embedding.weight, std=0.02)
        nn.init.normal_(model.head.weight, std=0.02)
    for layer, block in enumerate(model.blocks):
        for module in block.children():
            match module:
                case RWKV7():
                    _rwkv7(module, layer, layers)
                case RWKV7ChannelMix():
                    _rwkv7_channel_mix(module, layer, layers)
                case RWKV6():
                    _rwkv6(module, layer, layers)
                case RWKV6ChannelMix():
                    _rwkv6_channel_mix(module, layer, layers)
                case Attention() | LinearTransformer() | SwiGLU():
                    _transformer(module, layers)


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
        for name, scale in getattr(module, "LEARNING_RATE_SCALES", {}).items():
            yield f"{path}.{name}", scale


def _orthogonal(weight: Tensor, scale: float) -> None:
    """Orthogonal, with gain `scale sqrt(rows / columns)` where there are more rows than columns."""
    rows, columns = weight.shape
    nn.init.orthogonal_(weight, gain=scale * math.sqrt(max(rows / columns, 1.0)))


def _transformer(module: nn.Module, num_layers: int) -> None:
    """GPT-2's: normal with 0.02, into the residual stream 1 / sqrt(2 layers) of that."""
    for name, parameter in module.named_parameters():
        into_residual = name in ("output.weight", "down.weight")
        nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * num_layers) if into_residual else 0.02)


def _depth(layer: int, num_layers: int) -> tuple[float, float]:
    """`p = layer / (L - 1)`, 0 for a single layer, and `q = 1 - layer / L`."""
    return (layer / (num_layers - 1) if num_layers > 1 else 0.0), 1.0 - layer / num_layers


def _rwkv7(module: RWKV7, layer: int, num_layers: int) -> None:
    """RWKV-LM, RWKV-v7/train_temp/src/model.py, `RWKV_Tmix_x070.__init__`."""
    width, p_q = module.receptance.in_features, _depth(layer, num_layers)
    p, q = p_q
    channel = torch.arange(width)
    ratio = channel / width
    linear = channel / max(width - 1, 1) - 0.5
    within = (channel % module.head_dim) / max(module.head_dim - 1, 1) * 2 - 1
    zigzag = within * within.abs()
    for row, power in enumerate((0.2, 0.9, 0.7, 0.7, 0.9, 0.2)):  # r, w, k, v, a, g
        module.mix[row] = 1.0 - ratio ** (power * q)

    low_ranks = [module.decay, module.iclr, module.gate]
    if not module.is_first:
        low_ranks.append(module.value_residual)
        _bias(module.value_residual).copy_(0.73 - 0.4 * linear)
    for low_rank in low_ranks:
        nn.init.zeros_(low_rank.down)
        _orthogonal(low_rank.up, 0.1)
    slope = channel / max(width - 1, 1)
    _bias(module.decay).copy_(-5.5 + 6.0 * slope ** (1.0 + p**0.3) + 2.5 * zigzag)
    _bias(module.iclr).copy_(-0.19 + 0.3 * zigzag + 0.4 * linear)
    module.removal_scale.copy_(0.71 - 0.1 * linear)
    nn.init.constant_(module.iclr_scale, 1.02)
    nn.init.constant_(module.bonus, -0.04)

    bound = 0.5 / math.sqrt(width)
    nn.init.uniform_(module.receptance.weight, -bound, bound)
    nn.init.uniform_(module.key.weight, -0.1 * bound, 0.1 * bound)
    nn.init.uniform_(module.value.weight, -bound, bound)
    nn.init.zeros_(module.output.weight)
    nn.init.constant_(module.head_norm.weight, ((1 + layer) / num_layers) ** 0.7)


def _rwkv7_channel_mix(module: RWKV7ChannelMix, layer: int, num_layers: int) -> None:
    """RWKV-LM, RWKV-v7/train_temp/src/model.py, `RWKV_CMix_x070.__init__`."""
    width, q = module.d_model, _depth(layer, num_layers)[1]
    module.mix_key.copy_(1.0 - (torch.arange(width) / width) ** (q**4))
    bound = 0.5 / math.sqrt(width)
    nn.init.uniform_(module.key.weight, -bound, bound)
    nn.init.zeros_(module.value.weight)


def _rwkv6(module: RWKV6, layer: int, num_layers: int) -> None:
    """RWKV-LM, RWKV-v5/src/model.py, `RWKV_Tmix_x060.__init__` and `generate_init_weight`."""
    width = module.receptance.in_features
    p, q = _depth(layer, num_layers)
    channel = torch.arange(width)
    ratio, slope = channel / width, channel / max(width - 1, 1)
    module.mix_base.copy_(1.0 - ratio**q)
    for row, (power, offset) in enumerate(
        ((1.0, 0.0), (1.0, 0.0), (1.0, 0.3 * p), (0.5, 0.0), (0.5, 0.0))  # w, k, v, r, g
    ):
        module.mix[row] = 1.0 - (ratio ** (power * q) + offset)
    nn.init.zeros_(module.mix_down)
    nn.init.uniform_(module.mix_up, -0.01, 0.01)
    nn.init.zeros_(module.decay.down)
    nn.init.uniform_(module.decay.up, -0.01, 0.01)
    _bias(module.decay).copy_(-6.0 + 5.0 * slope ** (0.7 + 1.3 * p))
    zigzag = ((channel + 1) % 3 - 1) * 0.1
    module.bonus.copy_((p * (1.0 - slope) + zigzag).view_as(module.bonus))
    _orthogonal(module.receptance.weight, 1.0)
    _orthogonal(module.value.weight, 1.0)
    _orthogonal(module.key.weight, 0.1)
    _orthogonal(module.gate.weight, 0.1)
    nn.init.zeros_(module.output.weight)
    nn.init.constant_(module.head_norm.weight, ((1 + layer) / num_layers) ** 0.7)


def _rwkv6_channel_mix(module: RWKV6ChannelMix, layer: int, num_layers: int) -> None:
    """RWKV-LM, RWKV-v5/src/model.py, `RWKV_CMix_x060.__init__` and `generate_init_weight`."""
    q = _depth(layer, num_layers)[1]
    mix = 1.0 - (torch.arange(module.d_model) / module.d_model) ** q
    module.mix_key.copy_(mix)
    module.mix_receptance.copy_(mix)
    _orthogonal(module.key.weight, 1.0)
    nn.init.zeros_(module.receptance.weight)
    nn.init.zeros_(module.value.weight)


def _bias(low_rank: LowRank) -> nn.Parameter:
    assert low_rank.bias is not None
    return low_rank.bias
