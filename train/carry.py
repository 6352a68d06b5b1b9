"""The state that `ebb train --carry-state` takes from each step to the next.

Every row of the batch reads a part of the text from its beginning to its end, a stretch a step. The
state goes on from stretch to stretch and its gradient does not: truncated back-propagation through
time (Williams and Peng, 1990).
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from model.language_model import LanguageModel
from model.presets import parse_mixer
from model.state import ModelState, clone, detach, map_tensors, tensors
from train.loss import loss_and_state

_PREFIX = "carried."


class Carry:
    """The state after the last step that counted; none before the first.

    Where the batch is cut into parts, or among processes, each part's rows have their own.

    Args:
        like: the model's initial state of any number of rows.
        parts: that this process reads of every batch, one after the other.
        share: of a tensor with all rows and a part's number, the rows of that part.
        gather: puts the same part's rows of all processes together; a joint work of them.
    """

    def __init__(
        self,
        like: ModelState,
        parts: int = 1,
        share: Callable[[Tensor, int], Tensor] = lambda tensor, _: tensor,
        gather: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        self._like, self._share, self._gather = like, share, gather
        self._states: list[ModelState | None] = [None] * parts
        self._next = list(self._states)

    def loss(
        self,
        model: LanguageModel,
        inputs: Tensor,
        targets: Tensor,
        reset: Tensor | None,
        *,
        part: int = 0,
        start: ModelState | None = None,
    ) -> Tensor:
        """`next_token_loss`, going on from the state carried so far, or else from `start`."""
        state = self._states[part]
        state = start if state is None else state
        loss, after = loss_and_state(model, inputs, targets, reset, state)
        # A copy: a view, such as the last token's input, would keep a whole activation alive.
        self._next[part] = clone(detach(after))
        return loss

    def keep(self) -> None:
        """Goes on from the state after the last loss; without this call, from the one before it."""
        self._states = list(self._next)

    def tensors(self) -> dict[str, Tensor]:
        """The state of all rows by name, for a snapshot; empty before the first step."""
        found: dict[str, list[Tensor]] = {}
        for state in self._states:
            for name, tensor in () if state is None else tensors(state):
                found.setdefault(_PREFIX + name, []).append(self._gather(tensor))
        return {name: torch.cat(parts) for name, parts in found.items()}

    def restore(self, saved: Mapping[str, Tensor], device: torch.device) -> None:
        """Goes on from what `tensors` gave; afresh where that was nothing."""
        found = [saved.get(_PREFIX + name) for name, _ in tensors(self._like)]
        whole = [tensor for tensor in found if tensor is not None]
        if len(whole) < len(found):
            return
        for part in range(len(self._states)):
            rows = [self._share(tensor, part).to(device) for tensor in whole]
            self._states[part] = _filled(self._like, rows)


def _filled(like: ModelState, values: list[Tensor]) -> ModelState:
    """A state of such a structure, with values in the order of `model.state.tensors`."""
    remaining = iter(values)
    found: ModelState = map_tensors(lambda _: next(remaining), like)
    return found


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
