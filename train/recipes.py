"""How each mixer is trained: what its authors found, in one table."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """AdamW and its schedule."""

    learning_rate: float
    final_fraction: float
    """Of the peak rate, at the end of the cosine."""
    betas: tuple[float, float]
    eps: float
    weight_decay: float


_TRANSFORMER = Recipe(1e-3, 0.1, (0.9, 0.99), 1e-8, 0.1)
"""nanoGPT's for small models on a CPU (karpathy/nanoGPT, README, train_shakespeare_char)."""
_RWKV = Recipe(1e-3, 0.1, (0.9, 0.99), 1e-18, 0.1)
"""RWKV-LM's betas and eps (RWKV-v7/train_temp), with the rate for small models."""

RECIPES = {
    "attention": _TRANSFORMER,
    "linear_transformer": _TRANSFORMER,
    "rwkv6": _RWKV,
    "rwkv7": _RWKV,
}
