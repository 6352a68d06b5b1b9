"""How each mixer is trained: what its authors found, in one table."""

from dataclasses import dataclass

from model.layers import MIXERS


@dataclass(frozen=True)
class Recipe:
    """AdamW and its schedule."""

    learning_rate: float
    final_fraction: float
    """Of the peak rate, at the end of the cosine."""
    betas: tuple[float, float]
    eps: float
    weight_decay: float


RECIPES = {
    # nanoGPT's for small models on a CPU (karpathy/nanoGPT, README, train_shakespeare_char)
    "transformer": Recipe(1e-3, 0.1, (0.9, 0.99), 1e-8, 0.1),
    # RWKV-LM's betas and eps (RWKV-v7/train_temp), with the rate for small models
    "rwkv": Recipe(1e-3, 0.1, (0.9, 0.99), 1e-18, 0.1),
}
"""By the body that a mixer stands in."""


def recipe_of(mixer: str) -> Recipe:
    """That of a row of `MIXERS`."""
    return RECIPES[MIXERS[mixer].body.name]
