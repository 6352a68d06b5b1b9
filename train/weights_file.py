"""Files of weights that other programs read and write: safetensors, and what `torch.save` makes."""

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from train import checkpoint as files

PICKLED = (".pth", ".pt", ".bin")
SAFETENSORS = ".safetensors"
SUFFIXES = (*PICKLED, SAFETENSORS)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, which stay on the disk until they are used where that goes.

    Raises:
        ValueError: if it is not a checkpoint, is damaged, or holds code; none is ever run.
    """
    if path.suffix == SAFETENSORS:
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{path} cannot be read as safetensors ({error}): it is damaged or incomplete."
            ) from error
    if path.suffix not in PICKLED:
        raise ValueError(
            f"{path} does not look like a checkpoint: give a file whose name ends in "
            f"{', '.join(PICKLED)} or {SAFETENSORS}."
        )
    contents = _unpickle(path)
    if not isinstance(contents, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in contents.items()
    ):
        raise ValueError(
            f"{path} is not a checkpoint: it holds something other than tensors by their names."
        )
    return {name: tensor.detach() for name, tensor in contents.items()}


def _unpickle(path: Path) -> Any:
    """What `torch.save` wrote, read by the unpickler that knows tensors and plain values only."""
    try:
        with path.open("rb") as file:
            is_archive = file.read(4) == b"PK\x03\x04"  # what came before 2020 cannot be mapped
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): check the file.") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about formats and protocols: the result is checked
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except MemoryError:
        raise
    except Exception as error:  # bytes that are no pickle end in errors of nearly every class
        if isinstance(error, pickle.UnpicklingError) and (asked := _asked_for(str(error))):
            raise ValueError(
                f"{path} holds more than tensors: it asks to run {asked}, which ebb never does. "
                "Save its tensors alone, best as safetensors."
            ) from error
        raise ValueError(
            f"{path} cannot be read as a checkpoint: it is damaged, incomplete or something else."
        ) from error


def _asked_for(message: str) -> str | None:
    """What a pickle wanted to import, by torch's message that it may not."""
    found = re.search(r"(?:Unsupported global: GLOBAL|GLOBAL) ([\w.]+)", message)
    return found[1] if found else None


def write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Tensors by name, tied ones too: as safetensors, or pickled where the suffix is another.

    Raises:
        ValueError: if the disk is full or the folder cannot be written.
    """
    tensors = _apart(weights)
    if path.suffix == SAFETENSORS:
        files.save_weights(path, tensors)
    else:
        files.write_atomically(path, lambda beside: _save_pickled(beside, tensors))


def _apart(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same, each in memory of its own: tied weights and parts of others are copied."""
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        storage = tensor.untyped_storage()
        whole = storage.nbytes() == tensor.numel() * tensor.element_size()
        own = whole and tensor.is_contiguous() and storage.data_ptr() not in seen
        apart[name] = tensor if own else tensor.clone(memory_format=torch.contiguous_format)
        seen.add(apart[name].untyped_storage().data_ptr())
    return apart


def _save_pickled(path: Path, weights: dict[str, Tensor]) -> None:
    with path.open("wb") as file:  # by its name the archive would be named too
        try:
            torch.save(weights, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # a full disk, which torch tells its own way
                raise error.__context__ from None
            raise
