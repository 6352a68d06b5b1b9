"""Speed and memory, measured so that a noisy machine hurts all mixers alike: in turn, medians."""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from model import state as states
from model.decode import engine_if_any
from model.generation import prefill, step
from model.language_model import LanguageModel
from model.state import ModelState
from train.loss import next_token_loss
from train.memory import keep_freed_memory
from train.optimizer import make_optimizer
from train.precision import CPU, both_passes, is_fast_in_bf16
from train.recipes import recipe_of
from train.tensor_memory import TensorMemory

Key = TypeVar("Key")
Begin = Callable[[], Callable[[torch.Tensor], object]]
"""Gives a function that reads one token `[1]` after the other, on from the same text each time."""

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
    peak_memory_bytes: int
    """Weights, those packed for decoding too, the state, and all tensors that a token makes."""


def take_turns(
    runs: Mapping[Key, Callable[[], Sequence[float]]],
    *,
    rounds: int,
    seconds: float = 0.0,
    warm_up: int = 1,
    advance: Callable[[], None] = lambda: None,
) -> dict[Key, list[float]]:
    """Runs everything once, then everything again, and so on: what slows one slows all.

    Args:
        runs: each gives its own measurements, one or more a turn.
        rounds: counted turns of each, at least.
        seconds: goes on with the turns until so much time has passed.
        warm_up: turns before them that are not counted.
        advance: called after every run.
    """
    spent: dict[Key, list[float]] = {key: [] for key in runs}
    start = time.perf_counter()
    for turn in itertools.count():
        if turn == warm_up:
            start = time.perf_counter()
        if turn >= warm_up + rounds and time.perf_counter() - start >= seconds:
            break
        for key, run in runs.items():
            values = run()
            if turn >= warm_up:
                spent[key] += values
            advance()
    return spent


def timed(run: Callable[[], object]) -> Callable[[], list[float]]:
    """The same as a turn of its own: gives its seconds."""

    def turn() -> list[float]:
        start = time.perf_counter()
        run()
        return [time.perf_counter() - start]

    return turn


def measure_training(
    models: Mapping[str, LanguageModel],
    *,
    context: int,
    batch_size: int,
    rounds: int,
    advance: Callable[[], None],
) -> dict[str, Measurement]:
    """Tokens/s of whole training steps on random tokens, one step of each model in turn.

    In the precision that `ebb train` chooses on a CPU.

    Args:
        models: by name; their weights are changed.
        context: tokens a sequence.
        batch_size: sequences a step.
        rounds: counted steps of each, after one that is not.
        advance: called after every step.
    """
    keep_freed_memory()
    bf16 = is_fast_in_bf16(CPU)
    steps = {
        name: timed(training_step(model, context, batch_size, bf16=bf16))
        for name, model in models.items()
    }
    seconds = take_turns(steps, rounds=rounds, advance=advance)
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

    Args:
        models: by name.
        contexts: tokens already seen, rising.
        tokens: measured at each, in bursts of ten.
        advance: called after every context of every model.
    """
    states_at: list[dict[str, ModelState]] = []
    current = {name: model.initial_state(1) for name, model in models.items()}
    vocabulary = min(model.config.vocab_size for model in models.values())
    for context, before in zip(contexts, [0, *contexts], strict=False):
        prompt = torch.randint(vocabulary, (1, context - before))
        for name, model in models.items():
            _, current[name] = prefill(model, prompt, current[name])
            advance()
        states_at.append(dict(current))
    runs = {
        (name, context): burst(stepper(model, at[name]), vocabulary)
        for context, at in zip(contexts, states_at, strict=True)
        for name, model in models.items()
    }
    spent = take_turns(runs, rounds=math.ceil(tokens / BURST), warm_up=0)
    return {
        name: [
            Decoding(
                context,
                Measurement.of([1e3 * seconds for seconds in spent[name, context]]),
                states.num_bytes(at[name]),
                peak_memory(model, at[name]),
            )
            for context, at in zip(contexts, states_at, strict=True)
        ]
        for name, model in models.items()
    }


def peak_memory(model: LanguageModel, state: ModelState) -> int:
    """While two tokens are read: the first may have to move a cache, the second has it moved."""
    engine = engine_if_any(model, state)
    held = sum(p.numel() * p.element_size() for p in model.parameters()) + states.num_bytes(state)
    read = stepper(model, state)()
    with TensorMemory() as memory:
        for token in torch.zeros(2, 1, dtype=torch.long):
            read(token)
    packed = 0 if engine is None else engine.num_bytes
    total: int = held + packed + memory.peak
    return total


def burst(begin: Begin, vocabulary: int) -> Callable[[], list[float]]:
    """As a turn: the seconds of each of ten random tokens, always after the same text.

    In a burst a model finds its own weights in the caches, as it does when it runs alone; the first
    tokens of each, which do not, are not counted.
    """

    def turn() -> list[float]:
        read, spent = begin(), []
        for token in torch.randint(vocabulary, (UNCOUNTED + BURST, 1)):
            start = time.perf_counter()
            read(token)
            spent.append(time.perf_counter() - start)
        return spent[UNCOUNTED:]

    return turn


def stepper(model: LanguageModel, state: ModelState) -> Begin:
    """A model that reads on from a state, which stays as it is."""

    def begin() -> Callable[[torch.Tensor], object]:
        current = state

        def read(token: torch.Tensor) -> None:
            nonlocal current
            _, current = step(model, token, current)

        return read

    return begin


def training_step(
    model: LanguageModel, context: int, batch_size: int, *, bf16: bool
) -> Callable[[], None]:
    """A whole step on random tokens, as in `ebb train`."""
    recipe = recipe_of(model.config.mixer)
    optimizer = make_optimizer(
        model, recipe, recipe.learning_rate(model.config.d_model), recipe.weight_decay
    )
    return step_of(
        model,
        lambda inputs, targets: next_token_loss(model, inputs, targets),
        optimizer,
        model.config.vocab_size,
        context,
        batch_size,
        bf16=bf16,
    )


def step_of(
    model: nn.Module,
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    vocab_size: int,
    context: int,
    batch_size: int,
    *,
    bf16: bool,
) -> Callable[[], None]:
    """A whole step of any module: forward, backward, clipping and the optimiser."""
    tokens = torch.randint(vocab_size, (batch_size, context + 1))

    def run() -> None:
        both_passes(lambda: loss_of(tokens[:, :-1], tokens[:, 1:]), CPU, bf16=bf16)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run
