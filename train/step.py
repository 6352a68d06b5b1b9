"""What one process computes in a training step: its share of a batch, and the loss of that."""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data.loader import Batch
from model.language_model import LanguageModel
from model.state import map_tensors
from train.carry import Carry
from train.loss import next_token_loss


class Trainee(nn.Module):
    """`next_token_loss` as the forward pass of a module, which is what DDP and FSDP wrap.

    Args:
        model: which learns.
        with_state: hand the initial state in instead of letting the model make it. Where weights
            are divided among processes, it could not tell its shapes outside of its blocks.
    """

    def __init__(self, model: LanguageModel, *, with_state: bool) -> None:
        super().__init__()
        self.model = model
        self._start = model.initial_state(1) if with_state else None

    def forward(
        self,
        inputs: Tensor,
        targets: Tensor,
        reset: Tensor | None,
        carry: Carry | None = None,
        part: int = 0,
    ) -> Tensor:
        """Mean loss of `[B, T]` tokens, going on from what is carried of a part of the batch."""
        state = None
        if self._start is not None:
            rows = inputs.shape[0]
            state = map_tensors(lambda x: x.repeat(rows, *(1,) * (x.dim() - 1)), self._start)
        if carry is not None:
            return carry.loss(self.model, inputs, targets, reset, part=part, start=state)
        return next_token_loss(self.model, inputs, targets, reset, state)


def checkpoint_blocks(model: LanguageModel) -> None:
    """Keeps a block's input instead of all in it, and computes the block again on the way back.

    Arithmetic for memory (Chen et al., arXiv 1604.06174): a third more of the one.
    """
    for block in model.blocks:
        # Inside the block's hooks, which gather its weights or pass states on: only once.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def share(
    batch: Batch, *, rows: tuple[int, int], stretch: tuple[int, int], device: torch.device
) -> Batch:
    """One part of a batch.

    Args:
        batch: all of it.
        rows: which part of the rows, and of how many.
        stretch: which part of every row, and of how many.
        device: where it is needed.
    """

    def cut(tensor: Tensor) -> Tensor:
        height, width = tensor.shape[0] // rows[1], tensor.shape[1] // stretch[1]
        part = tensor[rows[0] * height :, stretch[0] * width :][:height, :width]
        return part.contiguous().to(device)

    reset = None if batch.reset is None else cut(batch.reset)
    return Batch(cut(batch.inputs), cut(batch.targets), reset)


def rounds(batches: Iterable[Batch], group: int, groups: int) -> Iterator[tuple[Batch, bool]]:
    """Deals batches out to groups of processes, equally often to all of them.

    Yields:
        A batch for this group, and whether it counts: where the batches do not come out even, some
        groups read one that is another's.
    """
    remaining = iter(batches)
    while dealt := list(islice(remaining, groups)):
        yield dealt[min(group, len(dealt) - 1)], group < len(dealt)
