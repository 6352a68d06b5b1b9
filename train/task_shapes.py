"""Models for the tasks: equal parameters, and states as nearly equal as a mixer's widths allow."""

import dataclasses
import math
from collections.abc import Iterator

import torch

from model import state as states
from model.config import ModelConfig
from model.language_model import LanguageModel, shapes_only
from model.layers import MIXERS
from model.presets import complete, parse_mixer
from train.matching import matched, num_parameters

LEAST_HEAD = 4
"""The narrowest head that is tried."""


def matched_task_shapes(
    names: list[str], *, vocab_size: int, width: int, layers: int, head_dim: int
) -> dict[str, ModelConfig]:
    """A shape for each mixer, with the parameters of the largest and about the same state bytes.

    All have the same width D and depth; a mixer without a channel mix has twice the blocks, as in
    `model.presets.preset`. The state aimed at is a plain matrix in every head, `layers D head_dim`
    numbers in float32, whatever mixers take part. Every width of the state that a mixer can have is
    tried: heads of 4, 8, 16, ... channels, which cut D into fewer, larger matrices, or, where a
    mixer has a `state_size` of its own (Mamba-2), that instead. For each the FFN width is solved
    for the parameters, as in `ebb compare`, and the shape whose state is nearest by ratio is
    taken; windows of convolutions and token shifts count as state. A mixer whose state does not
    depend on such a width (RWKV-4) keeps what it has. So does one whose state grows with the text
    (a KV cache): its heads have `head_dim` channels.

    Raises:
        ValueError: if a mixer cannot have that width.
    """
    bases = {name: _base(name, vocab_size, width, layers, head_dim) for name in names}
    parameters = max(num_parameters(base) for base in bases.values())
    aim = 4 * layers * width * head_dim
    return {name: _nearest(base, parameters, aim) for name, base in bases.items()}


def state_bytes(shape: ModelConfig, tokens: int) -> int:
    """Of the state of one text after so many tokens."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = LanguageModel(shape)
        _, state = model.features(torch.zeros(1, tokens, dtype=torch.int64))
    return states.num_bytes(state)


def _base(name: str, vocab_size: int, width: int, layers: int, head_dim: int) -> ModelConfig:
    row, options = parse_mixer(name)
    blocks = layers * (1 if MIXERS[row].channel_mix is not None else 2)
    shape = ModelConfig(row, vocab_size, width, blocks, head_dim, None, options)
    return complete(shape)


def _nearest(base: ModelConfig, parameters: int, aim: int) -> ModelConfig:
    if state_bytes(base, 2) != state_bytes(base, 1):
        return matched(base, parameters, 1)
    found, error = list[tuple[float, ModelConfig]](), ""
    for shape in _with_other_states(base):
        try:
            shape = matched(complete(shape), parameters, 1)
            held = states.num_bytes(shapes_only(shape).initial_state(1))
        except ValueError as refused:  # a width that the mixer cannot have
            error = str(refused)
            continue
        found.append((abs(math.log(held / aim)), shape))
    if not found:
        raise ValueError(error)
    return min(found, key=lambda pair: pair[0])[1]


def _with_other_states(base: ModelConfig) -> Iterator[ModelConfig]:
    """The base first, which wins where all states are alike; then powers of two."""
    yield base
    sizes = [2**n for n in range(2, 9)]
    if any(field.name == "state_size" for field in dataclasses.fields(base.options or base)):
        assert base.options is not None
        for size in sizes:
            options = dataclasses.replace(base.options, **{"state_size": size})
            yield dataclasses.replace(base, options=options)
    else:
        for head in sizes:
            if LEAST_HEAD <= head <= base.d_model and base.d_model % head == 0:
                yield dataclasses.replace(base, head_dim=head)
