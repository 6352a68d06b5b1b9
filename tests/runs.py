"""What the tests of training and of the command line share: a text, tiny settings, and `ebb`."""

import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from train.cli import main

SENTENCE = "the people of our union shall make good laws in peace and trade for every state"
TINY = [
    *("--size", "nano", "--tokenizer", "bytes", "--context", "16", "--batch-size", "2"),
    *("--eval-tokens", "64", "--threads", "1"),
]
"""A model and batches that take some hundredths of a second a step."""
STEPS = 28
"""Of the run that is stopped in many ways."""
PATIENCE = 120.0
"""Seconds after which another process counts as stuck."""


def write_text(path: Path, words: int = 1500, seed: int = 0) -> Path:
    """A text that a model can learn something of in a few steps."""
    vocabulary, draw = SENTENCE.split(), random.Random(seed)
    path.write_text(" ".join(draw.choice(vocabulary) for _ in range(words)), encoding="utf-8")
    return path


@contextmanager
def workplace(folder: Path) -> Iterator[Path]:
    """A folder with `text.txt` and a cache of tokens; the threads are then as they were before."""
    write_text(folder / "text.txt")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield folder
    torch.set_num_threads(threads)


def ebb(*args: object) -> int:
    """`ebb ARGS` in this process; its exit status."""
    return main([str(arg) for arg in args])


def start_ebb(*args: object, **options: object) -> subprocess.Popen[str]:
    """`ebb ARGS` in a process of its own, with one thread, its output in pipes."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "train.cli", *(str(arg) for arg in args)],
        **{
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
            "env": {**os.environ, "OMP_NUM_THREADS": "1"},
            **options,
        },
    )


def metrics(folder: Path) -> list[dict[str, float]]:
    """All lines of a run's `metrics.jsonl`; one that is not whole is an error."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def repeatable(folder: Path) -> list[dict[str, float]]:
    """The metrics without times, which are the part that does not repeat."""
    times = ("seconds", "tokens_per_second")
    return [{k: v for k, v in line.items() if k not in times} for line in metrics(folder)]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Waits until something has come true while a process runs."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "nothing has come of it"
        time.sleep(0.005)


def has_logged(folder: Path, lines: int) -> bool:
    """Whether a run has written so many lines of metrics."""
    path = folder / "metrics.jsonl"
    return path.exists() and path.read_bytes().count(b"\n") >= lines


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the lock."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if p.name != ".lock"}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel lets no file of this process grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def only_line(error: str) -> str:
    """The one line that a mistake is told in, after the name of the program."""
    lines = [line for line in error.splitlines() if line.startswith("ebb: ")]
    assert len(lines) == 1, error
    assert error.endswith(lines[0] + "\n"), error
    assert "Traceback" not in error
    assert not any(name in lines[0] for name in ("Error:", "[Errno", "NoneType")), lines[0]
    return lines[0].removeprefix("ebb: ")
