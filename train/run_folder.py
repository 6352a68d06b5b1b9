"""What a run keeps in its folder while it trains, and how it ends early."""

import dataclasses
import shlex
from collections.abc import Callable
from typing import Any

from torch import Tensor

from model.config import ModelConfig
from train import checkpoint as files
from train.config import TrainConfig
from train.machine import MACHINE, Machine
from train.prepare import PreparedData
from train.resume import Progress
from train.snapshot import (
    Snapshot,
    generator_states,
    newest_before,
    restore,
    save_snapshot,
    set_generator_states,
)


class Diverged(ValueError):  # noqa: N818  # what a run came to, beside being an error
    """A run has come to nothing; the message says what to do.

    Args:
        step: where it stopped.
        reason: in a few words.
        advice: the rest of the message.
    """

    def __init__(self, step: int, reason: str, advice: str) -> None:
        super().__init__(f"{reason}; {advice}")
        self.step, self.reason = step, reason


class RunFolder:
    """The folder of one run, as the process that trains it writes it.

    Args:
        config: of the run.
        progress: of the run, which goes into every snapshot.
    """

    def __init__(self, config: TrainConfig, progress: Progress) -> None:
        self._config, self._progress, self._folder = config, progress, config.folder
        self._saved_step: int | None = None

    def write_settings(self, model: ModelConfig, data: PreparedData, machine: Machine) -> None:
        """All that it takes to build the run again.

        Raises:
            ValueError: if it cannot be written.
        """
        files.save_json(
            self._folder / files.CONFIG,
            {
                "model": model.to_dict(),
                "train": self._config.to_dict(),
                "data": {"name": data.name, "fingerprint": data.fingerprint},
                MACHINE: machine.to_dict(),
            },
        )
        files.write_atomically(self._folder / files.TOKENIZER, data.tokenizer.save)

    def go_on_from(self, snapshot: Snapshot) -> None:
        """Puts random numbers and the run's files back to where the snapshot was taken.

        Raises:
            ValueError: if a file cannot be written.
        """
        set_generator_states(snapshot.extra)
        names = [files.METRICS, files.BEST]
        if self._progress.good_step == snapshot.step:
            names.append(files.WEIGHTS)
        restore(self._folder, snapshot.step, names)
        self._saved_step = snapshot.step

    def save(
        self,
        weights: dict[str, Tensor],
        optimizer: dict[str, Any],
        carried: dict[str, Tensor],
        *,
        is_good: bool,
    ) -> None:
        """A snapshot to resume from and, if the weights are good, these for `ebb generate`.

        `carried` is what goes on from step to step beside them.

        After a step that was skipped it is the weights that may be to blame: they take the place
        of no good ones.

        Raises:
            ValueError: if it cannot be written; what was saved before stays.
        """
        progress = self._progress
        if is_good:
            progress.good_step = progress.step
        if self._saved_step != progress.step:
            save_snapshot(
                self._folder,
                Snapshot(
                    progress.step,
                    weights,
                    optimizer,
                    dataclasses.asdict(progress),
                    {**generator_states(), **carried},
                ),
                self._config.keep if is_good else self._config.keep + 1,
            )
        self._saved_step = progress.step
        if is_good:
            files.save_weights(self._folder / files.WEIGHTS, weights)

    def save_best(self, weights: dict[str, Tensor]) -> None:
        """Those with the lowest validation loss so far.

        Raises:
            ValueError: if it cannot be written.
        """
        files.save_weights(self._folder / files.BEST, weights)

    def how_to_go_on(self) -> str:
        """The command; where nothing has been saved it starts afresh, with the same settings."""
        return f"go on with: ebb train --resume --out {shlex.quote(str(self._folder))}"

    def look_at_skipped(self, loss: float, norm: float, say: Callable[[str], None]) -> None:
        """Says that a step was skipped, if it is the first in a row.

        Raises:
            Diverged: if there are too many in a row.
        """
        progress, most = self._progress, self._config.max_skipped
        if progress.skipped_in_a_row == 1:
            say(
                f"step {progress.step:,}: loss {loss:.4g} and norm of the gradient {norm:.4g} are "
                f"not both finite; skipped ({progress.skipped:,} so far)"
            )
        if progress.skipped_in_a_row >= most:
            raise self.diverged(
                f"Loss or gradient were not finite in {most:,} steps in a row, up to step "
                f"{progress.step:,}, and not applied"
            )

    def diverged(self, what: str) -> Diverged:
        """The error that ends a run which has come to nothing; the last good weights are kept."""
        progress, kept = self._progress, "nothing had been saved yet"
        if progress.good_step == progress.step - progress.skipped_in_a_row:
            # Saved after the last step that was applied: the very weights that give nothing finite.
            before = newest_before(self._folder, progress.good_step)
            if before is not None:
                restore(self._folder, before, [files.WEIGHTS])
                progress.good_step = before
        if progress.good_step is not None:
            kept = f"the weights of step {progress.good_step:,} are kept"
        return Diverged(
            progress.step,
            what,
            f"{kept}. Start afresh with a lower --learning-rate, a longer --warmup or a smaller "
            "--clip.",
        )
