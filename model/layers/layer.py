"""What every layer is, and what a forward pass hands to it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from model.config import MixerOptions, ModelConfig
from model.layers.initializers import small_init_
from model.ops import OPS
from model.ops.native.instructions import Vector
from model.ops.native.program import Program


@dataclass
class Context:
    """One object a forward pass, beside input and state."""

    form: str
    """`parallel`, `chunked` or `recurrent`: which form of the recurrence to run."""
    reset: Tensor | None = None
    """`[B, T]` bool, True where a token starts a document."""
    v_first: Tensor | None = None
    """`[B, T, D]`, set by the first layer: the values that RWKV-7's other layers lean towards."""
    observe: Callable[[str, dict[str, Any]], None] | None = None
    """Called with the name of every op that runs, and its arguments by name; changes nothing."""

    def run(self, op: str, *args: Any, **kwargs: Any) -> Any:
        """An op of `model.ops.OPS` in this pass's form, with this pass's resets."""
        if self.observe is not None:
            names = ("q", "k", "v")[-len(args) :]  # wkv4 has no q
            named = dict(zip(names, args, strict=True))
            self.observe(op, {**named, **kwargs, "reset": self.reset})
        return OPS[op].form(self.form)(*args, reset=self.reset, **kwargs)


class Layer(nn.Module):
    """A time mixer or a channel mixer: `(x, state, context) -> (y, state)`, x and y `[B, T, D]`."""

    Options: ClassVar[type[MixerOptions]] = MixerOptions
    """What only this mixer can be told; `config.options` is one of these."""
    LEARNING_RATE_SCALES: ClassVar[dict[str, float]] = {}
    """Parameters whose learning rate is another than the rest's, and its factor."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        """Builds layer number `layer`, counted from 0, of a network of that shape."""
        super().__init__()

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        """Refuses a shape that this layer cannot have.

        Raises:
            ValueError: naming the setting.
        """

    @classmethod
    def width_step(cls, config: ModelConfig) -> int:
        """What `ffn_dim` must be a multiple of."""
        return 1

    def initial_state(self, batch_size: int) -> Any:
        """A NamedTuple of tensors `[B, ...]`: the state before the first token."""
        raise NotImplementedError

    def forward(self, x: Tensor, state: Any, context: Context) -> tuple[Tensor, Any]:
        """Mixes x and returns it with the state after its last token; changes neither argument."""
        raise NotImplementedError

    def describe_step(self, program: Program, x: Vector, state: Any, residual: Vector) -> None:
        """Describes one token of one text for the native step, if there is a description.

        Args:
            program: takes the instructions.
            x: the normed token, each thread's own.
            state: as `initial_state`, with the number of a tensor in the tensor's place.
            residual: whole; the layer adds its result, after a barrier at least.

        Raises:
            NotImplementedError: if this layer has none; it then runs in PyTorch.
        """
        raise NotImplementedError(f"{type(self).__name__} has no native step")

    def initialize(self, layer: int, num_layers: int) -> None:
        """Draws the weights of layer number `layer` of `num_layers`; gradients are off.

        Unless a layer has values of its own: matrices as `small_init_`; those into the residual
        stream (`output`, `down`) zero, so that a new block is the identity, as in RWKV and in Fixup
        (arXiv 1901.09321); the rest as it is.
        """
        for name, parameter in self.named_parameters():
            if name.endswith(".weight") and parameter.dim() == 2:
                into_residual = name in ("output.weight", "down.weight")
                nn.init.zeros_(parameter) if into_residual else small_init_(parameter)


def at_least_single(dtype: torch.dtype) -> torch.dtype:
    """That of a recurrent state: the parameters' own, but never less than float32."""
    return torch.promote_types(dtype, torch.float32)
