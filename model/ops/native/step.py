"""Runs a program of `program.py`: one token of one text in one call."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from model.ops.native.instructions import FinishedProgram
from model.ops.native.loading import library

_LINE = 128
"""Bytes that the arena and the barrier are aligned to."""


class Pointers:
    """Where a state's tensors are; keeps them alive."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        assert all(x.is_contiguous() for x in tensors)
        self.tensors = tensors
        self.array = (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))


class _Program(ctypes.Structure):
    """The kernel's `Program`."""

    _fields_ = (
        ("instructions", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("shared", ctypes.c_void_p),
        ("shared_size", ctypes.c_int64),
        ("own_size", ctypes.c_int64),
        ("barrier", ctypes.c_void_p),
    )


class Step:
    """A program with the memory that it needs. One call at a time: the memory is not shared."""

    def __init__(self, program: FinishedProgram) -> None:
        self._program = program
        self._run = library().decode_step()
        self._threads = 0
        self._arena = torch.empty(0)
        self._barrier = _aligned(library().decode_barrier_size())
        self._description = _Program()

    @property
    def num_bytes(self) -> int:
        """Of the packed weights."""
        return self._program.weights.numel()

    def __call__(self, token: int, before: Pointers, after: Pointers, logits: Tensor) -> None:
        """Reads a token; `after` may be `before`. The token must be in the vocabulary."""
        threads = torch.get_num_threads()
        if threads != self._threads:
            self._prepare(threads)
        self._run(
            ctypes.byref(self._description),
            token,
            before.array,
            after.array,
            logits.data_ptr(),
            threads,
        )

    def _prepare(self, threads: int) -> None:
        program = self._program
        self._arena = _aligned(4 * (program.shared_size + threads * program.own_size))
        self._description = _Program(
            program.instructions.ctypes.data,
            len(program.instructions),
            self._arena.data_ptr(),
            program.shared_size,
            program.own_size,
            self._barrier.data_ptr(),
        )
        self._threads = threads


def read_all(memory: Tensor) -> float:
    """Reads float32 `[n]` once, with all threads, and returns its sum: to measure the memory."""
    lines = memory.numel() // 16
    return library().decode_read()(memory.data_ptr(), lines, torch.get_num_threads())


def _aligned(size: int) -> Tensor:
    """So many bytes of zeros."""
    memory = torch.zeros(size + _LINE, dtype=torch.uint8)
    begin = -memory.data_ptr() % _LINE
    return memory[begin : begin + size]
