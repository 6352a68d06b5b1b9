"""One run in several processes, started by `torchrun` or `accelerate launch`: who computes what.

Data parallel by PyTorch's DDP through accelerate, or sharded by its `fully_shard`. The batch of the
settings is that of all ranks together, so a run is the same run on any number of them.
"""

import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from data.loader import Batch
from model.language_model import LanguageModel, shapes_only
from train.carry import Carry
from train.config import TrainConfig
from train.context_parallel import check_constant, pass_states
from train.evaluate import Evaluation, evaluate
from train.precision import both_passes
from train.step import Trainee, checkpoint_blocks, rounds, share
from train.together import Together
from train.trackers import check_trackers, usable_trackers

LAUNCHER_ECHO = 5.0
"""Seconds within which a launcher passes on an interrupt that the terminal has sent to all."""


class Ranks(Together):
    """The processes of a run, and what this one computes.

    Args:
        config: of the run.
    """

    def __init__(self, config: TrainConfig) -> None:
        accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),  # Apple's GPUs have no float64
            mixed_precision="no",  # --precision alone decides, not the launcher
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=config.accumulate, sync_with_dataloader=False
            ),
            log_with=usable_trackers(config.track) or None,
            project_dir=config.folder,
        )
        super().__init__(accelerator, config.folder)
        self.config = config

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
        if config.carry_state and stretches > 1:
            raise ValueError(
                "carry-state and context-parallel both hand the state on, to the next step and to "
                "the next process: leave one of them out"
            )
        if config.compile and (config.shard or stretches > 1 or config.checkpoint_activations):
            raise ValueError(
                "compile works without shard, context-parallel and checkpoint-activations, which "
                "change what a block is: leave it out"
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

    def forward_backward(self, batch: Batch, *, bf16: bool, carry: Carry | None) -> float:
        """The mean loss of a batch of all processes; its gradient is in the parameters."""
        total = torch.zeros((), device=self.device)
        for part in range(self.config.accumulate):
            mine = self.share(batch, part)
            with self.accelerator.accumulate(self.trainee):
                loss = both_passes(
                    partial(self.trainee, *mine, carry, part),
                    self.device,
                    bf16=bf16,
                    backward=self.accelerator.backward,
                )
            total = total + loss.detach()
        return self.mean(total / self.config.accumulate)

    def share(self, batch: Batch, part: int) -> Batch:
        """This process's stretch of one part of a batch, on its device."""
        return share(
            batch,
            rows=self._rows(part),
            stretch=(self.stretch, self.config.context_parallel),
            device=self.device,
        )

    def _rows(self, part: int) -> tuple[int, int]:
        """Which share of the rows this process reads of a part, and of how many."""
        return part * self.groups + self.group, self.groups * self.config.accumulate

    def carry(self, model: LanguageModel) -> Carry:
        """Nothing carried yet, of the rows that are this process's; before `prepare`."""

        def rows_of(tensor: Tensor, part: int) -> Tensor:
            place, count = self._rows(part)
            return tensor.chunk(count)[place]

        gather = self.accelerator.gather
        return Carry(model.initial_state(1), self.config.accumulate, rows_of, gather)

    @torch.no_grad()
    def evaluate(
        self, model: LanguageModel, batches: Iterable[Batch], token_bytes: npt.NDArray[np.int32]
    ) -> Evaluation:
        """As `train.evaluate.evaluate`, each group of processes with batches of its own."""
        if self.count == 1:
            return evaluate(model, batches, token_bytes)
        self.trainee.eval()
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
        self.trainee.train()
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
        alone = shapes_only(model.config)
        alone.to_empty(device=self.device).load_state_dict(weights)
        return alone

    def close(self) -> None:
        """After the last joint work; what was prepared is gone."""
        # First of all DDP, then the group: were DDP's the last reference to it, the group's end
        # would wait for threads of its own that wait for Python's lock, which DDP's end holds.
        del self.trainee
        self.accelerator.free_memory()
        self.accelerator.end_training()
