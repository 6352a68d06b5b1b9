"""Normalisations that the blocks share."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.ops import fused


class Norm(nn.Module):
    """Over the width: `[..., D]` -> `[..., D]`."""

    def __init__(self, d_model: int, eps: float, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """The norm of x."""
        return fused.norm(x, self.weight, self.bias, self.eps)

    def of_sum(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of `x + y`, and `x + y` itself."""
        return fused.norm_of_sum(x, y, self.weight, self.bias, self.eps)


class LayerNorm(Norm):
    """LayerNorm (arXiv 1607.06450) with RWKV's eps, 1e-5."""

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model, eps=1e-5, bias=True)


class RMSNorm(Norm):
    """RMSNorm (arXiv 1910.07467) with eps 1e-6."""

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model, eps=1e-6, bias=False)


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

    def gated(
        self, x: Tensor, gate: Tensor, *, own: fused.OwnValue | None = None, silu: bool = False
    ) -> Tensor:
        """`(norm(x) + own value) gate`, or by `silu(gate)`; `elementwise.gated_head_norm`."""
        return fused.gated_head_norm(x, gate, self.weight, self.bias, self.eps, own=own, silu=silu)


class HeadRMSNorm(nn.Module):
    """RMSNorm over each head, its weights shared: `[B, T, H, V]` -> `[B, T, H V]`."""

    def __init__(self, value_dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(value_dim))
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """`[B, T, H, V]` -> `[B, T, H V]`, by choice times the silu of a gate of that shape."""
        return fused.head_rms_norm(x, self.weight, self.eps, gate)
