"""`metrics.jsonl`: one JSON object a logged step, in order, never half a line."""

import json
from pathlib import Path
from typing import Any

from train.checkpoint import write_atomically


class MetricsLog:
    """Appends to a file of JSON lines.

    Args:
        path: the file.
        after_step: lines of later steps are dropped: the run goes on from this step.
    """

    def __init__(self, path: Path, after_step: int) -> None:
        self._path = path
        kept = [line for line in read_metrics(path) if line["step"] <= after_step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(path, lambda beside: _write(beside, text))

    def append(self, line: dict[str, Any]) -> None:
        """Adds one line.

        Raises:
            ValueError: if the disk is full.
        """
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise ValueError(
                f"{self._path} cannot be written ({error.strerror}): make room, then --resume."
            ) from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file; none if there is no file.

    A line cut short by a crash, or of another kind, ends the list.
    """
    if not path.exists():
        return []
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            break
        lines.append(line)
    return lines


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
