"""Names without the folders of the machine that they were measured on."""

import shlex
from pathlib import Path

from data.corpora.text import short_name


def portable(command: str) -> tuple[str, bool]:
    """A command without absolute paths, and whether it had any."""
    words = [without_folders(word) for word in shlex.split(command)]
    return shlex.join(words), words != shlex.split(command)


def without_folders(word: str) -> str:
    """`/a/b` and `--out=/a/b` without `/a/`, `/a/b/*.py` too; anything else as it is."""
    flag, equals, value = word.rpartition("=")
    return f"{flag}{equals}{short_name(Path(value))}" if value.startswith("/") else word
