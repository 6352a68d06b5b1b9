"""How long each layer of a model remembers: the half-lives of its decays on a text."""

import math
from typing import Any

import torch
from torch import Tensor

from model.language_model import LanguageModel

TOKENS = 1024
"""Read to see what decays the data brings about."""


@torch.no_grad()
def half_lives(model: LanguageModel, tokens: Tensor) -> list[dict[str, float]]:
    """After how many tokens a layer's decay alone has halved a write: `log(1/2) / log_decay`.

    What a delta rule removes beside that is not counted.

    Args:
        model: in evaluation mode.
        tokens: `[B, T]`; decays that depend on the data are those on these tokens.

    Returns:
        For each layer `smallest`, `median` and `largest`, in tokens, over all heads, channels and
        tokens; infinite where nothing decays. Empty for a mixer without decays.
    """
    found: list[dict[str, float]] = []

    def observe(op: str, arguments: dict[str, Any]) -> None:
        log_decay = arguments.get("log_decay")
        if log_decay is not None:
            lives = math.log(0.5) / log_decay.detach().double().flatten().clamp(max=-1e-300)
            found.append(
                {
                    "smallest": lives.amin().item(),
                    "median": lives.median().item(),
                    "largest": lives.amax().item(),
                }
            )

    model.features(tokens, observe=observe)
    return found
