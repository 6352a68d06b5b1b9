"""What the settings of several commands share: where they write, and how values are checked."""

from collections.abc import Iterable
from pathlib import Path

CHECKPOINTS = Path("checkpoints")


def default_folder(name: str, data: str) -> Path:
    """Where to write what is made from a text, if no folder is given: `checkpoints/NAME-DATA`."""
    stem = "".join(c if c.isalnum() else "-" for c in Path(data).stem)
    return CHECKPOINTS / f"{name}-{stem}"


def one_of(name: str, value: str, known: Iterable[str]) -> None:
    """Refuses a name that there is not.

    Raises:
        ValueError: naming the ones that there are.
    """
    if value not in known:
        raise ValueError(f"there is no {name} {value!r}; choose one of {', '.join(known)}")


def at_least(name: str, value: int | None, least: int) -> None:
    """Refuses a number below `least`; None is a default and stands.

    Raises:
        ValueError: naming the setting.
    """
    if value is not None and value < least:
        raise ValueError(f"{name.replace('_', '-')} must be at least {least}, but is {value}")


def parse_count(text: str) -> int:
    """`"128"`, `"4k"` (4,096) or `"2M"` (2,097,152) -> a number of tokens of context.

    Raises:
        ValueError: for anything else.
    """
    text = text.strip()
    factor = {"k": 2**10, "m": 2**20}.get(text[-1:].lower(), 1)
    digits = text[:-1] if factor > 1 else text
    if not digits.isdecimal() or int(digits) < 1:
        raise ValueError(f"contexts must be numbers such as 128 or 4k, but one is {text!r}")
    return int(digits) * factor
