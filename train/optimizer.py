"""The optimiser."""

import torch

from model.initialization import parameter_groups
from model.language_model import LanguageModel
from train.recipes import Recipe


def make_optimizer(
    model: LanguageModel, recipe: Recipe, learning_rate: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) with the model's own parameter groups, in one fused pass."""
    return torch.optim.AdamW(
        parameter_groups(model, learning_rate, weight_decay),
        betas=recipe.betas,
        eps=recipe.eps,
        fused=True,
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets every group's rate to its own multiple of `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
