"""Freed memory stays with the process."""

import subprocess
import sys

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
"""


def page_faults(choice):
    finished = subprocess.run(
        [sys.executable, "-c", STEPS, choice], capture_output=True, text=True, check=True
    )
    return int(finished.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_the_same_blocks_serve_every_step():
    """In a process of its own: the setting holds for all of it."""
    pages = 5 * 2 * 40 * 256
    assert page_faults("keep") < pages / 100
    assert page_faults("leave") > pages / 2
