"""The compiled library: found and loaded when it is first asked for, and called through ctypes."""

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

INSTRUCTION_SETS = ("baseline", "AVX2", "AVX-512")
"""Names of what `ebb_instruction_set` returns; on processors other than x86, only the first."""

FOLDER = Path(__file__).parent
"""Where an installation puts the compiled library."""

_POINTER = [ctypes.c_void_p]

_switch = {"on": True}
"""Whether kernels that are there are used, in this process."""


class Library:
    """The functions of the compiled library, by name and dtype."""

    def __init__(self, path: Path) -> None:
        # torch is imported above: the library finds the OpenMP runtime that torch has loaded.
        self._library = ctypes.CDLL(str(path))

    def function(self, name: str, dtype: torch.dtype) -> Callable[..., int]:
        """A function that exists for float32 and float64."""
        suffix = {torch.float32: "f32", torch.float64: "f64"}[dtype]
        return getattr(self._library, f"ebb_{name}_{suffix}")  # type: ignore[no-any-return]

    def decode_step(self) -> Callable[..., None]:
        """`decode.cpp`: runs a program on a token."""
        function = self._library.ebb_decode_step
        function.restype = None
        function.argtypes = [*_POINTER, ctypes.c_int64, *3 * _POINTER, ctypes.c_int]
        return function

    def decode_read(self) -> Callable[..., float]:
        """`decode.cpp`: reads a stretch of memory."""
        function = self._library.ebb_decode_read
        function.restype = ctypes.c_double
        function.argtypes = [*_POINTER, ctypes.c_int64, ctypes.c_int]
        return function

    def decode_barrier_size(self) -> int:
        """Bytes of the barrier that a program's threads meet at."""
        return int(self._library.ebb_decode_barrier_size())

    def rows_per_block(self) -> int:
        """Rows over which a row kernel sums the gradients of parameters before they are joined."""
        return int(self._library.ebb_rows_per_block())

    def instruction_set(self) -> str:
        """The one in use: the widest that the machine has, unless another was chosen."""
        return INSTRUCTION_SETS[self._library.ebb_instruction_set()]

    def use_instruction_set(self, name: str) -> str:
        """Takes a plainer one, for tests; returns what is in use then."""
        self._library.ebb_use_instruction_set(INSTRUCTION_SETS.index(name))
        return self.instruction_set()


@functools.cache
def _load() -> tuple[Library | None, str]:
    """The library or None, and how things stand, in a few words."""
    for suffix in EXTENSION_SUFFIXES:
        path = FOLDER / f"_kernels{suffix}"
        if path.exists():
            try:
                library = Library(path)
            except OSError as error:
                return None, f"the compiled kernels do not load ({error}): reinstall"
            return library, ""
    return None, "no compiled kernels: install a C++ compiler and reinstall"


def library() -> Library:
    """The compiled library.

    Raises:
        ValueError: if there is none.
    """
    found, reason = _load()
    if found is None:
        raise ValueError(f"the native kernels are not there: {reason}")
    return found


def is_available() -> bool:
    """Whether the native kernels can run; a compiler takes the answer, and not how it is found."""
    return _switch["on"] and _load()[0] is not None


# What `torch.compiler.assume_constant_result` does, which would import the compiler, and that takes
# longer than PyTorch itself.
vars(is_available)["_dynamo_marked_constant"] = True


@contextmanager
def switched(*, on: bool) -> Iterator[None]:
    """Inside, in the whole process, the kernels are used where they are there, or nowhere."""
    before, _switch["on"] = _switch["on"], on
    try:
        yield
    finally:
        _switch["on"] = before


def status() -> str:
    """What `ebb info` says: the instruction set in use, or what would bring the kernels."""
    found, reason = _load()
    if found is None:
        return reason
    return f"native, {found.instruction_set()}" if _switch["on"] else "the kernels are switched off"


def call(name: str, dtype: torch.dtype, *arguments: Any) -> None:
    """Calls a function of the library, on as many threads as PyTorch uses."""
    if library().function(name, dtype)(*arguments, torch.get_num_threads()):
        raise MemoryError("the native kernels found no memory for their scratch")


def contiguous(x: Tensor | None) -> Tensor | None:
    """As the kernels want it."""
    return None if x is None else x.contiguous()


def refuse_second_derivative(ctx: Any, *gradients: Any) -> None:
    """What the operators of backward passes have for their own.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(
        'the native kernels have no second derivative: take the form with backend="torch"'
    )


def pointer(x: Tensor | None) -> int | None:
    """Where a contiguous tensor begins; null for None and for one without numbers."""
    if x is None:
        return None
    assert x.is_contiguous()
    return x.data_ptr()
