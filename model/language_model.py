"""One block and one language model for every mixer."""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from model.config import ModelConfig
from model.initialization import initialize
from model.layers import MIXERS
from model.layers.layer import Context, Layer
from model.ops import FORMS
from model.presets import complete
from model.state import BlockState, ModelState, NoState


class ModelOutput(NamedTuple):
    """What a forward pass returns."""

    logits: Tensor
    """`[B, T, vocab_size]`."""
    state: ModelState
    """To go on from after the last token."""


class Block(nn.Module):
    """`x += time_mix(norm x)`, then, where there is one, `x += channel_mix(norm x)`."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        mixer = MIXERS[config.mixer]
        self.time_norm = mixer.body.norm(config.d_model)
        self.time_mix = mixer.time_mix(config, layer)
        self.channel_mix: Layer | None = None
        self.dropout = 0.0
        if mixer.channel_mix is not None:
            self.channel_norm = mixer.body.norm(config.d_model)
            self.channel_mix = mixer.channel_mix(config, layer)

    def initial_state(self, batch_size: int) -> BlockState:
        """The state before the first token."""
        channel = self.channel_mix
        return BlockState(
            self.time_mix.initial_state(batch_size),
            NoState() if channel is None else channel.initial_state(batch_size),
        )

    def forward(self, x: Tensor, state: BlockState, context: Context) -> tuple[Tensor, BlockState]:
        """`[B, T, D]` -> `[B, T, D]`."""
        y, time = self.time_mix(self.time_norm(x), state.time, context)
        y = self._dropped(y)
        if self.channel_mix is None:
            return x + y, BlockState(time, state.channel)
        normed, x = self.channel_norm.of_sum(x, y)
        y, channel = self.channel_mix(normed, state.channel, context)
        return x + self._dropped(y), BlockState(time, channel)

    def _dropped(self, y: Tensor) -> Tensor:
        return F.dropout(y, self.dropout) if self.training and self.dropout else y


class LanguageModel(nn.Module):
    """Tokens in, logits of the next token out, with the state passed in and returned.

    Args:
        config: the shape.

    The weights are drawn from torch's global generator: `torch.manual_seed` repeats them.

    Raises:
        ValueError: for a mixer that does not exist, or a shape or options that it cannot have.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config = complete(config)
        body = MIXERS[config.mixer].body
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.embedding_norm = body.norm(config.d_model) if body.embedding_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = body.norm(config.d_model)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if not self.head.weight.is_meta:
            initialize(self)

    def initial_state(self, batch_size: int) -> ModelState:
        """The state before the first token."""
        return tuple(block.initial_state(batch_size) for block in self._blocks())

    def features(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        form: str = "chunked",
        reset: Tensor | None = None,
        observe: Callable[[str, dict[str, Any]], None] | None = None,
    ) -> tuple[Tensor, ModelState]:
        """As `forward`, up to the head: `[B, T, D]` instead of the logits, `head(features)`.

        `observe` is called with the name and all arguments of each layer's op, in order.
        """
        self._check(tokens, form)
        state = self.initial_state(tokens.shape[0]) if state is None else state
        context = Context(form=form, reset=reset, observe=observe)
        x = self.embedding_norm(self.embedding(tokens))
        states = []
        for block, old in zip(self._blocks(), state, strict=True):
            x, new = block(x, old, context)
            states.append(new)
        return self.norm(x), tuple(states)

    def forward(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        form: str = "chunked",
        reset: Tensor | None = None,
    ) -> ModelOutput:
        """Logits of the token after each token.

        All three forms give the same logits and the same state, and so does a sequence that is
        split anywhere when the state is passed on.

        Args:
            tokens: `[B, T]` int64, in `[0, vocab_size)`.
            state: from the call before; None to start afresh. It is not changed.
            form: `parallel` (work quadratic in T), `chunked` (linear) or `recurrent` (token by
                token; the definition).
            reset: `[B, T]` bool, True where a token starts a document: nothing before it counts.

        Raises:
            ValueError: for an unknown form, or tokens that are not `[B, T]` with T >= 1.
        """
        x, new_state = self.features(tokens, state, form, reset)
        return ModelOutput(self.head(x), new_state)

    def set_dropout(self, share: float) -> None:
        """In training mode, leaves out that share of what each layer adds, at random.

        The draws are of torch's global generator. Nothing else knows of it: it is no part of the
        shape, and a new model has none.
        """
        for block in self._blocks():
            block.dropout = share

    def num_parameters(self) -> int:
        """All of them, embedding and head included."""
        return sum(parameter.numel() for parameter in self.parameters())

    def fingerprint(self) -> str:
        """Twelve hex digits that change with any weight: says which model a state belongs to."""
        digest = hashlib.sha256(repr(self.config).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()[:12]

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    def _check(self, tokens: Tensor, form: str) -> None:
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, but is {form!r}")
        if tokens.dim() != 2 or tokens.shape[1] < 1:
            raise ValueError(f"tokens must be [B, T] with T >= 1, but are {[*tokens.shape]}")


def shapes_only(config: ModelConfig) -> LanguageModel:
    """A model on the meta device: its weights have shapes, but no memory and no values.

    Nothing is drawn, so that it takes no time either; `to_empty` and `load_state_dict` fill it.

    Raises:
        ValueError: as `LanguageModel`.
    """
    with torch.device("meta"), _NothingDrawn():
        return LanguageModel(config)


class _NothingDrawn(TorchFunctionMode):
    """Inside, PyTorch's own modules get no initial values.

    On the meta device a normal distribution would import the compiler, which takes a second.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(function, "__module__", None) == "torch.nn.init":
            return None
        return function(*args, **(kwargs or {}))
