"""Programs for the native token step (`decode.cpp`): what a layer does to one token.

A layer describes its step with the methods of `Program`; all matrices and vectors it names are
packed into one stretch of memory when the program is finished. Between barriers every thread works
on its own share, so a vector that is computed in shares may be read whole only after a `barrier`.
"""

import math
import mmap
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.ops.native.instructions import (
    ACTIVATIONS,
    KINDS,
    LOGITS,
    WORDS,
    Argument,
    FinishedProgram,
    HeadRule,
    Place,
    Vector,
)
from model.ops.native.packing import BLOCK, FORMATS, ROWS, PackedMatrix, pack

_PADDING = 32
"""Vectors are filled up with zeros to a multiple of this many floats: whole blocks, whole lines."""


class Program:
    """Collects instructions.

    Args:
        weights: one of `FORMATS`, what the matrices are kept in.
        width: D.
    """

    def __init__(self, weights: str, width: int) -> None:
        self.weights = weights
        self._instructions: list[tuple[str, tuple[Argument, ...]]] = []
        self._packed: list[tuple[int, Tensor]] = []
        self._bytes = 0
        self._alive: list[Tensor] = []
        self._sizes = {False: 0, True: 0}
        self._most = {False: 0, True: 0}
        self._room = 0
        self.v_first = self.vector(width)
        """`[D]`: the first layer's values, which RWKV-7's other layers lean towards."""

    def vector(self, size: int, *, own: bool = False) -> Vector:
        """A new place."""
        place = Vector(self._sizes[own], size, own)
        self._sizes[own] += _padded(size)
        return place

    @contextmanager
    def reuse(self) -> Iterator[None]:
        """Places made inside are free again afterwards."""
        before = dict(self._sizes)
        yield
        for own, size in before.items():
            self._most[own] = max(self._most[own], self._sizes[own])
            self._sizes[own] = size

    def barrier(self) -> None:
        """Threads wait until all have come here."""
        self._add("barrier")

    def embed(self, table: Tensor, out: Vector) -> None:
        """The token's row of `[vocab, D]`, which is not packed: one row a token is read."""
        self._alive.append(table)
        self._add("embed", table.data_ptr(), table.shape[1], out)

    def normalize(
        self,
        x: Vector,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        out: Vector | None = None,
    ) -> Vector:
        """LayerNorm, or without a bias RMSNorm; every thread its own unless `out` says otherwise.

        The caller must see to it that x is whole.
        """
        out = self.vector(x.size, own=True) if out is None else out
        self._add("normalize", x, out, x.size, self._row(weight), self._row(bias), float(eps))
        return out

    def vectors(self, count: int, size: int) -> list[Vector]:
        """New places, one behind the other."""
        return [self.vector(size) for _ in range(count)]

    def interpolate(self, x: Vector, slot: Any, mixes: Tensor | Sequence[Vector]) -> list[Vector]:
        """`x + (previous - x) mix` for each of the mixes; previous is the state's tensor.

        The mixes are parameters `[m, D]`, or places that `vectors` made, which must be whole.
        """
        assert x.own
        outs = [self.vector(x.size, own=True) for _ in mixes]
        stride, rows, vector = _padded(x.size), None, None
        if isinstance(mixes, Tensor):
            rows = self._place(torch.nn.functional.pad(mixes, (0, stride - x.size)))
        else:
            vector = mixes[0]
        self._add("interpolate", x, outs[0], x.size, slot, rows, len(outs), stride, vector)
        return outs

    def keep(self, x: Vector, slot: Any) -> None:
        """Makes x the state's tensor; no thread may still want the old one."""
        self._add("keep", x, x.size, slot)

    def multiply(
        self,
        matrix: Tensor,
        x: Vector,
        *,
        bias: Tensor | None = None,
        activation: str = "none",
        out: Vector | None = None,
        add: bool = False,
        factor: Vector | None = None,
        grain: int = ROWS,
        weights: str | None = None,
    ) -> Vector:
        """`activation(matrix x + bias) factor`, shared between the threads by rows.

        Args:
            matrix: `[R, C]`.
            x: must be whole.
            bias: `[R]`.
            activation: one of `ACTIVATIONS`.
            out: where to; a new place if None.
            add: to what is there, instead of in its place.
            factor: what the result is multiplied with, at least in the thread's own rows.
            grain: each thread gets a multiple of so many rows, itself a multiple of 16.
            weights: another format than the program's.
        """
        assert x.size == matrix.shape[1]
        assert grain % ROWS == 0
        out = self.vector(matrix.shape[0]) if out is None else out
        weights = weights or self.weights
        packed: PackedMatrix = pack(matrix, weights)
        # Of x in integers: a scale and a sum a block, then two digits of 8 bits a value.
        self._room = max(self._room, 2 * packed.columns // BLOCK + packed.columns // 2)
        self._add(
            "multiply",
            self._place(packed.values),
            self._place(packed.scales),
            FORMATS.index(weights),
            packed.rows,
            packed.columns,
            x,
            out,
            grain,
            ACTIVATIONS.index(activation),
            self._row(bias),
            add,
            Vector(0, 0, True),  # the room, which stands first among a thread's own
            x.size,
            factor is not None,
            factor,
        )
        return out

    def convolve(
        self,
        x: Vector,
        slot: Any,
        taps: Tensor,
        bias: Tensor | None,
        *,
        first: int = 0,
        channels: int | None = None,
    ) -> Vector:
        """The short convolution with its silu, channels shared between the threads as rows are.

        Args:
            x: the token, at least in the thread's own channels.
            slot: the state's window.
            taps: `[size, D]`, those of x only.
            bias: `[D]`, of x only.
            first: x's first channel in the window.
            channels: of the window; those of x if None.
        """
        out, stride = self.vector(x.size), _padded(x.size)
        rows = torch.nn.functional.pad(taps, (0, stride - x.size))
        self._add(
            "convolve",
            *(x, out, x.size, slot, first, channels or x.size, len(taps)),
            *(self._place(rows), stride, self._row(bias)),
        )
        return out

    def rotate(self, x: Vector, slot: Any, *, num_heads: int, base: float) -> None:
        """Rotary positions of a vector, in place, heads shared between the threads."""
        self._add("rotate", x, num_heads, x.size // num_heads, slot, float(base))

    def count(self, slot: Any) -> None:
        """One more token; no thread may still want the old number."""
        self._add("count", slot)

    def heads(self, q: Vector, k: Vector, v: Vector, slot: Any, rule: HeadRule) -> Vector:
        """The additive or the delta recurrence, heads shared between the threads.

        q, k, v and what the rule names must be whole, at least in the thread's own heads.
        """
        out, flags = self.vector(v.size), rule.flags()
        decay = rule.log_decay or out
        self._add(
            "heads",
            *(q, k, v, out, rule.num_heads, q.size // rule.num_queries),
            *(v.size // rule.num_heads, slot, flags, rule.num_heads // rule.num_queries),
            *(float(rule.scale), rule.strength or out, float(rule.strength_scale)),
            *(decay, float(rule.decay_scale), self._row(rule.rate), float(rule.divide_eps or 0.0)),
            *(self._row(rule.skip), self._row(rule.norm), float(rule.norm_eps), rule.gate or out),
        )
        return out

    def wkv4(
        self,
        key: Vector,
        value: Vector,
        factor: Vector,
        slots: Sequence[Any],
        *,
        log_decay: Tensor,
        bonus: Tensor,
    ) -> Vector:
        """RWKV-4's mean times a factor, channels shared between the threads as rows are."""
        out = self.vector(key.size)
        self._add(
            "wkv4",
            *(key, value, factor, out, key.size),
            *slots,
            self._row(log_decay),
            self._row(bonus),
        )
        return out

    def rwkv5(
        self,
        vectors: Sequence[Vector],
        *,
        num_heads: int,
        head_dim: int,
        slot: Any,
        decay: Tensor | Vector,
        parameters: Sequence[Tensor],
        eps: float,
    ) -> None:
        """RWKV-5 and 6 between their matrices, heads shared between the threads.

        Args:
            vectors: receptance, key, value, gate and the output; all but the last at least in the
                thread's own heads.
            num_heads: H.
            head_dim: K, which is V.
            slot: the state's matrix.
            decay: the log-decay is `-exp(decay)`; a parameter or computed.
            parameters: bonus, the norm's weight and bias.
            eps: of the norm.
        """
        self._add(
            "rwkv5",
            *vectors,
            num_heads,
            head_dim,
            slot,
            None if isinstance(decay, Vector) else self._row(decay.flatten()),
            decay if isinstance(decay, Vector) else None,
            *(self._row(parameter.flatten()) for parameter in parameters),
            float(eps),
        )

    def rwkv7(
        self,
        vectors: Sequence[Vector],
        *,
        num_heads: int,
        head_dim: int,
        slot: Any,
        parameters: Sequence[Tensor],
        eps: float,
        is_first: bool,
        strongest_decay: float,
    ) -> None:
        """RWKV-7 between its matrices, heads shared between the threads.

        Args:
            vectors: receptance, key, value, first value, decay, iclr, value residual, gate and the
                output, the first eight at least in the thread's own heads.
            num_heads: H.
            head_dim: K, which is V.
            slot: the state's matrix.
            parameters: removal scale, iclr scale, bonus, the norm's weight and bias.
            eps: of the norm.
            is_first: whether this layer's value is the first value.
            strongest_decay: factor of the decay's logarithm.
        """
        rows = [self._row(parameter.flatten()) for parameter in parameters]
        self._add(
            "rwkv7",
            *vectors,
            num_heads,
            head_dim,
            slot,
            *rows,
            float(eps),
            is_first,
            float(strongest_decay),
        )

    def finish(self) -> FinishedProgram:
        """Packs everything."""
        memory = huge_pages(max(self._bytes, 1))
        for offset, tensor in self._packed:
            memory[offset : offset + tensor.numel()].copy_(tensor)
        self._packed.clear()
        most = {own: max(size, self._most[own]) for own, size in self._sizes.items()}
        room, shared = _padded(self._room), most[False]

        def resolve(argument: Argument) -> int:
            if isinstance(argument, Vector):
                if argument == LOGITS:
                    return -1
                if not argument.own:
                    return argument.offset
                return shared + (argument.offset + room if argument.size else 0)
            if isinstance(argument, Place):
                return memory.data_ptr() + argument.offset
            if isinstance(argument, float):
                (bits,) = struct.unpack("=q", struct.pack("=d", argument))
                return int(bits)
            return int(argument or 0)

        instructions = np.zeros((len(self._instructions), WORDS), dtype=np.int64)
        for row, (kind, arguments) in zip(instructions, self._instructions, strict=True):
            row[0] = KINDS.index(kind)
            row[1 : 1 + len(arguments)] = [resolve(argument) for argument in arguments]
        return FinishedProgram(instructions, memory, self._alive, shared, room + most[True])

    def _add(self, kind: str, *arguments: Argument) -> None:
        self._instructions.append((kind, arguments))

    def _row(self, vector: Tensor | None) -> Place | None:
        """A packed vector, filled up with zeros."""
        if vector is None:
            return None
        missing = _padded(vector.numel()) - vector.numel()
        return self._place(torch.nn.functional.pad(vector.float(), (0, missing)))

    def _place(self, tensor: Tensor | None) -> Place | None:
        if tensor is None:
            return None
        flat = tensor.detach().contiguous().flatten().view(torch.uint8)
        place = Place(self._bytes)
        self._packed.append((place.offset, flat))
        self._bytes += math.ceil(flat.numel() / 128) * 128
        return place


def _padded(size: int) -> int:
    return math.ceil(size / _PADDING) * _PADDING


def huge_pages(size: int) -> Tensor:
    """Bytes, in pages of 2 MB where the system has them: measured, they are read a fifth faster."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
