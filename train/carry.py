"""The state that `ebb train --carry-state` takes from each step to the next.

Every row of the batch reads a part of the text from its beginning to its end, a stretch a step. The
state goes on from stretch to stretch and its gradient does not: truncated back-propagation through
time (Williams and Peng, 1990).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from model.language_model import LanguageModel
from model.presets import parse_mixer
from model.state import ModelState, clone, detach, map_tensors, tensors
from train.loss import loss_and_state

_PREFIX = "carried."


class Carry:
    """The state after the last step that counted; none before the first."""

    def __init__(self) -> None:
        self._state: ModelState | None = None
        self._next: ModelState | None = None

    def loss(
        self, model: LanguageModel, inputs: Tensor, targets: Tensor, reset: Tensor | None
    ) -> Tensor:
        """`next_token_loss`, going on from the state carried so far."""
        loss, after = loss_and_state(model, inputs, targets, reset, self._state)
        # A copy: a view, such as the last token's input, would keep a whole activation alive.
        self._next = clone(detach(after))
        return loss

    def keep(self) -> None:
        """Goes on from the state after the last loss; without this call, from the one before it."""
        self._state = self._next

    def tensors(self) -> dict[str, Tensor]:
        """The state by name, for a snapshot; empty before the first step."""
        found = () if self._state is None else tensors(self._state)
        return {_PREFIX + name: tensor for name, tensor in found}

    def restore(self, model: LanguageModel, batch_size: int, saved: Mapping[str, Tensor]) -> None:
        """Goes on from what `tensors` gave; afresh where that was nothing."""
        like = model.initial_state(batch_size)
        found = [saved.get(_PREFIX + name) for name, _ in tensors(like)]
        if any(tensor is None for tensor in found):
            return
        device, remaining = next(model.parameters()).device, iter(found)

        def take(_: Tensor) -> Tensor:
            value = next(remaining)
            assert value is not None
            return value.to(device)

        with torch.no_grad():
            self._state = map_tensors(take, like)


def check_can_carry(mixer: str) -> None:
    """Refuses a mixer whose state grows with every token.

    Raises:
        ValueError: naming it.
    """
    row, options = parse_mixer(mixer)
    if row == "attention" and getattr(options, "state", None) == "cache":
        raise ValueError(
            f"carry-state needs a state of constant size, but that of {mixer} keeps every token: "
            "choose a recurrent mixer, or leave carry-state out"
        )
