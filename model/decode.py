"""One token of one text at a time, at the speed of memory: the native step of a model.

The weights are packed once, in one of `FORMATS`; after that every token is one call. What has no
native step, and a machine without compiled kernels, decode in PyTorch (`model.generation.step`).
"""

import copy
import ctypes
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn

from model.language_model import Block, LanguageModel
from model.layers.layer import Layer
from model.layers.low_rank import LowRank
from model.layers.norm import LayerNorm, RMSNorm
from model.ops.native import step
from model.ops.native.packing import FORMATS, rounded
from model.ops.native.program import LOGITS, Program, Vector
from model.state import ModelState, map_tensors, tensors


class Engine:
    """A model's weights as the native step wants them; they are those of when it was made.

    Args:
        model: float32, on the CPU.
        weights: one of `FORMATS`.

    Raises:
        ValueError: saying why there is no native step for this model or machine.
    """

    def __init__(self, model: LanguageModel, weights: str = "fp32") -> None:
        if weights not in FORMATS:
            raise ValueError(f"weights must be one of {', '.join(FORMATS)}, but are {weights!r}")
        if reason := _why_not(model):
            raise ValueError(reason)
        self.vocab_size, self.weights = model.config.vocab_size, weights
        self._stamps = _stamps(model)
        with torch.no_grad():
            program, like = _describe(model, weights)
        self._shapes = [tensor.shape for _, tensor in tensors(like)]
        self._step = step.Step(program.finish())

    def is_current(self) -> bool:
        """Whether the model still is what it was when this was made."""
        return all(parts.get(name) is part and _stamp(part) == stamp
                   for parts, name, part, stamp in self._stamps)

    def run(self, token: int, before: step.Pointers, after: step.Pointers) -> Tensor:
        """Reads a token: logits `[1, vocab_size]`. Changes the tensors of `after` only."""
        if not 0 <= token < self.vocab_size:
            raise ValueError(
                f"token {token} lies outside the model's vocabulary of {self.vocab_size}: "
                "encode with the tokenizer that it was trained with"
            )
        logits = torch.empty(1, self.vocab_size)
        self._step(token, before, after, logits)
        return logits

    def takes(self, state: ModelState) -> bool:
        """Whether this is a state of one text, of a model of this shape, in float32."""
        given = [tensor for _, tensor in tensors(state)]
        return [x.shape for x in given] == self._shapes and all(
            x.dtype == torch.float32 and x.device.type == "cpu" for x in given
        )


class Decoder:
    """One text that an engine goes on with; it owns its state, and changes it in place."""

    def __init__(self, engine: Engine, state: ModelState) -> None:
        assert engine.takes(state)
        self._engine = engine
        self._state: ModelState = map_tensors(_copied, state)
        self._pointers = step.pointers([x for _, x in tensors(self._state)])

    @property
    def state(self) -> ModelState:
        """A copy, which later tokens do not change."""
        copied: ModelState = map_tensors(_copied, self._state)
        return copied

    def step(self, token: int) -> Tensor:
        """Reads a token: logits `[1, vocab_size]` of the next."""
        return self._engine.run(token, self._pointers, self._pointers)


def engine_for(model: LanguageModel, weights: str = "fp32") -> Engine:
    """The engine of a model, packed anew only when the model has changed.

    Raises:
        ValueError: as `Engine`.
    """
    engines = _ENGINES.setdefault(model, {})
    if weights not in engines or not engines[weights].is_current():
        engines.pop(weights, None)  # frees the memory first
        engines[weights] = Engine(model, weights)
    return engines[weights]


def engine_if_any(model: LanguageModel, state: ModelState) -> Engine | None:
    """The engine in float32, where there is a native step for this model and state."""
    if (batch := next(tensors(state))[1].shape[0]) != 1 or _why_not(model):
        return None
    del batch
    engine = engine_for(model)
    return engine if engine.takes(state) else None
