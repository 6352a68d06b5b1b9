"""What a run starts from: the settings of a recipe, the weights of a checkpoint, or nothing."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data.tokenizers import Tokenizer
from model.config import SIZES, ModelConfig
from model.language_model import LanguageModel
from model.layers import MIXERS
from model.presets import parse_mixer, preset
from train import checkpoint as files
from train.config import TrainConfig
from train.recipes import budget_settings, dropout_for, recipe_of
from train.snapshot import read_run


def starting_settings(
    *, recipe: str | None = None, init_from: str | None = None, mixer: str | None = None
) -> TrainConfig:
    """The settings of a recipe, of a checkpoint to start from, or both, for a mixer.

    What a checkpoint fixes (mixer, shape, tokenizer) stands above the recipe. Change what is left
    with `dataclasses.replace`, as flags do on the command line.

    Raises:
        ValueError: for a recipe that there is not, or a checkpoint that cannot be read.
    """
    fixed: dict[str, Any] = {} if init_from is None else _of_checkpoint(Path(init_from))
    if mixer is not None:
        fixed["mixer"] = mixer
    settings = {} if recipe is None else budget_settings(recipe, fixed.get("mixer", "rwkv7"))
    return TrainConfig(**{**settings, **fixed}, recipe=recipe, init_from=init_from)


def settings_of_flags(args: Sequence[str]) -> TrainConfig | None:
    """`starting_settings` of the flags among `args` that it depends on; None if there are none."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("recipe", "mixer"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--init-from", "--init_from")
    try:
        found = vars(parser.parse_known_args(args)[0])
    except argparse.ArgumentError:  # a flag without its value, which the real parser explains
        return None
    if found["recipe"] is None and found["init_from"] is None:
        return None
    return starting_settings(**found)


def new_model(config: TrainConfig, tokenizer: Tokenizer, *, is_resumed: bool) -> LanguageModel:
    """The model that a run trains; its weights are yet to come where it is resumed.

    Raises:
        ValueError: if the checkpoint to start from cannot be read, or settings contradict it.
    """
    if config.init_from is None:
        shape = preset(config.size, config.mixer, tokenizer.vocab_size, ffn_dim=config.ffn_dim)
        model = LanguageModel(shape)
    elif is_resumed:  # the checkpoint that it once started from may be gone
        own = read_run(config.folder)
        model = LanguageModel(files.model_config(config.folder, own))
    else:
        source = Path(config.init_from)
        _check_agreement(config, starting_settings(init_from=config.init_from))
        model = files.load_model(source)[0].train()
        files.read_tokenizer(source, files.read_config(source), model.config.vocab_size)
    return model


def final_fraction(config: TrainConfig) -> float:
    """Of the peak rate, where the schedule ends."""
    if config.final_fraction is not None:
        return config.final_fraction
    return recipe_of(parse_mixer(config.mixer)[0]).final_fraction


def steps(config: TrainConfig, num_tokens: int) -> int:
    """Those of a run on a text of so many tokens."""
    if config.max_epochs is None:
        return config.steps
    most = config.max_epochs * num_tokens / (config.batch_size * config.context)
    return min(config.steps, max(1, int(most)))


def warmup(config: TrainConfig, steps: int) -> int:
    """Steps of linear warm-up in a run of so many."""
    given = max(10, steps // 50) if config.warmup is None else config.warmup
    return min(given, steps - 1)


def epochs(config: TrainConfig, num_tokens: int) -> float:
    """How often a run reads a text of so many tokens."""
    return steps(config, num_tokens) * config.batch_size * config.context / num_tokens


def dropout(config: TrainConfig, num_tokens: int) -> float:
    """That of a run on a text of so many tokens."""
    return dropout_for(epochs(config, num_tokens)) if config.dropout is None else config.dropout


def seed_dropout(share: float, seed: int, step: int) -> None:
    """Makes what is left out in a step a function of seed and step, so that a resumed run repeats.

    Without dropout nothing is drawn in a step, and nothing is seeded.
    """
    if share:
        torch.manual_seed((seed * 2**32 + step + 1) % 2**63)


def _of_checkpoint(folder: Path) -> dict[str, Any]:
    """The settings that a checkpoint fixes."""
    config = files.read_config(folder)
    shape = files.model_config(folder, config)
    return {
        "mixer": config["train"].get("mixer", shape.mixer),
        "size": _size_of(shape),
        "tokenizer": str(folder / files.TOKENIZER),
    }


def _size_of(shape: ModelConfig) -> str:
    """As `--size` takes it: a name if there is one."""
    blocks = 1 if MIXERS[shape.mixer].channel_mix is not None else 2
    layers = max(1, shape.num_layers // blocks)
    for name, size in SIZES.items():
        if dataclasses.astuple(size) == (layers, shape.d_model, shape.head_dim):
            return name
    return f"{layers}x{shape.d_model}"


def _check_agreement(config: TrainConfig, fixed: TrainConfig) -> None:
    """Refuses settings that the checkpoint to start from has of its own.

    Raises:
        ValueError: naming the setting.
    """
    for name in ("mixer", "size", "tokenizer", "vocab_size", "ffn_dim"):
        wanted, given = getattr(fixed, name), getattr(config, name)
        if wanted != given:
            flag = name.replace("_", "-")
            has = "its own" if wanted is None else wanted
            raise ValueError(
                f"The checkpoint in {config.init_from} has {has} for {flag}, not {given}: leave "
                f"--{flag} out, or start from another checkpoint."
            )
