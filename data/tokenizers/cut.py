"""Long texts in pieces of bounded size."""

import re
from collections.abc import Iterable, Iterator

_PIECE_CHARACTERS = 1 << 18
_LONE_SPACES = (re.compile(r"(?<=\S) (?=\S)"), re.compile(r"(?<=\S)\s(?=\S)"))
_LONG_RUN = re.compile(r"\S{1000}|\s{1000}")


def without_long_words(text: str) -> Iterator[str]:
    """Cut what has no white space, or nothing else, for a thousand characters.

    To train a BPE: its time grows with the square of the longest word, and a line of a million
    letters would take hours. Text with words of any usual length comes back whole.
    """
    start = 0
    for run in _LONG_RUN.finditer(text):
        yield text[start : run.end()]
        start = run.end()
    yield text[start:]


def pieces(text: str | Iterable[str]) -> Iterator[str]:
    """Cut a long text so that encoding it takes bounded memory.

    Cuts stand before a single space between two words, where the patterns of byte-level BPE cut
    anyway: the ids are those of the whole text. Where there is none for a quarter of a million
    characters, any other white space does, and without that any place; there, or with a tokenizer
    that treats the start of a text in its own way (a prefix space), the ids can differ from those
    of the whole text by a few tokens at each cut.

    Args:
        text: Whole, or in parts of any length as they are read; the cuts are the same.
    """
    rest = ""
    for part in [text] if isinstance(text, str) else text:
        rest, start = rest + part, 0
        while len(rest) - start > 2 * _PIECE_CHARACTERS:
            nearest, farthest = start + _PIECE_CHARACTERS, start + 2 * _PIECE_CHARACTERS
            found = (space.search(rest, nearest, farthest) for space in _LONE_SPACES)
            cut = next((match.start() for match in found if match), farthest)
            yield rest[start:cut]
            start = cut
        rest = rest[start:]
    yield rest
