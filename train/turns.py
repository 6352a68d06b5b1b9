"""Training several runs in turn, so that a machine that is busy for a while slows all alike.

A run whose turn is over is saved, and goes on in its next turn exactly as if there had been no
pause: the order of the turns, and how many there are, change no number. One that diverges is a
result like any other.
"""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from train import checkpoint as files
from train.config import TrainConfig
from train.live import RunTable
from train.loop import TrainResult, train_until
from train.progress import Display
from train.run_folder import Diverged
from train.snapshot import newest_before

TURN_SECONDS = 15.0
"""A turn lasts about as long; shorter ones would spend their time in building models."""
MOST_TURNS = 10
"""As often as a run is validated."""


@dataclass(frozen=True)
class Divergence:
    """How a run ended that came to nothing."""

    folder: Path
    step: int
    reason: str


Outcome = TrainResult | Divergence


def turns_of(seconds: float) -> int:
    """Into how many turns a run is cut that takes so long."""
    return max(1, min(MOST_TURNS, int(seconds / TURN_SECONDS)))


def train_in_turns(
    runs: Mapping[str, TrainConfig], turns: int, display: Display
) -> dict[str, Outcome]:
    """Trains runs to their ends; what an earlier process has done of them is not done again.

    Args:
        runs: by a name for people; each goes on with what is in its folder.
        turns: of each run, of equal length.
        display: for progress.

    Raises:
        ValueError: for settings, data or a folder that cannot be used.
        Interrupted: after Ctrl-C, when everything is saved.
    """
    table = RunTable({name: (run.folder, run.steps) for name, run in runs.items()})
    with display.table(table):
        return _all_turns(runs, turns, display, table)


def _all_turns(
    runs: Mapping[str, TrainConfig], turns: int, display: Display, table: RunTable
) -> dict[str, Outcome]:
    found: dict[str, Outcome] = {}
    begun = set[str]()
    for turn, (name, run) in itertools.product(range(1, turns + 1), runs.items()):
        until = run.steps * turn // turns
        if name in found or (turn < turns and _steps_done(run.folder) >= until):
            continue
        with display.named(name):
            outcome = _until(run, until, display, announce=name not in begun)
            if not display.is_live:
                display.say(table.line(name))
        begun.add(name)
        if outcome is not None:
            found[name] = outcome
    return {name: found[name] for name in runs}


def _until(run: TrainConfig, step: int, display: Display, *, announce: bool) -> Outcome | None:
    """How the run ended; None if it has not come to its end."""
    record = run.folder / files.DIVERGED
    if record.exists():
        return Divergence(run.folder, **json.loads(record.read_text(encoding="utf-8")))
    try:
        return train_until(run, step, display, announce=announce)
    except Diverged as end:
        display.say(f"diverged: {end.reason}")
        files.save_json(record, {"step": end.step, "reason": end.reason})
        return Divergence(run.folder, end.step, end.reason)


def _steps_done(folder: Path) -> int:
    """Of the newest whole snapshot of a run."""
    return newest_before(folder, 10**9 - 1) or 0
