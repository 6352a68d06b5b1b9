"""The folder of a run: what is in it, how it is written whole or not at all, and how it is read.

Every file is written beside its place, flushed to the disk and renamed. `resume/` holds complete
states of training, by `train.snapshot`.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import filelock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.tokenizers import Tokenizer, load_tokenizer
from model.config import ModelConfig
from model.language_model import LanguageModel, shapes_only
from model.presets import from_dict
from train.compact import grow

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
WEIGHTS = "model.safetensors"
BEST = "best.safetensors"
METRICS = "metrics.jsonl"
RESUME = "resume"
CARD = "README.md"
"""The page beside a checkpoint that is passed on."""
DIVERGED = "diverged.json"
"""The step at which a run of a comparison came to nothing, and the reason."""
IMPORTED = "imported"
"""In `train` of `config.json`: which official model the weights are, if they were not made here."""
HOW_TO_ADD_A_TOKENIZER = f"convert again with --tokenizer, or put a {TOKENIZER} into the folder"


class Checkpoint(NamedTuple):
    """A trained model with its tokenizer."""

    model: LanguageModel
    tokenizer: Tokenizer
    config: dict[str, Any]
    """`config.json`: `model` and `train`."""


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` on a name beside `path`, flushes to the disk and renames.

    Raises:
        ValueError: if the disk is full or the folder cannot be written; `path` is as it was.
    """
    beside = path.with_name(f".{path.name}.tmp")
    try:
        write(beside)
        readable(beside)
        flush(beside)
        beside.replace(path)
        flush(path.parent)
    except (OSError, SafetensorError) as error:
        beside.unlink(missing_ok=True)
        raise ValueError(cannot_write(path, error)) from error


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Weights as safetensors: no paths and no times, so that equal weights give equal bytes."""
    tensors = contiguous(weights)
    write_atomically(path, lambda beside: save_file(tensors, beside))


def save_json(path: Path, value: Any) -> None:
    """One JSON value, readable."""
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    write_atomically(path, lambda beside: write_text(beside, text))


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
    model = shapes_only(shape)
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
    """A run's weights, in the dtype that they were written in; those in 8 bits as float32.

    Raises:
        ValueError: if the file is missing, damaged, or another model's.
    """
    path = folder / (BEST if best else WEIGHTS)
    if not path.is_file():
        raise ValueError(f"There is no {path}: the run has not saved any weights yet.")
    try:
        weights = grow(load_file(path))
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} cannot be read as safetensors ({error}): it is damaged or incomplete."
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    _check_fit(shapes_only(shape).state_dict(), weights, str(path))
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
        make_folder(folder)
        lock = filelock.FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise ValueError(
            f"Another process is writing to {folder}: wait for it, or choose another place."
        ) from error
    except OSError as error:
        raise ValueError(cannot_write(folder, error)) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """A folder that nobody else writes to; if the work fails, what it made is gone again.

    Raises:
        ValueError: if another process writes to it, or it cannot be made.
    """
    was_there = folder.exists()
    try:
        with locked(folder):
            yield
    except BaseException:  # Ctrl-C too must leave nothing behind
        if not was_there:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            for name in (WEIGHTS, TOKENIZER, METRICS, CARD, CONFIG):
                (folder / name).unlink(missing_ok=True)
        raise


def contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As safetensors wants them."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def write_text(path: Path, text: str) -> None:
    """In UTF-8, whatever the system prefers."""
    path.write_text(text, encoding="utf-8")


def readable(path: Path) -> None:
    """Gives a file the permissions that this user's files have; safetensors keeps others out."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def make_folder(path: Path) -> None:
    """Makes a folder, and those above it, so that they survive a loss of power."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for made in missing:
        flush(made.parent)


def flush(path: Path) -> None:
    """Makes sure that a file or folder has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cannot_write(path: Path, error: Exception) -> str:
    """The sentence for a file or folder that could not be written."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if found := re.search(r"I/O error: (.+) \(os error \d+\)", reason):  # safetensors' own words
        reason = found[1]
    return f"{path} cannot be written ({reason}): make room or choose another place."
