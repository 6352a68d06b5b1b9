"""How long a layer remembers by its decays alone: their half-lives on a text."""

import itertools
import math

import torch
from torch import Tensor

from data.corpora import load_corpus
from data.tokenizers import Tokenizer
from model.language_model import LanguageModel
from train.implied import Observed, observe

TOKENS = 1024
"""Read to see what decays the data brings about."""


def half_lives_of(observed: Observed) -> Tensor | None:
    """After how many tokens a decay alone has halved a write: `log(1/2) / log_decay`.

    What a delta rule removes beside that is not counted.

    Returns:
        `[..., H]`, over tokens and channels too; of wkv4 `[D, 1]`, as it has no heads; infinite
        where nothing decays. None for an op without decays.
    """
    log_decay = observed.arguments.get("log_decay")
    if log_decay is None:
        return None
    lives: Tensor = math.log(0.5) / log_decay.clamp(max=-1e-300)
    if lives.dim() == 1:
        return lives[:, None]
    return lives if lives.dim() == 3 else lives.movedim(-1, -2)


@torch.no_grad()
def half_lives(model: LanguageModel, tokens: Tensor) -> list[dict[str, float]]:
    """The half-lives of each layer.

    Args:
        model: in evaluation mode.
        tokens: `[B, T]`; decays that depend on the data are those on these tokens.

    Returns:
        For each layer `smallest`, `median` and `largest`, in tokens, over all heads, channels and
        tokens; infinite where nothing decays. Empty for a mixer without decays.
    """
    found = (half_lives_of(observed) for observed in observe(model, tokens))
    return [
        {
            "smallest": lives.amin().item(),
            "median": lives.median().item(),
            "largest": lives.amax().item(),
        }
        for lives in found
        if lives is not None
    ]


def known_text(tokenizer: Tokenizer, most: int) -> tuple[str, list[int]]:
    """The beginning of the built-in text's validation part, and up to so many tokens of it."""
    text = "".join(itertools.islice(load_corpus("sotu").validation, 1))[: 8 * most]
    return text, tokenizer.encode(text)[:most]
