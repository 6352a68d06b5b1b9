"""Ctrl-C once: finish the step, save, stop. Twice: stop now."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType


class Interrupted(Exception):  # noqa: N818  # not an error: the work is safe
    """Work was stopped by the user and saved; the message says how to go on."""


class AlreadyTold(Exception):  # noqa: N818  # another process says what happened
    """This process ends because of something that another one of the same run tells the user.

    Args:
        status: to exit with.
    """

    def __init__(self, status: int) -> None:
        super().__init__(f"ended with the others, status {status}")
        self.status = status


class StopRequest:
    """Whether somebody has asked to stop."""

    def __init__(self) -> None:
        self.requested = False
        self.time = 0.0
        """When, on the monotonic clock."""


@contextmanager
def stop_on_signal(say: Callable[[str], None], apart: float = 0.0) -> Iterator[StopRequest]:
    """Turns the first SIGINT or SIGTERM into a request; a second one interrupts at once.

    Outside the main thread, where Python takes no signals, nothing is changed.

    Args:
        say: told of the request.
        apart: seconds within which a signal counts as the same request: a launcher passes on what
            the terminal has already sent to all.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if stop.requested:
            if now - stop.time < apart:
                return
            raise KeyboardInterrupt
        stop.requested, stop.time = True, now
        with suppress(RuntimeError):  # Python's, if a line was just being written
            say("Stopping after this step and saving; press Ctrl-C again to stop at once.")

    handled = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, handle) for number in handled}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
