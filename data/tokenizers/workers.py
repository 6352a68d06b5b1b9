"""Texts to ids in several processes, where Python does the work and threads would take turns."""

import multiprocessing
import os
import signal
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from data.errors import DataError
from data.tokenizers.world import LongestMatch

_MOST = 8
"""Each holds a vocabulary of its own, some 100 MB with Python, and there are no more pieces of the
largest size in the batches that are tokenised at a time."""
_CHARACTERS = 1 << 16

_matching: LongestMatch | None = None


def usable_processes() -> int:
    """How many are worth starting here: the cores that may be used, within bounds.

    One where this is a worker itself that may not have any.
    """
    if multiprocessing.current_process().daemon:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, _MOST)


@contextmanager
def matching_processes(
    matching: LongestMatch, processes: int
) -> Iterator[Callable[[Sequence[str]], list[list[int]]]]:
    """A function from texts to their ids, in the order of the texts; each is valid UTF-8.

    Texts are never cut here, so that the ids do not depend on the number of processes.
    """
    context = multiprocessing.get_context("spawn")  # a fork would inherit locks of threads
    pool = ProcessPoolExecutor(processes, context, _start, (matching,))

    def encode(texts: Sequence[str]) -> list[list[int]]:
        found = pool.map(_encode, _groups(texts))
        try:
            return [ids.tolist() for group in found for ids in group]
        except BrokenProcessPool as error:
            raise DataError(
                "A process that tokenises has ended early, perhaps for want of memory: free some "
                "and start again."
            ) from error

    try:
        yield encode
    finally:
        pool.shutdown(cancel_futures=True)


def _groups(texts: Sequence[str]) -> Iterator[list[str]]:
    """Short texts together, so that handing them over does not cost more than the work."""
    group: list[str] = []
    characters = 0
    for text in texts:
        group.append(text)
        characters += len(text)
        if characters >= _CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _start(matching: LongestMatch) -> None:
    """Of a worker: its vocabulary, and the parent alone hears of Ctrl-C."""
    global _matching
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _matching = matching


def _encode(texts: Sequence[str]) -> list["array[int]"]:
    assert _matching is not None
    return [array("I", _matching.encode(text.encode())) for text in texts]
