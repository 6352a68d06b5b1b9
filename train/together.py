"""Several processes that work together: who tells and writes, and how they agree and end.

The launcher starts the same command several times; each process is a rank, and the first of them is
the one that people see.
"""

import contextlib
import gc
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from train import checkpoint as files
from train.interrupt import AlreadyTold, Interrupted

_Made = TypeVar("_Made")


class Together:
    """The processes of a run, seen from one of them; a single one is the plain case.

    Args:
        accelerator: which has found them.
        folder: of the run.
    """

    def __init__(self, accelerator: Accelerator, folder: Path) -> None:
        self.accelerator, self._folder = accelerator, folder
        self.count: int = accelerator.num_processes
        self.rank: int = accelerator.process_index
        self.is_main: bool = accelerator.is_main_process
        """Whether this one writes and tells."""
        self.device: torch.device = accelerator.device

    @contextmanager
    def told_once(self) -> Iterator[None]:
        """One process tells what all of them know; the others raise `AlreadyTold`.

        A process that is gone shows as an error of the communication in the others.
        """
        try:
            yield
        except Interrupted:
            if self.is_main:
                raise
            raise AlreadyTold(130) from None
        except (ValueError, OSError):
            if self.is_main:
                raise
            raise AlreadyTold(1) from None
        except RuntimeError as error:
            if self.count == 1 or not _is_of_communication(error):
                raise
            if not self._tells():
                raise AlreadyTold(1) from None
            folder = shlex.quote(str(self._folder))
            raise ValueError(
                f"A process of this run has ended, so all of them stop. Go on from the last "
                f"checkpoint, with any number of processes: ebb train --resume --out {folder}"
            ) from error

    def _tells(self) -> bool:
        """The first process tells; where it is the one that is gone, so is its lock."""
        if self.rank != 1:
            return self.is_main
        try:
            with files.locked(self._folder):
                return True
        except ValueError:
            return False

    def on_main(self, do: Callable[[], object]) -> None:
        """Does something in the first process; its failure is everybody's."""
        error: Exception | None = None
        if self.is_main:
            try:
                do()
            except (ValueError, OSError) as raised:
                error = raised
        self._agree(error)

    def in_turn(self, make: Callable[[], _Made]) -> _Made:
        """Makes something in the first process and then in the others, which find its caches."""
        made: list[_Made] = []
        for is_turn in (self.is_main, not self.is_main):
            error: Exception | None = None
            if is_turn:
                try:
                    made.append(make())
                except (ValueError, OSError) as raised:
                    error = raised
            self._agree(error)
        return made[0]

    def _agree(self, error: Exception | None) -> None:
        """Goes on where no process has an error.

        Raises:
            ValueError: in the first process, with the first one's error.
            AlreadyTold: in the others.
        """
        if self.count > 1:
            texts = [text for text in gather_object([error and str(error)]) if text is not None]
            if texts and not self.is_main:
                raise AlreadyTold(1)
            if texts and error is None:
                raise ValueError(texts[0])
        if error is not None:
            raise error

    @contextmanager
    def locked(self, folder: Path) -> Iterator[None]:
        """`checkpoint.locked` by the first process, for all."""
        with contextlib.ExitStack() as stack:
            self.on_main(lambda: stack.enter_context(files.locked(folder)))
            yield

    def mean(self, value: Tensor) -> float:
        """Of a number that every process has."""
        return float(self.accelerator.reduce(value.detach(), reduction="mean"))

    def any(self, asked: bool) -> bool:
        """Whether any process says so, so that all of them do the same."""
        if self.count == 1:
            return asked
        flag = torch.tensor(float(asked), device=self.device)
        return float(self.accelerator.reduce(flag, reduction="sum")) > 0

    def wait(self) -> None:
        """Until all processes are here."""
        self.accelerator.wait_for_everyone()


def leave_group() -> None:
    """Ends the group of processes where an error has left it open, once nothing of the run is left.

    The group has threads, and one that still runs when the interpreter ends aborts the process. It
    is the last to go, for the reason in `Ranks.close`.
    """
    if dist.is_available() and dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def _is_of_communication(error: RuntimeError) -> bool:
    """Whether the others cannot be reached, as PyTorch's backends put it."""
    words = ("gloo", "nccl", "connection", "broken pipe", "process group")
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in words)
