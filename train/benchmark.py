"""Speed and memory, measured so that a noisy machine hurts all mixers alike: in turn, medians."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from model import state as states
from model.generation import prefill, step
from model.language_model import LanguageModel
from model.state import ModelState
from train.loss import next_token_loss
from train.memory import keep_freed_memory
from train.optimizer import make_optimizer
from train.recipes import recipe_of

BURST = 10
"""Tokens that one model decodes before the next has its turn."""
UNCOUNTED = 3
"""Tokens before each burst, in which a model comes back into the caches."""


@dataclass(frozen=True)
class Measurement:
    """A median and how far the middle half of the measurements spreads."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Measurement":
        """From single measurements, at least one."""
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(middle, low, high)


@dataclass(frozen=True)
class Decoding:
    """One token at a time, batch 1, after so many tokens."""

    context: int
    milliseconds: Measurement
    """Per token."""
    state_bytes: int


def measure_training(
    models: Mapping[str, LanguageModel],
    *,
    context: int,
    batch_size: int,
    rounds: int,
    advance: Callable[[], None],
) -> dict[str, Measurement]:
    """Tokens/s of whole training steps on random tokens, one step of each model in turn.

    Args:
        models: by name; their weights are changed.
        context: tokens a sequence.
        batch_size: sequences a step.
        rounds: counted steps of each, after one that is not.
        advance: called after every step.
    """
    keep_freed_memory()
    seconds: dict[str, list[float]] = {name: [] for name in models}
    steps = {name: _training_step(model, context, batch_size) for name, model in models.items()}
    for turn in range(rounds + 1):
        for name, run in steps.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
            advance()
    tokens = context * batch_size
    return {name: Measurement.of([tokens / s for s in spent]) for name, spent in seconds.items()}


def measure_decoding(
    models: Mapping[str, LanguageModel],
    *,
    contexts: Sequence[int],
    tokens: int,
    advance: Callable[[], None],
) -> dict[str, list[Decoding]]:
    """Milliseconds a token at several contexts; contexts and models take turns by bursts.

    In a burst a model finds its own weights in the caches, as it does when it runs alone; the first
    tokens of each, which do not, are not counted.

    Args:
        models: by name.
        contexts: tokens already seen, rising.
        tokens: measured at each, in bursts of ten.
        advance: called after every context of every model.
    """
    states_at: list[dict[str, ModelState]] = []
    current = {name: model.initial_state(1) for name, model in models.items()}
    for context, before in zip(contexts, [0, *contexts], strict=False):
        prompt = _random_tokens(models, context - before)
        for name, model in models.items():
            _, current[name] = prefill(model, prompt, current[name])
            advance()
        states_at.append(dict(current))
    spent: dict[tuple[str, int], list[float]] = {}
    for _ in range(math.ceil(tokens / BURST)):
        for context, at in zip(contexts, states_at, strict=True):
            for name, model in models.items():
                milliseconds = _burst(model, at[name], _random_tokens(models, UNCOUNTED + BURST))
                spent.setdefault((name, context), []).extend(milliseconds[UNCOUNTED:])
    return {
        name: [
            Decoding(context, Measurement.of(spent[name, context]), states.num_bytes(at[name]))
            for context, at in zip(contexts, states_at, strict=True)
        ]
        for name in models
    }


def _burst(model: LanguageModel, state: ModelState, tokens: torch.Tensor) -> list[float]:
    """Milliseconds of a step for each of `tokens [1, T]`."""
    spent = []
    for token in tokens.unbind(1):
        start = time.perf_counter()
        _, state = step(model, token, state)
        spent.append(1e3 * (time.perf_counter() - start))
    return spent


def _random_tokens(models: Mapping[str, LanguageModel], length: int) -> torch.Tensor:
    """`[1, length]` tokens that every model knows."""
    vocabulary = min(model.config.vocab_size for model in models.values())
    return torch.randint(vocabulary, (1, length))


def _training_step(model: LanguageModel, context: int, batch_size: int) -> Callable[[], None]:
    recipe = recipe_of(model.config.mixer)
    optimizer = make_optimizer(model, recipe, recipe.learning_rate, recipe.weight_decay)
    tokens = torch.randint(model.config.vocab_size, (batch_size, context + 1))

    def run() -> None:
        loss = next_token_loss(model, tokens[:, :-1], tokens[:, 1:])
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run
