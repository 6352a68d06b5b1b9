"""What the programs of the native token step are made of, as `decode.cpp` knows it."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

ACTIVATIONS = (
    *("none", "tanh", "sigmoid", "squared_relu", "silu"),
    *("softplus", "log_sigmoid", "elu_plus_one"),
)
"""In the order of the kernel's `Activation`."""
KINDS = (
    *("barrier", "embed", "normalize", "interpolate", "keep", "multiply"),
    *("convolve", "rotate", "count", "heads", "wkv4", "rwkv5", "rwkv7"),
)
"""In the order of the kernel's `Kind`."""
WORDS = 24
"""Of an instruction: its kind and its arguments."""
LARGEST_HEAD = 512
"""The kernel's `MAX_HEAD`."""


class Vector(NamedTuple):
    """A place for a vector while a token is worked on."""

    offset: int
    size: int
    own: bool
    """Whether each thread has one, or all share one."""

    def split(self, count: int) -> "list[Vector]":
        """Its parts, of equal size."""
        return self.cut(*count * (self.size // count,))

    def cut(self, *sizes: int) -> "list[Vector]":
        """Its parts, of these sizes."""
        starts = itertools.accumulate(sizes, initial=self.offset)
        return [Vector(start, size, self.own) for start, size in zip(starts, sizes, strict=False)]


class Place(NamedTuple):
    """Of a packed tensor, in bytes from the beginning."""

    offset: int


LOGITS = Vector(-1, 0, False)
"""Where the logits of the next token go."""

Argument = int | float | bool | Vector | Place | None


@dataclass(frozen=True)
class HeadRule:
    """What `Program.heads` does beside `S = w S + k v^T`, `o = scale q S`; None leaves it out."""

    num_heads: int
    """H, of v and the state."""
    num_queries: int
    """Heads of q and k, a divisor of H: so many neighbours share one."""
    scale: float = 1.0
    is_delta: bool = False
    """`S = (w + b a^T) S + b v^T` with `b = strength k` and `a = -w k`."""
    is_unit: bool = False
    """q and k divided by their lengths."""
    strength: Vector | None = None
    """`[H]`, factor of what is written."""
    strength_scale: float = 1.0
    log_decay: Vector | None = None
    """`[H]`, or `[H K]`: the log-decay is this times scale and rate; 1 if None."""
    is_by_channel: bool = False
    """Whether it is `[H K]`."""
    decay_scale: float = 0.0
    rate: Tensor | None = None
    """`[H]`."""
    divide_eps: float | None = None
    """Divides by the sum of weights, which the state's last column carries, plus this."""
    skip: Tensor | None = None
    """`[H]`: the value times this is added."""
    norm: Tensor | None = None
    """`[V]`, weights of an RMS norm over each head."""
    norm_eps: float = 0.0
    gate: Vector | None = None
    """`[H V]`, factor at the end."""

    def flags(self) -> int:
        """The kernel's `HeadFlag`s."""
        decay = self.log_decay is not None
        given = (
            self.is_delta,
            self.is_unit,
            self.strength is not None,
            decay and self.is_by_channel,
            decay and not self.is_by_channel,
            self.rate is not None,
            self.divide_eps is not None,
            self.skip is not None,
            self.norm is not None,
            self.gate is not None,
        )
        return sum(1 << place for place, flag in enumerate(given) if flag)


class FinishedProgram(NamedTuple):
    """What the kernel runs."""

    instructions: np.ndarray[tuple[int, int], np.dtype[np.int64]]
    """`[count, WORDS]`."""
    weights: Tensor
    """Bytes that the instructions point into; must live as long as they do."""
    keep_alive: Sequence[Tensor]
    """Tensors that are read where they are."""
    shared_size: int
    """Floats that all threads share."""
    own_size: int
    """Floats of each thread."""
