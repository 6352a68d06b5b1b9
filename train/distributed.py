"""One run in several processes: who does what, who writes, and how they end together.

The launcher (`torchrun`, `accelerate launch`) starts the same command several times; each process
is a rank. Data parallel by PyTorch's DDP through accelerate, or sharded by its `fully_shard`. The
batch of the settings is that of all ranks together, so a run is the same run on any number of them.
"""

import contextlib
import shlex
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, gather_object
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from data.loader import Batch
from model.language_model import LanguageModel
from train import checkpoint as files
from train.config import TrainConfig
from train.context_parallel import check_constant, pass_states
from train.evaluate import Evaluation, evaluate
from train.interrupt import AlreadyTold, Interrupted
from train.step import Trainee, checkpoint_blocks, rounds, share
from train.trackers import check_trackers, usable_trackers

LAUNCHER_ECHO = 5.0
"""Seconds within which a launcher passes on an interrupt that the terminal has sent to all."""

_Made = TypeVar("_Made")


class Ranks:
    """The processes of a run, seen from one of them; a single one is the plain case.

    Args:
        config: of the run.

    Raises:
        ValueError: if batch or context cannot be divided among them, or a setting has no effect.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),  # Apple's GPUs have no float64
            mixed_precision="no",  # --precision alone decides, not the launcher
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=config.accumulate, sync_with_dataloader=False
            ),
            log_with=usable_trackers(config.track) or None,
            project_dir=config.folder,
        )
        self.count: int = self.accelerator.num_processes
        self.rank: int = self.accelerator.process_index
        self.is_main: bool = self.accelerator.is_main_process
        """Whether this one writes and tells."""
        self.device = self.accelerator.device
        if config.threads is not None:  # accelerate has chosen some
            torch.set_num_threads(config.threads)

    def check(self) -> None:
        """Refuses what cannot be divided, and what has no effect.

        Raises:
            ValueError: naming the setting.
        """
        config, stretches = self.config, self.config.context_parallel
        check_trackers(config.track)
        if config.shard and self.count == 1:
            raise ValueError(
                "shard divides the model among processes, but there is one: leave it out, or start "
                "with torchrun or accelerate launch"
            )
        if self.count % stretches:
            raise ValueError(
                f"context-parallel {stretches} needs a multiple of {stretches} processes, but "
                f"there are {self.count}: start with torchrun or accelerate launch"
            )
        if config.context % stretches:
            raise ValueError(
                f"context {config.context} cannot be divided into {stretches} stretches: choose a "
                "multiple"
            )
        parts = self.groups * config.accumulate
        if config.batch_size % parts:
            raise ValueError(
                f"batch-size {config.batch_size} is that of all processes together and cannot be "
                f"divided into {parts} parts ({self.groups} processes x accumulate "
                f"{config.accumulate}): choose a multiple"
            )

    @property
    def groups(self) -> int:
        """Groups of processes with sequences of their own."""
        return self.count // self.config.context_parallel

    @property
    def group(self) -> int:
        """Which of them this process belongs to."""
        return self.rank // self.config.context_parallel

    @property
    def stretch(self) -> int:
        """Which part of every sequence of its group it reads."""
        return self.rank % self.config.context_parallel

    # Together ------------------------------------------------------------------------------------

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
            folder = shlex.quote(str(self.config.folder))
            raise ValueError(
                f"A process of this run has ended, so all of them stop. Go on from the last "
                f"checkpoint, with any number of processes: ebb train --resume --out {folder}"
            ) from error

    def _tells(self) -> bool:
        """The first process tells; where it is the one that is gone, so is its lock."""
        if self.rank != 1:
            return self.is_main
        try:
            with files.locked(self.config.folder):
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

    # Training ------------------------------------------------------------------------------------

    def prepare(self, model: LanguageModel) -> None:
        """Brings the model to its device and among the processes; the optimiser comes after.

        Raises:
            ValueError: for a state that cannot be passed on.
        """
        model.to(self.device)
        trainee = Trainee(model, with_state=self.count > 1)
        if self.config.checkpoint_activations:
            checkpoint_blocks(model)
        if (stretches := self.config.context_parallel) > 1:
            check_constant(model.initial_state(1), self.config.mixer)
            pass_states(
                model,
                source=self.rank - 1 if self.stretch > 0 else None,
                target=self.rank + 1 if self.stretch < stretches - 1 else None,
            )
        self.trainee: torch.nn.Module = trainee
        if self.config.shard:
            # The carried state is such a view, and nothing ever writes to a state.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
            mesh = init_device_mesh(self.device.type, (self.count,))
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(trainee, mesh=mesh)
        else:
            self.trainee = self.accelerator.prepare(trainee)

    def forward_backward(self, batch: Batch, *, bf16: bool) -> float:
        """The mean loss of a batch of all processes; its gradient is in the parameters."""
        total = torch.zeros((), device=self.device)
        for part in range(self.config.accumulate):
            mine = self._share(batch, part * self.groups + self.group, self.config.accumulate)
            with self.accelerator.accumulate(self.trainee):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                    loss = self.trainee(*mine)
                self.accelerator.backward(loss)
            total = total + loss.detach()
        return self.mean(total / self.config.accumulate)

    def _share(self, batch: Batch, part: int, parts: int) -> Batch:
        """This process's stretch of one part of a batch, on its device."""
        return share(
            batch,
            rows=(part, self.groups * parts),
            stretch=(self.stretch, self.config.context_parallel),
            device=self.device,
        )

    @torch.no_grad()
    def evaluate(
        self, model: LanguageModel, batches: Iterable[Batch], token_bytes: npt.NDArray[np.int32]
    ) -> Evaluation:
        """As `train.evaluate.evaluate`, each group of processes with batches of its own."""
        if self.count == 1:
            return evaluate(model, batches, token_bytes)
        sizes = torch.from_numpy(token_bytes).to(self.device)
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for batch, counts in rounds(batches, self.group, self.groups):
            mine = share(
                batch,
                rows=(0, 1),
                stretch=(self.stretch, self.config.context_parallel),
                device=self.device,
            )
            loss = self.trainee(*mine)  # by all processes, as it is a joint work of them
            if counts:
                tokens = mine.targets.numel()
                found = [float(loss) * tokens, tokens, int(sizes[mine.targets].sum())]
                sums += torch.tensor(found, dtype=torch.float64, device=self.device)
        nats, tokens, num_bytes = self.accelerator.reduce(sums, reduction="sum").tolist()
        return Evaluation(nats, int(tokens), int(num_bytes))

    def clip(self, parameters: Iterable[Tensor], norm: float) -> float:
        """Scales the gradient down to a norm; returns what it was."""
        found = self.accelerator.clip_grad_norm_(parameters, norm)
        return float(found.full_tensor() if isinstance(found, DTensor) else found)

    # Checkpoints ---------------------------------------------------------------------------------

    def whole(self, value: Any) -> Any:
        """The same structure with every tensor in one piece; a joint work of all processes."""
        if isinstance(value, DTensor):
            return value.full_tensor()
        if isinstance(value, dict):
            return {key: self.whole(part) for key, part in value.items()}
        return value

    def divided(self, saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """An optimiser's whole state, with every tensor divided as its parameter is."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]

        def divide(value: Any, parameter: Tensor) -> Any:
            if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
                return value
            return distribute_tensor(
                value.to(parameter.device), parameter.device_mesh, parameter.placements
            )

        state = {
            index: {name: divide(value, parameters[index]) for name, value in entry.items()}
            for index, entry in saved["state"].items()
        }
        return {**saved, "state": state}

    def plain(self, model: LanguageModel) -> LanguageModel | None:
        """A model that works in the first process alone; None in the others."""
        if self.count == 1:
            return model
        weights = self.whole(model.state_dict())
        if not self.is_main:
            return None
        with torch.device("meta"):
            alone = LanguageModel(model.config)
        alone.to_empty(device=self.device).load_state_dict(weights)
        return alone

    def wait(self) -> None:
        """Until all processes are here."""
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """After the last joint work; what was prepared is gone."""
        # First of all DDP, then the group: were DDP's the last reference to it, the group's end
        # would wait for threads of its own that wait for Python's lock, which DDP's end holds.
        del self.trainee
        self.accelerator.free_memory()
        self.accelerator.end_training()


def _is_of_communication(error: RuntimeError) -> bool:
    """Whether the others cannot be reached, as PyTorch's backends put it."""
    words = ("gloo", "nccl", "connection", "broken pipe", "process group")
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in words)
