"""What every layer is, and what a forward pass hands to it."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from model.config import ModelConfig


@dataclass
class Context:
    """One object a forward pass, beside input and state."""

    form: str
    """`parallel`, `chunked` or `recurrent`: which form of the recurrence to run."""
    reset: Tensor | None = None
    """`[B, T]` bool, True where a token starts a document."""
    v_first: Tensor | None = None
    """`[B, T, D]`, set by the first layer: the values that RWKV-7's other layers lean towards."""


class Layer(nn.Module):
    """A time mixer or a channel mixer: `(x, state, context) -> (y, state)`, x and y `[B, T, D]`."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        """Builds layer number `layer`, counted from 0, of a network of that shape."""
        super().__init__()

    def initial_state(self, batch_size: int) -> Any:
        """A NamedTuple of tensors `[B, ...]`: the state before the first token."""
        raise NotImplementedError

    def forward(self, x: Tensor, state: Any, context: Context) -> tuple[Tensor, Any]:
        """Mixes x and returns it with the state after its last token; changes neither argument."""
        raise NotImplementedError
