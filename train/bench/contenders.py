"""What is measured: a model in one way, described by plain values so that any process can make it.

A description is a `Contender`; `Workshop.build` makes it a `Running`, which knows how to train,
read a prompt and decode.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model import state as states
from model.config import SIZES, ModelConfig, Size
from model.decode import Decoder, Engine, why_not
from model.generation import prefill
from model.language_model import LanguageModel
from model.layers import MIXERS
from model.ops.native.packing import FORMATS
from model.presets import preset
from train.benchmark import Begin, stepper, training_step
from train.matching import matched, num_parameters


@dataclass(frozen=True)
class Contender:
    """A model, in a format, in a library."""

    shape: ModelConfig
    """Of our own model; another library's is built after it."""
    weights: str = "fp32"
    library: str = "ebb"
    """Or `transformers`, or `rwkv`."""
    mixer: str = ""
    """As the command line names it."""

    @property
    def name(self) -> str:
        """For tables: `rwkv7`, `mamba2 (transformers)`."""
        name = "llama" if self.library != "ebb" and self.mixer == "attention" else self.mixer
        return name if self.library == "ebb" else f"{name} ({self.library})"


class Running(ABC):
    """A model that can be measured.

    Attributes:
        parameters: all of them.
        multiplied: those that every token is multiplied with: all but the embedding.
        head: those among them that belong to the head.
    """

    parameters: int
    multiplied: int
    head: int

    @abstractmethod
    def training(self, context: int, batch_size: int, *, bf16: bool) -> Callable[[], object]:
        """A step, with its products in bfloat16 or not."""

    @abstractmethod
    def prefilling(self, context: int) -> Callable[[], object]:
        """Reads a prompt of one text, up to the logits of the token after it."""

    @abstractmethod
    def decoding(self, context: int) -> tuple[Begin, int]:
        """Reads token by token after so many; and the bytes that each has to read.

        These are the weights, less the embedding, and the state.
        """


class Own(Running):
    """A model of this package."""

    def __init__(self, model: LanguageModel, weights: str) -> None:
        self._model, self._weights = model, weights
        self._engine: Engine | None = None
        self.parameters = model.num_parameters()
        self.multiplied = self.parameters - model.embedding.weight.numel()
        self.head = model.head.weight.numel()

    def training(self, context: int, batch_size: int, *, bf16: bool) -> Callable[[], object]:
        """A step as in `ebb train`."""
        return training_step(self._model, context, batch_size, bf16=bf16)

    def prefilling(self, context: int) -> Callable[[], object]:
        """Reads random tokens."""
        tokens = torch.randint(self._model.config.vocab_size, (1, context))
        return lambda: prefill(self._model, tokens)

    def decoding(self, context: int) -> tuple[Begin, int]:
        """Through the native step where there is one."""
        tokens = torch.randint(self._model.config.vocab_size, (1, context))
        _, state = prefill(self._model, tokens)
        num_bytes = states.num_bytes(state)
        if self._weights == "fp32" and why_not(self._model):
            return stepper(self._model, state), 4 * self.multiplied + num_bytes
        if self._engine is None:
            self._engine = Engine(self._model, self._weights)
        engine = self._engine

        def begin() -> Callable[[Tensor], object]:
            decoder = Decoder(engine, state)
            return lambda token: decoder.step(int(token))

        return begin, engine.num_bytes + num_bytes


class Workshop:
    """Builds what is described; models of one shape share their weights."""

    def __init__(self) -> None:
        self._models: dict[ModelConfig, LanguageModel] = {}

    def build(self, contender: Contender) -> Running:
        """The model, with random weights.

        Raises:
            ValueError: if it cannot be had, saying why.
        """
        if contender.library != "ebb":
            from train.bench import peers  # other libraries take seconds to load

            return peers.build(contender, self.model)
        return Own(self.model(contender.shape), contender.weights)

    def model(self, shape: ModelConfig) -> LanguageModel:
        """Of our own."""
        if shape not in self._models:
            torch.manual_seed(0)
            self._models[shape] = LanguageModel(shape)
        return self._models[shape]


def shape_of(mixer: str, size: Size, vocab_size: int) -> ModelConfig:
    """A mixer's network of that size, with its own width of the channel mix.

    Raises:
        ValueError: if the mixer cannot have it.
    """
    config = preset("micro", mixer, vocab_size)
    blocks = config.num_layers // SIZES["micro"].num_layers
    changes: dict[str, Any] = dataclasses.asdict(size)
    changes["num_layers"] *= blocks
    config = dataclasses.replace(config, **changes)
    MIXERS[config.mixer].time_mix.check(config)
    return config


def matched_shapes(mixers: list[str], size: Size, vocab_size: int) -> list[ModelConfig]:
    """One for each mixer, all with the first one's number of parameters, within 1 %.

    Raises:
        ValueError: for a mixer that cannot have the size, or so few parameters.
    """
    first, *rest = (shape_of(mixer, size, vocab_size) for mixer in mixers)
    parameters = num_parameters(first)
    return [first, *(shape if shape == first else matched(shape, parameters) for shape in rest)]


def formats_of(shape: ModelConfig) -> list[str]:
    """The formats that a model of this shape decodes in."""
    small = dataclasses.replace(shape, num_layers=1, vocab_size=2)
    return ["fp32"] if why_not(LanguageModel(small)) else list(FORMATS)


def count(module: nn.Module) -> int:
    """Its parameters."""
    return sum(parameter.numel() for parameter in module.parameters())
