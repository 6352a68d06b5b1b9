"""Normalisations that the blocks share."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """LayerNorm with RWKV's eps, 1e-5."""

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model, eps=1e-5)


class RMSNorm(nn.RMSNorm):
    """RMSNorm (arXiv 1910.07467) with eps 1e-6."""

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model, eps=1e-6)


class HeadNorm(nn.Module):
    """GroupNorm with one group a head: `[B, T, H, V]` -> `[B, T, H V]`, normalised over V."""

    def __init__(self, num_heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_heads * head_dim))
        self.bias = nn.Parameter(torch.zeros(num_heads * head_dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, H, V]` -> `[B, T, H V]`."""
        normalised = F.layer_norm(x, x.shape[-1:], eps=self.eps)
        return torch.addcmul(self.bias, normalised.flatten(-2), self.weight)


class HeadRMSNorm(nn.Module):
    """RMSNorm over each head, its weights shared: `[B, T, H, V]` -> `[B, T, H V]`."""

    def __init__(self, value_dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(value_dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, H, V]` -> `[B, T, H V]`."""
        normalised = F.rms_norm(x, x.shape[-1:], eps=self.eps)
        return (normalised * self.weight).flatten(-2)
