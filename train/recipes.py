"""How each mixer is trained: what its authors found, and presets for budgets of time."""

from dataclasses import dataclass
from typing import Any

from model.layers import MIXERS
from model.presets import parse_mixer


@dataclass(frozen=True)
class Recipe:
    """AdamW and its schedule."""

    rate_times_width: float
    final_fraction: float
    """Of the peak rate, at the end of the cosine."""
    betas: tuple[float, float]
    eps: float
    weight_decay: float

    def learning_rate(self, d_model: int) -> float:
        """The peak for models of that width: the wider, the lower, as under muP (arXiv 2203.03466).

        To two digits; models narrower than `NARROWEST` have its rate.
        """
        return float(f"{self.rate_times_width / max(d_model, NARROWEST):.2g}")


NARROWEST = 128
"""The width up to which the rates were tried."""

RATE_TIMES_WIDTH = 0.5
"""Those of GPT-3's sizes (arXiv 2005.14165, table 2.1) are 0.3 to 0.7; 128 wide, 4e-3 is best."""

RECIPES = {
    # nanoGPT's betas for small models (karpathy/nanoGPT, train_shakespeare_char)
    "transformer": Recipe(RATE_TIMES_WIDTH, 0.1, (0.9, 0.99), 1e-8, 0.1),
    # RWKV-LM's betas and eps (RWKV-v7/train_temp)
    "rwkv": Recipe(RATE_TIMES_WIDTH, 0.1, (0.9, 0.99), 1e-18, 0.1),
}
"""By the body that a mixer stands in."""


def recipe_of(mixer: str) -> Recipe:
    """That of a row of `MIXERS`."""
    return RECIPES[MIXERS[mixer].body.name]


MOST_EPOCHS = 10
"""On tiny Shakespeare, `cpu-1h` without this bound is best after eleven, and then grows worse."""


def _recipe(size: str, context: int, batch_size: int, **settings: Any) -> dict[str, Any]:
    """What is common to the budgets, and what is not."""
    return {
        "size": size,
        "context": context,
        "batch_size": batch_size,
        "tokenizer": "bytes",
        "optimizer": "muon",
        "schedule": "cosine",
        "final_fraction": 0.0,
        "warmup": 50,
        "max_epochs": MOST_EPOCHS,
        "dropout": None,
        **settings,
    }


BUDGETS: dict[str, dict[str, dict[str, Any]]] = {
    "cpu-2min": {
        "rwkv": _recipe("nano", 256, 4, steps=1500, learning_rate=8e-3),
        "transformer": _recipe("nano", 256, 4, steps=1750, learning_rate=6e-3),
    },
    "cpu-10min": {
        "rwkv": _recipe("4x192", 256, 8, steps=2500, learning_rate=6e-3),
        "transformer": _recipe("4x192", 256, 8, steps=2900, learning_rate=5e-3),
    },
    "cpu-1h": {
        "rwkv": _recipe("micro", 512, 8, steps=4500, learning_rate=5e-3),
        "transformer": _recipe("micro", 512, 8, steps=4800, learning_rate=4e-3),
    },
}
"""Settings of `ebb train --recipe`, by the body that a mixer stands in."""


def dropout_for(epochs: float) -> float:
    """What a text that is read so often asks for.

    Up to four times it teaches about as much as a new one would (Muennighoff et al., arXiv
    2305.16264); nanoGPT's recipe for tiny Shakespeare, read 80 times over, has 0.2.
    """
    return 0.0 if epochs <= 4 else 0.1 if epochs <= 8 else 0.2


def budget_settings(budget: str, mixer: str) -> dict[str, Any]:
    """The settings of `BUDGETS` for a mixer as the command line names it.

    Raises:
        ValueError: for an unknown budget or mixer.
    """
    if budget not in BUDGETS:
        raise ValueError(f"there is no recipe {budget!r}; choose one of {', '.join(BUDGETS)}")
    return dict(BUDGETS[budget][MIXERS[parse_mixer(mixer)[0]].body.name])
