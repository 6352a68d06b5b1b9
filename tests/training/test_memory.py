"""Freed memory stays with the process, and lies in huge pages."""

import subprocess
import sys
from pathlib import Path

import pytest

STEPS = """
import resource
import sys

import torch
from train.memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    blocks = [torch.ones(10 << 20) for _ in range(2)]  # 40 MB each
for _ in range(10):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
blocks = torch.ones(40 << 20)
print(next(line for line in open("/proc/self/smaps_rollup") if "AnonHuge" in line).split()[1])
"""
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def measured(choice):
    """Page faults of five steps, and kilobytes in huge pages while 160 MB are in use."""
    finished = subprocess.run(
        [sys.executable, "-c", STEPS, choice], capture_output=True, text=True, check=True
    )
    return [int(line) for line in finished.stdout.split()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_the_same_blocks_serve_every_step():
    """In a process of its own: the setting holds for all of it."""
    pages = 5 * 2 * 40 * 256
    (kept, huge), (left, _) = measured("keep"), measured("leave")
    assert kept < pages / 100
    assert left > pages / 2 or "[always]" in HUGE_PAGES.read_text()
    if HUGE_PAGES.exists() and "[never]" not in HUGE_PAGES.read_text():
        assert huge > 100_000
