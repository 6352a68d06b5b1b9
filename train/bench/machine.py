"""What the machine can do at all, measured in turn with everything else; and peak memory."""

import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from model.ops import native
from model.ops.native.program import huge_pages
from model.ops.native.step import read_all
from train.precision import bf16_products

WIDTH = 1024
"""Rows and columns of the matrices that the rate of matrix products is measured with."""
PRODUCTS = 5
"""Products a turn."""
PLAIN = 256 * 2**20
"""Bytes of the read that the machine's bandwidth is measured with: more than its caches hold."""
PROBES = 3


class Machine:
    """Collects measurements of matrix products and plain reads over a whole run."""

    def __init__(self) -> None:
        self._gflops: dict[str, list[float]] = {"fp32": [], "bf16": []}
        self._bandwidths: list[float] = []
        self._matrices = [torch.rand(WIDTH, WIDTH) for _ in range(3)]
        self._memory = torch.empty(0)

    def multiply(self, precision: str = "fp32") -> list[float]:
        """A turn: GFLOP/s of some products of float32 matrices in this precision."""
        a, b, out = self._matrices
        found = []
        with bf16_products(a.device, enabled=precision == "bf16"):
            for _ in range(PRODUCTS):
                start = time.perf_counter()
                torch.mm(a, b, out=out)
                found.append(2e-9 * WIDTH**3 / (time.perf_counter() - start))
        self._gflops[precision] += found[1:]  # the first brings threads and caches back
        return found[1:]

    def reading(self, count: int) -> Callable[[], Callable[[Tensor], object]]:
        """As a model that reads `count` bytes a token and does nothing with them."""
        count -= count % 64
        if self._memory.numel() * 4 < count:
            self._memory = huge_pages(count).view(torch.float32)
            self._memory.fill_(1.0)
        memory = self._memory[: count // 4]
        run: Callable[[Tensor], object] = read_all if native.is_available() else torch.sum
        return lambda: lambda token: run(memory)

    def note_reads(self, count: int, seconds: Sequence[float]) -> None:
        """Measured reads of `count` bytes, which count where the caches cannot hold them."""
        if count >= PLAIN:
            self._bandwidths += [1e-9 * count / spent for spent in seconds]

    def release(self) -> None:
        """Gives back the memory that was read."""
        self._memory = torch.empty(0)

    def probe(self) -> None:
        """Some products and plain reads, so that both are known whatever is measured."""
        read = self.reading(PLAIN)()
        token = torch.zeros(1)
        read(token)
        for _ in range(PROBES):
            self.multiply()
            start = time.perf_counter()
            read(token)
            self._bandwidths.append(1e-9 * PLAIN / (time.perf_counter() - start))
        self.release()

    def to_dict(self) -> dict[str, Any]:
        """For JSON: medians over the run."""
        return {
            "gemm_gflops": median(self._gflops["fp32"]),
            "gemm_gflops_bf16": median(rounded) if (rounded := self._gflops["bf16"]) else None,
            "bandwidth_gbs": median(self._bandwidths),
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "processor": _processor(),
            "recurrences": native.status(),
            "torch": torch.__version__,
        }


def peak_of(work: Callable[[], object]) -> int | None:
    """Bytes that the process holds at most while it works, beyond what it held before.

    Meant for a process that has only just started, as pages once held are not always given back.
    None where the system does not tell.
    """
    before = _status("VmRSS")
    work()
    most = _status("VmHWM")
    return None if before is None or most is None else most - before


def _status(field: str) -> int | None:
    """A line of `/proc/self/status`, in bytes."""
    path = Path("/proc/self/status")
    if not path.exists():
        return None
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    return None


def _processor() -> str:
    """Its name."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
