"""Text that comes from outside, made harmless."""

from html import escape


def printable(text: str) -> str:
    """What does not print, such as what turns the direction of writing, becomes a space."""
    return "".join(char if char.isprintable() or char == "\n" else " " for char in text)


def safe(text: str) -> str:
    """Shown as it is, anywhere in a page: between tags and in quoted attributes."""
    return escape(printable(text))
