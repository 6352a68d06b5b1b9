"""How far a run has come, and whether and from where it may go on in a folder."""

import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from train import checkpoint as files
from train import snapshot as snapshots
from train.config import FREE_ON_RESUME, TrainConfig
from train.evaluate import bits_per_byte
from train.progress import Display


@dataclass
class Progress:
    """What a run has reached, beside weights and optimiser; part of every snapshot."""

    step: int = 0
    """Steps done, those included whose gradient was not applied."""
    seconds: float = 0.0
    """Spent in training steps, without validation and saving."""
    best_loss: float | None = None
    speeds: list[float] = field(default_factory=list)
    """Tokens/s of each logged stretch."""
    good_step: int | None = None
    """Of the last weights that were saved after a step that was applied."""
    skipped: int = 0
    """Steps whose loss or gradient was not finite: it was not applied."""
    skipped_in_a_row: int = 0
    """Those since the last that was applied."""
    clipped: int = 0
    """Steps whose gradient was scaled down."""
    losses: list[float] = field(default_factory=list)
    """Of the steps since the last line of metrics that were applied, as are the next two."""
    num_bytes: int = 0
    """That the predicted tokens stand for."""
    norm: float = 0.0
    stretch_steps: int = 0
    """Since the last line of metrics, as is the next."""
    stretch_seconds: float = 0.0

    def add(self, loss: float, norm: float, clip: float, seconds: float, num_bytes: int) -> None:
        """Counts a step, and the UTF-8 bytes of the tokens that it predicted."""
        self.step += 1
        self.seconds += seconds
        self.stretch_steps += 1
        self.stretch_seconds += seconds
        if not is_applied(loss, norm):
            self.skipped += 1
            self.skipped_in_a_row += 1
            return
        self.skipped_in_a_row = 0
        self.clipped += norm > clip
        self.losses.append(loss)
        self.num_bytes += num_bytes
        self.norm = max(self.norm, norm)

    def end_stretch(self, tokens_per_step: int) -> dict[str, float]:
        """What to log of it; the next step begins another."""
        self.speeds.append(self.stretch_steps * tokens_per_step / self.stretch_seconds)
        values = {"tokens_per_second": self.speeds[-1]}
        if self.losses:
            bits = bits_per_byte(sum(self.losses) * tokens_per_step, self.num_bytes)
            values |= {
                "loss": statistics.fmean(self.losses),
                "bits_per_byte": bits,
                "gradient_norm": self.norm,
            }
        values |= {"clipped_steps": self.clipped, "skipped_steps": self.skipped}
        self.losses, self.num_bytes, self.norm = [], 0, 0.0
        self.stretch_steps, self.stretch_seconds = 0, 0.0
        return values


def is_applied(loss: float, norm: float) -> bool:
    """Whether a step with that loss and norm of its gradient changes the weights."""
    return math.isfinite(loss) and math.isfinite(norm)


def claim_folder(config: TrainConfig, display: Display) -> snapshots.Snapshot | None:
    """The snapshot to go on from, or None for a fresh start.

    Raises:
        ValueError: if the folder holds a run and it is not to be resumed, or was another run.
    """
    folder = config.folder
    if not files.holds_run(folder):
        return None
    if _is_imported(folder):
        raise ValueError(
            f"{folder} holds an imported checkpoint, which has no state of training to go on from: "
            "choose another --out."
        )
    if not config.resume:
        raise ValueError(
            f"{folder} already holds a run: add --resume to go on with it, or choose another --out."
        )
    snapshot = snapshots.load_snapshot(folder, lambda text: display.say(text, "yellow"))
    if snapshot is None and (folder / files.WEIGHTS).exists():
        raise ValueError(
            f"{folder} holds weights, but no whole checkpoint in {files.RESUME}/ to go on "
            "from, and a fresh start would overwrite them: choose another --out."
        )
    if snapshot is None:
        return None
    before, now = snapshots.read_run(folder)["train"], config.to_dict()
    changed = [
        name
        for name in now
        if name not in FREE_ON_RESUME and before.get(name, now[name]) != now[name]
    ]
    if changed:
        name = changed[0]
        raise ValueError(
            f"The run in {folder} was made with {name.replace('_', '-')} "
            f"{before[name]}, not {now[name]}: leave it as it was, or choose another --out."
        )
    return snapshot


def check_data(folder: Path, fingerprint: str) -> None:
    """Refuses to go on with a text that is no longer what it was.

    Raises:
        ValueError: if `fingerprint` is not that of the run's text.
    """
    data = snapshots.read_run(folder).get("data", {})
    if data.get("fingerprint", fingerprint) != fingerprint:
        raise ValueError(
            f"The text of the run in {folder} has changed since it began: put back the old one, or "
            "start afresh with another --out."
        )


def _is_imported(folder: Path) -> bool:
    """Whether the folder holds an official checkpoint, which has no training to go on with."""
    try:
        return files.IMPORTED in snapshots.read_run(folder)["train"]
    except ValueError:  # cut short before anything was saved
        return False
