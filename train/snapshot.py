"""Complete states of training: `resume/step-N/`, each of them whole or not there.

A snapshot needs nothing beside itself: it holds weights, optimiser and random numbers, how far the
run has come, and copies of what else stands in the folder of the run, which may be damaged when the
power fails. Checksums tell a whole snapshot from a damaged one; the newest whole one counts.
"""

import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.tokenizers import load_tokenizer
from train import checkpoint as files

CHECKSUMS = "checksums.json"
OPTIMIZER = "optimizer.safetensors"
EXTRA = "extra.safetensors"
TRAINING = "training.json"
COPIED = (files.CONFIG, files.TOKENIZER, files.METRICS, files.BEST)
"""Files of the run that every snapshot has a copy of, as they were then."""
GENERATOR = "generator"
"""In `extra`, with a device after a dot: the state of PyTorch's random numbers there."""


class Snapshot(NamedTuple):
    """A complete state of training."""

    step: int
    """Optimiser steps done."""
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    progress: dict[str, Any]
    """What the loop counts: losses since the last line of metrics, best loss so far, seconds."""
    extra: dict[str, Tensor] = {}  # noqa: RUF012  # never written to
    """What else has to be as it was: random numbers, and the state carried from step to step."""


def save_snapshot(folder: Path, snapshot: Snapshot, keep: int = 2) -> None:
    """Adds `resume/step-N/` to a run; of those up to this step all but the newest `keep` go.

    Later ones go too: they are damaged, since the run went on from before them.

    Raises:
        ValueError: if it cannot be written; the older ones stay.
    """
    resume = folder / files.RESUME
    final = _place(folder, snapshot.step)
    beside = resume / f".{final.name}.tmp"
    try:
        files.make_folder(resume)
        for unfinished in resume.glob(".step-*.tmp"):  # of a process that was killed
            shutil.rmtree(unfinished, ignore_errors=True)
        beside.mkdir()
        _write(folder, beside, snapshot)
        for file in beside.iterdir():
            files.readable(file)
            files.flush(file)
        files.flush(beside)
        if final.exists():  # moved aside: at no time is there neither the old one nor the new
            _move_aside(final)
        beside.rename(final)
        files.flush(resume)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise ValueError(files.cannot_write(final, error)) from error
    kept = [path for path in _places(folder) if path.name <= final.name][:keep]
    for old in _places(folder):
        if old not in kept:
            with suppress(OSError):
                _move_aside(old)  # at once, and not file by file
    for unfinished in resume.glob(".step-*.tmp"):
        shutil.rmtree(unfinished, ignore_errors=True)


def load_snapshot(folder: Path, warn: Callable[[str], None]) -> Snapshot | None:
    """The newest complete state of training in a run, or None; damaged ones are named to `warn`."""
    for path in _places(folder):
        try:
            check_snapshot(path)
            contents = json.loads((path / TRAINING).read_text(encoding="utf-8"))
            return Snapshot(
                contents["step"],
                load_file(path / files.WEIGHTS),
                _unflatten(load_file(path / OPTIMIZER), contents["optimizer"]),
                contents["progress"],
                load_file(path / EXTRA),
            )
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            warn(f"{path} is damaged ({error}): looking for the checkpoint before it.")
    return None


def check_snapshot(path: Path) -> None:
    """Refuses a snapshot whose files are not as they were written.

    Raises:
        ValueError: naming the file.
        OSError: if one cannot be read.
    """
    sums = json.loads((path / CHECKSUMS).read_text(encoding="utf-8"))
    for name, checksum in dict(sums).items():
        if _checksum(path / name) != checksum:
            raise ValueError(f"{name} is not as it was written")


def newest_before(folder: Path, step: int) -> int | None:
    """The step of the newest whole snapshot before a step, or None."""
    for path in _places(folder):
        if path.name < _place(folder, step).name:
            try:
                check_snapshot(path)
            except (OSError, ValueError):
                continue
            return int(path.name.removeprefix("step-"))
    return None


