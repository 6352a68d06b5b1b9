"""How the process gets its memory from the system."""

import ctypes
import sys
from pathlib import Path
from typing import Any

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -2, -3, -4, -8
"""Of glibc's malloc.h."""
_HUGE_PAGES = 14
"""`MADV_HUGEPAGE` of Linux's mman.h."""
_HUGE = 2 * 2**20
"""Bytes of a huge page."""
_RESERVE = 2**30
"""Bytes of addresses to take at once; memory stands behind those alone that are written to."""


def keep_freed_memory() -> bool:
    """Keeps memory that tensors no longer need for the next ones, in huge pages; in all threads.

    glibc hands large blocks back to the system as soon as they are free. Every step of training
    asks for the same blocks again, and the system clears them page by page: measured, 5 % of a step
    at 256 tokens of context and 13 % at 4,096. And a step passes over some hundred megabytes:
    looking up where each page of 4 KB lies takes another 10 % of it, which pages of 2 MB save. The
    scratch of other threads lies in the same heap for that. What the process holds at most stays
    the same, but for parts of a huge page.

    Returns:
        Whether there was something to do: under glibc, that is on most Linux systems.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    settings = {
        _TRIM_THRESHOLD: 2**31 - 1,
        _MMAP_THRESHOLD: 32 * 2**20,
        _MMAP_MAX: 0,
        _TOP_PAD: _RESERVE,
        _ARENA_MAX: 1,
    }
    done = all(libc.mallopt(name, value) == 1 for name, value in settings.items())
    _ask_for_huge_pages(libc)
    return done


def _ask_for_huge_pages(libc: Any) -> None:
    """For the heap and the addresses that it grows into; a system without them says no."""
    libc.malloc.restype = ctypes.c_void_p
    libc.free(ctypes.c_void_p(libc.malloc(ctypes.c_size_t(_RESERVE // 4))))  # makes the heap grow
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    heap = next((line.split()[0] for line in maps if line.endswith("[heap]")), None)
    if heap is not None:
        begin, end = (int(place, 16) for place in heap.split("-"))
        begin = -(-begin // _HUGE) * _HUGE
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _HUGE_PAGES)
