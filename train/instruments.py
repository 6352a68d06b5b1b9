"""Instruments: why a model does what it does, read on a small fixed piece of validation text.

They look at a copy of what the ops are called with and at gradients of their own, so they change
nothing that is trained; where none is asked for, nothing of this runs.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from data.loader import Batch
from model.language_model import LanguageModel
from train.evaluate import evaluating
from train.half_lives import half_lives_of
from train.implied import (
    Observed,
    effective_rank,
    entropies,
    implied_attention,
    observe,
    row_shares,
    smallest_divisor,
    spans,
    state_matrix,
)
from train.loss import next_token_loss

ROWS, TOKENS = 2, 256
"""Of the batch they are read on, at most."""

STATE_PARTS = 4
"""Equal parts of the text after which the state is looked at."""


class Reading(NamedTuple):
    """One number of one layer."""

    name: str
    """Such as `attention_entropy`."""
    value: float
    detail: str = ""
    """Such as `head2`; empty for the whole layer."""


def _attention(observed: Observed) -> list[Reading]:
    """Of the implied attention: means over rows, heads and the batch, and the smallest divisor."""
    matrix = implied_attention(observed)
    shares = row_shares(matrix)
    readings = [
        Reading("attention_norm", torch.linalg.matrix_norm(matrix).mean().item()),
        Reading("attention_entropy", entropies(shares).nanmean().item()),
        Reading("attention_span", spans(shares).nanmean().item()),
    ]
    divisor = smallest_divisor(observed)
    return readings if divisor is None else [*readings, Reading("smallest_divisor", divisor)]


def _states(observed: Observed) -> list[Reading]:
    """Frobenius norm and effective rank of the state, means over heads and the batch."""
    readings = []
    time = observed.arguments["v"].shape[1]
    for end, state in state_matrix(observed, STATE_PARTS):
        found = [("state_norm", torch.linalg.matrix_norm(state).mean().item())]
        if state.shape[-2] > 1:  # a mean for each channel is no matrix
            found.append(("state_rank", effective_rank(state).nanmean().item()))
        for detail in (f"token{end}", "") if end == time else (f"token{end}",):
            readings += [Reading(name, value, detail) for name, value in found]
    return readings


def _decays(observed: Observed) -> list[Reading]:
    """Median half-life of the layer, and of each head where there are heads."""
    lives = half_lives_of(observed)
    if lives is None:
        return []
    readings = [Reading("half_life", lives.median().item())]
    heads = lives.shape[-1]
    if heads > 1:
        readings += [
            Reading("half_life", lives[..., head].median().item(), f"head{head}")
            for head in range(heads)
        ]
    return readings


OF_OPS: dict[str, Callable[[Observed], list[Reading]]] = {
    "attention": _attention,
    "states": _states,
    "decays": _decays,
}
"""Instruments that look at the op of each layer."""

INSTRUMENTS = (*OF_OPS, "gradients")


def parse_instruments(text: str) -> tuple[str, ...]:
    """`attention,decays` or `all` -> the instruments, in their own order.

    Raises:
        ValueError: for a name that does not exist.
    """
    names = [name.strip() for name in text.split(",")]
    if names == ["all"]:
        return INSTRUMENTS
    for name in names:
        if name not in INSTRUMENTS:
            raise ValueError(
                f"there is no instrument {name!r}; choose of {', '.join(INSTRUMENTS)}, with commas "
                "between, or all"
            )
    return tuple(name for name in INSTRUMENTS if name in names)


def small_part(batch: Batch) -> Batch:
    """The first rows and tokens of a batch, few enough for every instrument."""
    rows = batch.inputs[:ROWS, :TOKENS], batch.targets[:ROWS, :TOKENS]
    return Batch(*rows, None if batch.reset is None else batch.reset[:ROWS, :TOKENS])


def read_instruments(
    model: LanguageModel, batch: Batch, instruments: Sequence[str]
) -> dict[str, float]:
    """All readings on a batch, named as in `metrics.jsonl`: `attention_entropy.layer0`.

    Args:
        model: switched to evaluation mode and back; nothing else of it changes, nor do random
            numbers.
        batch: on the CPU; of a large one a small part is read.
        instruments: of `INSTRUMENTS`.

    Returns:
        Numbers of six digits. What is infinite, such as the half-life of what does not decay, or
        not defined is left out.
    """
    device = next(model.parameters()).device
    inputs, targets, reset = (None if x is None else x.to(device) for x in small_part(batch))
    assert inputs is not None
    assert targets is not None
    found: dict[str, float] = {}
    with evaluating(model):
        if any(name in OF_OPS for name in instruments):
            if "attention" in instruments:
                found["attention_norm.sqrt_tokens"] = math.sqrt(inputs.shape[1])
            for layer, observed in enumerate(observe(model, inputs, reset)):
                for name in instruments:
                    for reading in OF_OPS[name](observed) if name in OF_OPS else ():
                        path = (reading.name, f"layer{layer}", reading.detail)
                        found[".".join(part for part in path if part)] = reading.value
        if "gradients" in instruments:
            found |= gradient_norms(model, inputs, targets, reset)
    finite = ((name, value) for name, value in found.items() if math.isfinite(value))
    return {name: float(f"{value:.6g}") for name, value in finite}


def gradient_norms(
    model: LanguageModel, inputs: Tensor, targets: Tensor, reset: Tensor | None
) -> dict[str, float]:
    """Norm of the loss's gradient in each layer, in the embedding, the last norm and the head.

    The gradients are not those of training, and go nowhere near them.
    """
    names, parameters = zip(*model.named_parameters(), strict=True)
    with torch.enable_grad():
        loss = next_token_loss(model, inputs, targets, reset)
        gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
    squares: dict[str, float] = {}
    for name, gradient in zip(names, gradients, strict=True):
        first, second, *_ = name.split(".")
        part = f"gradient_norm.{f'layer{second}' if first == 'blocks' else first}"
        squares[part] = squares.get(part, 0.0) + gradient.double().square().sum().item()
    return {part: math.sqrt(square) for part, square in squares.items()}


def by_layer(readings: dict[str, float]) -> list[dict[str, float]]:
    """A row for each layer of what was read of it as a whole; `layer` stands first."""
    rows: dict[int, dict[str, float]] = {}
    for name, value in readings.items():
        what, _, where = name.partition(".")
        if where.startswith("layer") and where[5:].isdecimal():
            layer = int(where[5:])
            rows.setdefault(layer, {"layer": layer})[what] = value
    return [rows[layer] for layer in sorted(rows)]
