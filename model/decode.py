"""One token of one text at a time, at the speed of memory: the native step of a model.

The weights are packed once, in one of `FORMATS`; after that every token is one call. What has no
native step, and a machine without compiled kernels, decode in PyTorch (`model.generation.step`).
"""

import copy
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.language_model import Block, LanguageModel
from model.layers.layer import Layer
from model.layers.low_rank import LowRank
from model.layers.norm import Norm
from model.ops import native
from model.ops.native.instructions import LARGEST_HEAD, LOGITS, Vector
from model.ops.native.packing import FORMATS, rounded
from model.ops.native.program import Program
from model.ops.native.step import Pointers, Step
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
        check_weights(weights)
        if reason := why_not(model):
            raise ValueError(f"there is no native step: {reason}")
        self.vocab_size, self.weights = model.config.vocab_size, weights
        self._parts = list(_parts(model))
        with torch.no_grad():
            like = model.initial_state(1)
            self._like = [(tensor.shape, tensor.dtype) for _, tensor in tensors(like)]
            self._step = Step(_describe(model, weights, like).finish())

    @property
    def num_bytes(self) -> int:
        """Of the packed weights, all of which are read for a token."""
        return self._step.num_bytes

    def is_current(self) -> bool:
        """Whether the model still is what it was when this was made."""
        return all(part.is_current() for part in self._parts)

    def takes(self, state: ModelState) -> bool:
        """Whether this is a state of one text, of a model of this shape and precision."""
        given = [tensor for _, tensor in tensors(state)]
        return [(x.shape, x.dtype) for x in given] == self._like and all(
            x.device.type == "cpu" for x in given
        )

    def run(self, token: int, before: Pointers, after: Pointers) -> Tensor:
        """Reads a token: logits `[1, vocab_size]` of the next. Writes to `after` only.

        Raises:
            ValueError: for a token outside the vocabulary.
        """
        if not 0 <= token < self.vocab_size:
            raise ValueError(
                f"token {token} lies outside the model's vocabulary of {self.vocab_size}: "
                "encode with the tokenizer that it was trained with"
            )
        logits = torch.empty(1, self.vocab_size)
        self._step(token, before, after, logits)
        return logits

    def step(self, token: int, state: ModelState) -> tuple[Tensor, ModelState]:
        """Reads a token: logits `[1, vocab_size]` of the next, and the state after it."""
        before = [tensor.contiguous() for _, tensor in tensors(state)]
        after = [torch.empty_like(tensor) for tensor in before]
        logits = self.run(token, Pointers(before), Pointers(after))
        remaining = iter(after)
        new: ModelState = map_tensors(lambda _: next(remaining), state)
        return logits, new


class Decoder:
    """One text that an engine goes on with. It owns its state and changes it in place."""

    def __init__(self, engine: Engine, state: ModelState) -> None:
        assert engine.takes(state)
        self._engine = engine
        self._state = _copied(state)
        self._pointers = Pointers([tensor for _, tensor in tensors(self._state)])

    @property
    def state(self) -> ModelState:
        """A copy, which later tokens do not change."""
        return _copied(self._state)

    def step(self, token: int) -> Tensor:
        """Reads a token: logits `[1, vocab_size]` of the next.

        Raises:
            ValueError: for a token outside the vocabulary.
        """
        return self._engine.run(token, self._pointers, self._pointers)


def check_weights(weights: str) -> None:
    """Refuses a format that does not exist.

    Raises:
        ValueError: naming those that do.
    """
    if weights not in FORMATS:
        raise ValueError(f"weights must be one of {', '.join(FORMATS)}, but are {weights!r}")


def why_not(model: LanguageModel) -> str:
    """What keeps a model from the native step, in a few words; empty if nothing does."""
    if not native.is_available():
        return native.status()
    for module in model.modules():
        if isinstance(module, Layer) and not _is_described(module):
            return f"{type(module).__name__} has no description of it"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{type(module).__name__} has a hook, which only PyTorch calls"
    if any(p.dtype != torch.float32 or p.device.type != "cpu" for p in model.parameters()):
        return "it takes weights in float32 on the CPU"
    matrices = [x for _, x in tensors(model.initial_state(1)) if x.dim() == 4]
    if any(max(matrix.shape[2:]) > LARGEST_HEAD for matrix in matrices):
        return f"a head is wider than {LARGEST_HEAD}"
    return ""


