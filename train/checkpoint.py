"""The folder of a run: what is in it, how it is written whole or not at all, and how it is read.

Every file is written beside its place, flushed to the disk and renamed. `resume/step-N/` holds a
complete state of training; the newest that can be read is the one to go on from.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.tokenizers import Tokenizer, load_tokenizer
from model.config import ModelConfig
from model.language_model import LanguageModel
from model.presets import from_dict

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
WEIGHTS = "model.safetensors"
BEST = "best.safetensors"
METRICS = "metrics.jsonl"
RESUME = "resume"
IMPORTED = "imported"
"""In `train` of `config.json`: which official model the weights are, if they were not made here."""
HOW_TO_ADD_A_TOKENIZER = f"convert again with --tokenizer, or put a {TOKENIZER} into the folder"


class Checkpoint(NamedTuple):
    """A trained model with its tokenizer."""

    model: LanguageModel
    tokenizer: Tokenizer
    config: dict[str, Any]
    """`config.json`: `model` and `train`."""


class Snapshot(NamedTuple):
    """A complete state of training."""

    step: int
    """Optimiser steps done."""
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    progress: dict[str, Any]
    """What the loop wants back: best loss so far, seconds spent."""


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` on a name beside `path`, flushes to the disk and renames.

    Raises:
        ValueError: if the disk is full or the folder cannot be written; `path` is as it was.
    """
    beside = path.with_name(f".{path.name}.tmp")
    try:
        write(beside)
        _readable(beside)
        _flush(beside)
        beside.replace(path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        beside.unlink(missing_ok=True)
        raise ValueError(_cannot_write(path, error)) from error


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Weights as safetensors: no paths and no times, so that equal weights give equal bytes."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    write_atomically(path, lambda beside: save_file(tensors, beside))


def save_json(path: Path, value: Any) -> None:
    """One JSON value, readable."""
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    write_atomically(path, lambda beside: _write_text(beside, text))


def save_snapshot(folder: Path, snapshot: Snapshot, keep: int = 2) -> None:
    """Adds `resume/step-N/` to a run and removes all but the newest `keep`.

    Raises:
        ValueError: if it cannot be written; the older ones stay.
    """
    resume = folder / RESUME
    final = resume / f"step-{snapshot.step:09d}"
    beside = resume / f".{final.name}.tmp"
    try:
        for unfinished in resume.glob(".step-*.tmp"):  # of a process that was killed
            shutil.rmtree(unfinished, ignore_errors=True)
        beside.mkdir(parents=True)
        tensors, scalars = _flatten(snapshot.optimizer)
        contents = {"step": snapshot.step, "optimizer": scalars, "progress": snapshot.progress}
        save_file(_contiguous(snapshot.weights), beside / WEIGHTS)
        save_file(_contiguous(tensors), beside / "optimizer.safetensors")
        _write_text(beside / "training.json", json.dumps(contents))
        for file in beside.iterdir():
            _readable(file)
            _flush(file)
        if final.exists():  # moved aside: at no time is there neither the old one nor the new
            final.rename(beside.with_suffix(".old.tmp"))
        beside.rename(final)
        _flush(resume)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise ValueError(_cannot_write(final, error)) from error
    for old in [*_snapshots(folder)[keep:], *resume.glob(".step-*.tmp")]:
        shutil.rmtree(old, ignore_errors=True)


def load_snapshot(folder: Path, warn: Callable[[str], None]) -> Snapshot | None:
    """The newest complete state of training in a run, or None; damaged ones are named to `warn`."""
    for path in _snapshots(folder):
        try:
            contents = json.loads((path / "training.json").read_text(encoding="utf-8"))
            weights = load_file(path / WEIGHTS)
            optimizer = _unflatten(load_file(path / "optimizer.safetensors"), contents["optimizer"])
            return Snapshot(contents["step"], weights, optimizer, contents["progress"])
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            warn(f"{path} is damaged ({error}): looking for the checkpoint before it.")
    return None


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a run.

    Raises:
        ValueError: if there is none, or it is not ours.
    """
    if not folder.exists():
        raise ValueError(
            f"There is no {folder}: name the folder of a run, such as checkpoints/NAME."
        )
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a checkpoint: it holds no {CONFIG}. `ebb train` makes one."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    if not isinstance(config, dict) or not all(
        isinstance(config.get(part), dict) for part in ("model", "train")
    ):
        raise ValueError(f"{path} does not describe a run of ebb: it lacks `model` and `train`.")
    return config


def load_checkpoint(folder: Path, *, best: bool = False) -> Checkpoint:
    """A run's model, in evaluation mode, with its tokenizer.

    Args:
        folder: of the run.
        best: the weights with the lowest validation loss instead of the last.

    Raises:
        ValueError: if anything is missing, damaged or does not fit together.
    """
    model, config = load_model(folder, best=best)
    tokenizer = read_tokenizer(folder, config, model.config.vocab_size)
    return Checkpoint(model, tokenizer, config)


def load_model(folder: Path, *, best: bool = False) -> tuple[LanguageModel, dict[str, Any]]:
    """As `load_checkpoint`, without the tokenizer: the model and `config.json`."""
    config = read_config(folder)
    shape = model_config(folder, config)
    weights = read_weights(folder, shape, best=best)
    with torch.device("meta"):  # no initial values, which take minutes for a large model
        model = LanguageModel(shape)
    assert {name for name, _ in model.named_buffers()} <= set(weights), "a buffer was left unset"
    model.to_empty(device="cpu").load_state_dict(weights)  # in float32, whatever the file has
    return model.eval(), config


def model_config(folder: Path, config: dict[str, Any]) -> ModelConfig:
    """The shape of a run's model, from its `config.json`.

    Raises:
        ValueError: if it describes none.
    """
    try:
        return from_dict(config["model"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG} does not describe a model: {error}.") from error


def read_weights(folder: Path, shape: ModelConfig, *, best: bool = False) -> dict[str, Tensor]:
    """A run's weights, in the dtype that they were written in.

    Raises:
        ValueError: if the file is missing, damaged, or another model's.
    """
    path = folder / (BEST if best else WEIGHTS)
    if not path.is_file():
        raise ValueError(f"There is no {path}: the run has not saved any weights yet.")
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} cannot be read as safetensors ({error}): it is damaged or incomplete."
        ) from error
    with torch.device("meta"):
        _check_fit(LanguageModel(shape).state_dict(), weights, str(path))
    return weights


def read_tokenizer(folder: Path, config: dict[str, Any], vocab_size: int) -> Tokenizer:
    """The tokenizer in a folder; an imported model may have more tokens, as padding.

    So may one that was trained on from it.

    Raises:
        ValueError: if it is missing, damaged, or another model's.
    """
    imported = IMPORTED in config["train"]
    if imported and not (folder / TOKENIZER).is_file():
        raise ValueError(f"{folder} has no tokenizer: {HOW_TO_ADD_A_TOKENIZER}.")
    tokenizer = load_tokenizer(str(folder / TOKENIZER))
    may_be_padded = imported or config["train"].get("init_from") is not None
    if tokenizer.vocab_size > vocab_size or (
        tokenizer.vocab_size < vocab_size and not may_be_padded
    ):
        raise ValueError(
            f"The tokenizer in {folder} has {tokenizer.vocab_size} tokens, but the model "
            f"{vocab_size}: put back the {TOKENIZER} that it was trained with."
        )
    return tokenizer


def is_imported(folder: Path) -> bool:
    """Whether the folder holds an official checkpoint, which has no training to go on with."""
    return (folder / CONFIG).exists() and IMPORTED in read_config(folder)["train"]


def fill(model: LanguageModel, weights: Mapping[str, Tensor], source: str) -> None:
    """Copies weights into a model.

    Raises:
        ValueError: if they are another model's; it begins with `source`.
    """
    _check_fit(model.state_dict(), weights, source)
    model.load_state_dict(weights)


def _check_fit(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: str) -> None:
    wrong = sorted(set(own) ^ set(weights))
    wrong += [n for n in own if n in weights and own[n].shape != weights[n].shape]
    if wrong:
        raise ValueError(
            f"{source} does not fit {CONFIG} and {TOKENIZER}: {', '.join(wrong[:3])} differ."
        )


def holds_run(folder: Path) -> bool:
    """Whether a run has been written there."""
    return (folder / CONFIG).exists() or (folder / RESUME).exists()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a run's folder; the lock dies with the process.

    Raises:
        ValueError: if another process holds it, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise ValueError(
            f"Another process is writing to {folder}: wait for it, or choose another place."
        ) from error
    except OSError as error:
        raise ValueError(_cannot_write(folder, error)) from error
    try:
        yield
    finally:
        lock.release()


def _snapshots(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted((folder / RESUME).glob("step-*"), reverse=True)


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


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _readable(path: Path) -> None:
    """Gives a file the permissions that this user's files have; safetensors keeps others out."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _flush(path: Path) -> None:
    """Makes sure that a file or folder has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot_write(path: Path, error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"{path} cannot be written ({reason}): make room or choose another place."
