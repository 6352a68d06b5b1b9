"""Random networks that show how exact a form is, rather than how badly a number is conditioned.

A number that is by chance near zero, under a norm or a sum with a small eps, multiplies rounding
errors by 100 and more in all forms alike. So there is a large eps here (options that end in `eps`);
the ops are checked with the small ones. A checkpoint is what it is: there `train.verify.proof` asks
of an error beyond the tolerance whether rounding the inputs once moves the definition itself that
far, and says so.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from model.config import ModelConfig
from model.layers import MIXERS, Mixer

VOCABULARY = 29
SHAPES = ((32, 8), (64, 16), (128, 32), (256, 64))
"""Widths and head sizes to try: the smallest that a mixer accepts is taken."""
CALM_EPS = 1.0


def small_config(mixer: Mixer, name: str, options: Any, num_layers: int) -> ModelConfig:
    """The smallest shape that a mixer accepts, with a large eps wherever it divides.

    Raises:
        ValueError: if it accepts none.
    """
    options = mixer.time_mix.Options() if options is None else options
    values = vars(options)
    divisors = [name for name in values if name.endswith("eps") and values[name] is not None]
    options = replace(options, **dict.fromkeys(divisors, CALM_EPS))
    for d_model, head_dim in SHAPES:
        config = ModelConfig(name, VOCABULARY, d_model, num_layers, head_dim, None, options)
        try:
            mixer.time_mix.check(config)
        except ValueError as refusal:
            reason = refusal
            continue
        return config
    raise reason


@contextmanager
def seated(mixer: Mixer) -> Iterator[str]:
    """The name of a row of `MIXERS`; one that is in no table has a seat there for as long."""
    for name, row in MIXERS.items():
        if row is mixer:
            yield name
            return
    name = f"{mixer.time_mix.__name__} (not in the table)"
    MIXERS[name] = mixer
    try:
        yield name
    finally:
        del MIXERS[name]


@torch.no_grad()
def disturb(module: nn.Module, seed: int = 0) -> None:
    """Leaves no weight at zero, where official initial values put all output matrices.

    Matrices keep the size of activations; the numbers are such that float32 holds them exactly.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if name == "embedding.weight":
            factor = 1.0
        elif parameter.dim() == 1:
            factor = 0.3
        else:
            factor = parameter.shape[-1 if name.endswith(".weight") else -2] ** -0.5
        parameter.copy_((parameter + factor * noise).float())
