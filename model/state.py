"""The recurrent state of a model: a value that is passed in and returned, never changed.

A mixer's state is a NamedTuple of tensors, a model's a tuple with one `BlockState` a layer. Every
tensor has the batch as its first dimension. Keeping an old state is a branch; saving one is a
prompt cache.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


class BlockState(NamedTuple):
    """The state of one block."""

    time: Any
    """Of the time mixer: its own NamedTuple."""
    channel: Any
    """Of the channel mixer: its own NamedTuple, empty where it looks at one token only."""


class NoState(NamedTuple):
    """The state of a layer that looks at one token only."""


ModelState = tuple[BlockState, ...]

_EXTRA = "extra."
"""Before the names of what is saved beside a state."""


def map_tensors(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    """The same structure with `function` applied to every tensor."""
    if isinstance(state, Tensor):
        return function(state)
    return _like(state, (map_tensors(function, part) for part in state))


def _like(state: Any, parts: Iterable[Any]) -> Any:
    """A tuple, or a NamedTuple of the same kind."""
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)


def tensors(state: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors with their names, such as `0.time.shift`."""
    if isinstance(state, Tensor):
        yield prefix, state
        return
    names = getattr(state, "_fields", range(len(state)))
    for name, part in zip(names, state, strict=True):
        yield from tensors(part, f"{prefix}.{name}" if prefix else str(name))


def num_bytes(state: Any) -> int:
    """Memory that the state's tensors take, in bytes."""
    return sum(tensor.numel() * tensor.element_size() for _, tensor in tensors(state))


def clone(state: ModelState) -> ModelState:
    """A copy with memory of its own."""
    copy: ModelState = map_tensors(torch.clone, state)
    return copy


def detach(state: ModelState) -> ModelState:
    """The same values without their history, for truncated back-propagation."""
    detached: ModelState = map_tensors(torch.detach, state)
    return detached


def select_rows(state: ModelState, rows: Sequence[int] | Tensor) -> ModelState:
    """Some rows of the batch, in the given order; a row may come more than once."""
    index = torch.as_tensor(rows, dtype=torch.long)
    selected: ModelState = map_tensors(lambda x: x.index_select(0, index.to(x.device)), state)
    return selected


def concatenate(states: Sequence[ModelState]) -> ModelState:
    """One batch of several. A state that grows with the tokens brings its own way to do it."""
    joined: ModelState = _concatenate(states)
    return joined


def _concatenate(states: Sequence[Any]) -> Any:
    first = states[0]
    if isinstance(first, Tensor):
        return torch.cat(list(states))
    if hasattr(first, "concatenate"):
        return first.concatenate(states)
    return _like(first, (_concatenate(parts) for parts in zip(*states, strict=True)))


def save(
    state: ModelState, path: Path, fingerprint: str, extra: Mapping[str, Tensor] | None = None
) -> None:
    """Writes a state as safetensors.

    Args:
        state: of a model.
        path: the file; replaced if it exists.
        fingerprint: `LanguageModel.fingerprint()` of the model whose state this is.
        extra: tensors to keep beside it, such as the next token's logits; `load` passes them over.
    """
    flat = dict(tensors(state)) | {_EXTRA + name: value for name, value in (extra or {}).items()}
    contiguous = {name: tensor.detach().contiguous() for name, tensor in flat.items()}
    save_file(contiguous, path, metadata={"state_of": fingerprint})


def load(path: Path, like: ModelState, fingerprint: str) -> ModelState:
    """Reads what `save` wrote.

    Args:
        path: the file.
        like: an initial state of the model, for the structure.
        fingerprint: of the model that is to go on from it.

    Raises:
        ValueError: if the file is not a state, is damaged, or belongs to another model.
    """
    found, state_of = _read(path)
    names = [name for name, _ in tensors(like)]
    if state_of != fingerprint or {n for n in found if not n.startswith(_EXTRA)} != set(names):
        raise ValueError(f"{path} is the state of another model; its weights differ from these")
    remaining = iter(names)
    loaded: ModelState = map_tensors(lambda _: found[next(remaining)], like)
    return loaded


def load_extra(path: Path) -> dict[str, Tensor]:
    """What `save` was given as `extra`.

    Raises:
        ValueError: if the file is not a state, or is damaged.
    """
    found, _ = _read(path)
    return {n.removeprefix(_EXTRA): x for n, x in found.items() if n.startswith(_EXTRA)}


def _read(path: Path) -> tuple[dict[str, Tensor], str]:
    """All tensors in a file and the fingerprint of its model."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as a saved state: {error}") from error
    if "state_of" not in metadata:
        raise ValueError(f"{path} is not a saved state; make one with --save-state")
    return found, metadata["state_of"]
