"""Several mixers at once, each part of them in one of a few processes."""

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor

import torch

from train.verify import DTYPES
from train.verify.proof import Cell, Report, prove
from train.verify.targets import subjects_of


def verify_names(
    names: Sequence[str], *, full: bool, processes: int, advance: Callable[[int, int, str], None]
) -> Report:
    """As `verify`, for names of mixers, which is all that another process needs to be told.

    Args:
        names: of mixers.
        full: the mode.
        processes: how many, each with one thread.
        advance: called with the parts done, those in all, and the one that is done.
    """
    parts = {subject.name: name for name in names for subject in subjects_of(name)}
    context = multiprocessing.get_context("spawn")  # a fork would inherit locks of threads
    pool = ProcessPoolExecutor(min(processes, len(parts)), context, _start)
    cells: list[Cell] = []
    try:
        futures = [pool.submit(_prove_part, name, part, full) for part, name in parts.items()]
        for done, (part, future) in enumerate(zip(parts, futures, strict=True), 1):
            cells += future.result()
            advance(done, len(parts), part)
    finally:
        pool.shutdown(cancel_futures=True)
    return Report(cells)


def _start() -> None:
    """Of a worker: one thread, and the parent alone hears of Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _prove_part(name: str, part: str, full: bool) -> list[Cell]:
    subject = next(subject for subject in subjects_of(name) if subject.name == part)
    return prove(subject, DTYPES, full=full)
