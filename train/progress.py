"""What a person sees while work goes on: bars on a terminal, plain lines elsewhere; to stderr."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

SECONDS_BETWEEN_LINES = 10.0


class Display:
    """One place for all progress of a command. Use it as a context manager.

    Args:
        quiet: show nothing, as a process does that works beside another.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, highlight=False, quiet=quiet)
        self._is_live = self.console.is_terminal
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=15),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(compact=True),  # a note of full length just fits 80 columns
            TextColumn("left"),
            console=self.console,
            disable=not self._is_live,
        )
        self._tables: list[Any] = []
        self._name = ""
        self._live = Live(
            get_renderable=lambda: Group(*self._tables, self._progress),
            console=self.console,
            transient=True,
        )

    def __enter__(self) -> Self:
        """Starts the live display."""
        if self._is_live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Takes the live display away."""
        self._live.stop()

    def say(self, text: str, style: str | None = None) -> None:
        """A line above the bars, broken only on a terminal; the text is never read as markup."""
        line = f"{self._name}: {text}" if self._name else text
        self.console.print(escape(line), style=style, soft_wrap=not self._is_live)

    @contextmanager
    def named(self, name: str) -> Iterator[None]:
        """Every line and bar is about what is called so."""
        before, self._name = self._name, name
        try:
            yield
        finally:
            self._name = before

    @contextmanager
    def table(self, table: Any) -> Iterator[None]:
        """Something that rich can draw, above the bars and drawn anew all the time."""
        self._tables.append(table)
        try:
            yield
        finally:
            self._tables.remove(table)

    @property
    def is_live(self) -> bool:
        """Whether there are bars and tables, or plain lines."""
        return self._is_live

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar for work of known size; call what it gives with the amount done so far."""
        with self.noted_task(name, total) as update:
            yield lambda done: update(done, "")

    @contextmanager
    def noted_task(
        self, name: str, total: int, done: int = 0
    ) -> Iterator[Callable[[int, str], None]]:
        """As `task`, with a note beside the bar. A line each ten seconds where there is no bar."""
        task = self._progress.add_task(escape(name), total=total, completed=done, note="")
        last_line = time.monotonic()
        start = time.monotonic()

        def update(now_done: int, note: str) -> None:
            nonlocal last_line
            self._progress.update(task, completed=now_done, note=escape(note))
            now = time.monotonic()
            if not self._is_live and now - last_line >= SECONDS_BETWEEN_LINES:
                last_line = now
                advanced = max(now_done - done, 1)
                left = (now - start) / advanced * (total - now_done)
                self.say(f"{name}  {now_done:,}/{total:,}  {note}  {duration(left)} left".strip())

        try:
            yield update
        finally:
            self._progress.remove_task(task)


def duration(seconds: float) -> str:
    """`1:05` or `2:01:05`."""
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