def restore(folder: Path, step: int, names: Iterable[str]) -> None:
    """Puts files of a run back as they were at a snapshot, where they are not.

    Raises:
        ValueError: if they cannot be written.
    """
    for name in names:
        saved, place = _place(folder, step) / name, folder / name
        if saved.exists() and not _are_equal(saved, place):
            files.write_atomically(place, functools.partial(_copy, saved))


def read_run(folder: Path) -> dict[str, Any]:
    """`config.json` of a run that may have been cut short by a loss of power.

    Raises:
        ValueError: if neither the run nor a snapshot of it has one that can be read.
    """
    try:
        return files.read_config(folder)
    except ValueError:
        for path in _places(folder):
            try:
                return files.read_config(path)
            except ValueError:
                continue
        raise


def whole_tokenizer(folder: Path, step: int) -> Path:
    """`tokenizer.json` of a run, or the copy in a snapshot of it if that one cannot be read."""
    own = folder / files.TOKENIZER
    try:
        load_tokenizer(str(own))
    except ValueError:
        return _place(folder, step) / files.TOKENIZER
    return own


def generator_states() -> dict[str, Tensor]:
    """The state of PyTorch's random numbers, which all that is drawn in training comes from."""
    states = {f"{GENERATOR}.cpu": torch.get_rng_state()}
    for index in range(torch.cuda.device_count()):
        states[f"{GENERATOR}.cuda:{index}"] = torch.cuda.get_rng_state(index)
    return states


def set_generator_states(states: Mapping[str, Tensor]) -> None:
    """Puts back what `generator_states` gave, for the devices that are here."""
    torch.set_rng_state(states[f"{GENERATOR}.cpu"])
    for index in range(torch.cuda.device_count()):
        if (state := states.get(f"{GENERATOR}.cuda:{index}")) is not None:
            torch.cuda.set_rng_state(state, index)


def _write(folder: Path, beside: Path, snapshot: Snapshot) -> None:
    """All files of a snapshot."""
    tensors, scalars = _flatten(snapshot.optimizer)
    contents = {"step": snapshot.step, "optimizer": scalars, "progress": snapshot.progress}
    save_file(files.contiguous(snapshot.weights), beside / files.WEIGHTS)
    save_file(files.contiguous(tensors), beside / OPTIMIZER)
    save_file(files.contiguous(snapshot.extra), beside / EXTRA)
    files.write_text(beside / TRAINING, json.dumps(contents))
    for name in COPIED:
        if (folder / name).exists():
            _copy(folder / name, beside / name)
    sums = {file.name: _checksum(file) for file in sorted(beside.iterdir())}
    files.write_text(beside / CHECKSUMS, json.dumps(sums, indent=2) + "\n")


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _are_equal(one: Path, two: Path) -> bool:
    if not two.exists() or one.stat().st_size != two.stat().st_size:
        return False
    return _checksum(one) == _checksum(two)


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def _move_aside(path: Path) -> None:
    """To a name that does not count and is removed by and by."""
    path.rename(path.with_name(f".{path.name}.old.tmp"))


def _place(folder: Path, step: int) -> Path:
    return folder / files.RESUME / f"step-{step:09d}"


def _places(folder: Path) -> list[Path]:
    """All snapshots, newest first."""
    return sorted((folder / files.RESUME).glob("step-*"), reverse=True)


def _flatten(optimizer: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of an optimiser's state by name, and the rest as JSON."""
    tensors = {
        f"{index}.{name}": value
        for index, entry in optimizer["state"].items()
        for name, value in entry.items()
    }
    assert all(isinstance(value, Tensor) for value in tensors.values())
    return tensors, {"param_groups": optimizer["param_groups"]}


def _unflatten(tensors: dict[str, Tensor], scalars: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": scalars["param_groups"]}
