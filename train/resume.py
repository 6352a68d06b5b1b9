"""How far a run has come, and whether and from where it may go on in a folder."""

from dataclasses import dataclass, field
from pathlib import Path

from train import checkpoint as files
from train.config import FREE_ON_RESUME, TrainConfig
from train.progress import Display


@dataclass
class Progress:
    """What a run has reached, beside weights and optimiser; part of every snapshot."""

    step: int = 0
    seconds: float = 0.0
    """Spent in training steps, without validation and saving."""
    best_loss: float | None = None
    speeds: list[float] = field(default_factory=list)
    """Tokens/s of each logged stretch."""
    losses: list[float] = field(default_factory=list)
    """Of the steps since the last line of metrics, as are the next three."""
    num_bytes: int = 0
    """That the predicted tokens stand for."""
    norm: float = 0.0
    stretch_seconds: float = 0.0

    def add(self, loss: float, norm: float, seconds: float, num_bytes: int) -> None:
        """Counts a step, and the UTF-8 bytes of the tokens that it predicted."""
        self.num_bytes += num_bytes
        self.step += 1
        self.seconds += seconds
        self.losses.append(loss)
        self.norm = max(self.norm, norm)
        self.stretch_seconds += seconds

    def end_stretch(self, tokens_per_step: int) -> None:
        """Keeps its speed; the next step begins another."""
        self.speeds.append(len(self.losses) * tokens_per_step / self.stretch_seconds)
        self.losses, self.norm, self.stretch_seconds, self.num_bytes = [], 0.0, 0.0, 0


def claim_folder(config: TrainConfig, display: Display) -> files.Snapshot | None:
    """The snapshot to go on from, or None for a fresh start.

    Raises:
        ValueError: if the folder holds a run and it is not to be resumed, or was another run.
    """
    folder = config.folder
    if not files.holds_run(folder):
        return None
    if files.is_imported(folder):
        raise ValueError(
            f"{folder} holds an imported checkpoint, which has no state of training to go on from: "
            "choose another --out."
        )
    if not config.resume:
        raise ValueError(
            f"{folder} already holds a run: add --resume to go on with it, or choose another --out."
        )
    snapshot = files.load_snapshot(folder, lambda text: display.say(text, "yellow"))
    if snapshot is None and (folder / files.WEIGHTS).exists():
        raise ValueError(
            f"{folder} holds weights, but no whole checkpoint in {files.RESUME}/ to go on "
            "from, and a fresh start would overwrite them: choose another --out."
        )
    if snapshot is None:
        return None
    before, now = files.read_config(folder)["train"], config.to_dict()
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
    data = files.read_config(folder).get("data", {})
    if data.get("fingerprint", fingerprint) != fingerprint:
        raise ValueError(
            f"The text of the run in {folder} has changed since it began: put back the old one, or "
            "start afresh with another --out."
        )
