"""What the layers' own initial values are made of."""

import math

import torch
from torch import Tensor, nn


def orthogonal_(weight: Tensor, scale: float) -> None:
    """Orthogonal, with gain `scale sqrt(rows / columns)` where there are more rows than columns."""
    rows, columns = weight.shape
    nn.init.orthogonal_(weight, gain=scale * math.sqrt(max(rows / columns, 1.0)))


def small_init_(weight: Tensor) -> None:
    """Normal with `sqrt(2 / (5 columns))`, SmallInit (Nguyen and Salazar, arXiv 1910.05895).

    GPT-2's 0.02 is that of a model 1,000 wide, and too small for narrower ones.
    """
    nn.init.normal_(weight, std=math.sqrt(0.4 / weight.shape[1]))


def depth(layer: int, num_layers: int) -> tuple[float, float]:
    """`p = layer / (L - 1)`, 0 for a single layer, and `q = 1 - layer / L`."""
    return (layer / (num_layers - 1) if num_layers > 1 else 0.0), 1.0 - layer / num_layers


def ramps(width: int) -> tuple[Tensor, Tensor]:
    """`channel / D` and `channel / (D - 1)`, each `[D]`: the two ramps of RWKV's values."""
    channel = torch.arange(width)
    return channel / width, channel / max(width - 1, 1)


def inverse_softplus(x: Tensor) -> Tensor:
    """Y with `softplus(y) = x`, x > 0."""
    return x + torch.log(-torch.expm1(-x))