_ENGINES: weakref.WeakKeyDictionary[LanguageModel, Engine] = weakref.WeakKeyDictionary()


def engine_for(model: LanguageModel, weights: str = "fp32") -> Engine:
    """The engine of a model; the last one made is kept until the model changes.

    Raises:
        ValueError: as `Engine`.
    """
    known = _ENGINES.get(model)
    if known is None or known.weights != weights or not known.is_current():
        _ENGINES.pop(model, None)
        del known  # its memory is free before the new one takes its own
        _ENGINES[model] = Engine(model, weights)
    return _ENGINES[model]


def forget(model: LanguageModel) -> None:
    """Gives back the memory of a model's engine, if there is one."""
    _ENGINES.pop(model, None)


def engine_if_any(model: LanguageModel, state: ModelState) -> Engine | None:
    """The engine in float32, if there is a native step for this model and state."""
    if next(tensors(state))[1].shape[0] != 1:
        return None
    known = _ENGINES.get(model)
    if known is None or known.weights != "fp32" or not known.is_current():
        if why_not(model):
            return None
        known = engine_for(model)
    return known if known.takes(state) else None


def with_rounded_weights(model: LanguageModel, weights: str) -> LanguageModel:
    """A copy whose matrices are what the native step keeps of them, to see what that costs.

    Args:
        model: of any mixer; embedding, vectors and state stay as they are.
        weights: one of `FORMATS`.

    Raises:
        ValueError: for a format that does not exist.
    """
    check_weights(weights)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(rounded(module.weight, weights))
            elif isinstance(module, LowRank):
                for matrix in (module.down, module.up):
                    matrix.copy_(rounded(matrix.T, module.step_weights(weights)).T)
    return model


def _describe(model: LanguageModel, weights: str, like: ModelState) -> Program:
    """The program of one token, up to the logits."""
    program = Program(weights, model.config.d_model)
    slots: ModelState = map_tensors(_counted(), like)
    x = program.vector(model.config.d_model)
    if isinstance(model.embedding_norm, nn.Identity):
        program.embed(model.embedding.weight, x)
    else:
        row = program.vector(model.config.d_model, own=True)
        program.embed(model.embedding.weight, row)
        _normalize(program, model.embedding_norm, row, x)
    for block, slot in zip(model.blocks, slots, strict=True):
        assert isinstance(block, Block)
        with program.reuse():
            program.barrier()
            normed = _normalize(program, block.time_norm, x)
            block.time_mix.describe_step(program, normed, slot.time, x)
            if block.channel_mix is not None:
                program.barrier()
                normed = _normalize(program, block.channel_norm, x)
                block.channel_mix.describe_step(program, normed, slot.channel, x)
    program.barrier()
    program.multiply(model.head.weight, _normalize(program, model.norm, x), out=LOGITS)
    return program


def _normalize(program: Program, norm: nn.Module, x: Vector, out: Vector | None = None) -> Vector:
    assert isinstance(norm, Norm)
    return program.normalize(x, norm.weight, norm.bias, norm.eps, out)


def _counted() -> Callable[[Tensor], Any]:
    """Puts numbers in the place of tensors: 0, 1 and so on."""
    count = itertools.count()
    return lambda _: next(count)


def _is_described(layer: Layer) -> bool:
    """Whether the description belongs to the `forward` that the layer has."""
    for kind in type(layer).__mro__:
        if "describe_step" in vars(kind):
            return kind is not Layer
        if "forward" in vars(kind):
            return False
    raise AssertionError("Layer has both")


def _copied(state: ModelState) -> ModelState:
    copied: ModelState = map_tensors(
        lambda x: x.detach().clone(memory_format=torch.contiguous_format), state
    )
    return copied


class _Part(NamedTuple):
    """A parameter or module of a model, and where it was when it was packed."""

    owner: dict[str, Any]
    name: str
    part: Any
    version: tuple[int, int]

    def is_current(self) -> bool:
        return self.owner.get(self.name) is self.part and _version(self.part) == self.version


def _version(part: Any) -> tuple[int, int]:
    """What changes with a tensor's values."""
    return (part._version, part.data_ptr()) if isinstance(part, Tensor) else (0, 0)


def _parts(model: nn.Module) -> Iterator[_Part]:
    for module in model.modules():
        for owner in (module._parameters, module._modules):
            for name, part in owner.items():
                yield _Part(owner, name, part, _version(part))
