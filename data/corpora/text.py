"""Plain text files: one, or many."""

import re
from collections.abc import Sequence
from pathlib import Path

from data.corpora.base import Corpus, Documents, make_corpus, split_by_hash, split_text
from data.errors import DataError

TEXT_SUFFIXES = (".txt", ".md")
_MIN_FILES_FOR_WHOLE = 10
_SIDE = re.compile(r"(train)|(valid|validation|val|dev)")


def read_text(path: Path) -> str:
    """Read a whole UTF-8 file as it stands (line ends are kept; a byte order mark is not text).

    Raises:
        DataError: The file cannot be opened, or is not UTF-8 text.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"'{path}' cannot be read ({error.strerror}): check the file and its permissions."
        ) from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"'{path}' is not UTF-8 text (byte {error.start}): convert it to UTF-8, or unpack it "
            "if it is compressed."
        ) from error
    if "\0" in text:
        raise DataError(
            f"'{path}' is a binary file (it holds NUL bytes): give text in UTF-8, or a .jsonl, "
            ".parquet or .csv file."
        )
    return text


def own_sides(paths: Sequence[Path]) -> tuple[list[Path], list[Path]] | None:
    """The files that are called train and validation, if there are both kinds.

    ``train.txt`` and ``valid.txt`` count, and so do ``train-00000-of-00002.parquet`` and
    ``validation-00000-of-00001.parquet``.
    """
    train: list[Path] = []
    validation: list[Path] = []
    for path in paths:
        match = _SIDE.fullmatch(re.split(r"[-_.]", path.name, maxsplit=1)[0].lower())
        if match:
            (train if match[1] else validation).append(path)
    return (train, validation) if train and validation else None


def load_text_file(path: Path, validation_fraction: float) -> Corpus:
    """One document on each side: the beginning of the file and its end."""
    if not path.is_file():
        raise DataError(f"'{path}' is not a regular file: give a text file or a folder of them.")
    text = read_text(path)
    if not text:
        raise DataError(f"'{path}' is empty: give a file with text in it.")
    head, tail = split_text(text, validation_fraction)
    return make_corpus(path.name, Documents(lambda: iter([head])), Documents(lambda: iter([tail])))


def load_text_files(
    name: str, paths: Sequence[Path], validation_fraction: float, *, base: Path | None = None
) -> Corpus:
    """One document a file, read when it is asked for.

    Split by the names of the files if they say so, by whole file from ten files on, and otherwise
    by taking the end of each file. In a folder (``base``) only files at its top say so.
    """
    sides = own_sides([path for path in paths if base is None or path.parent == base])
    if sides:
        if validation_fraction != 0.1:
            raise DataError(own_split_message(name))
        return make_corpus(name, _whole(sides[0]), _whole(sides[1]))
    if len(paths) >= _MIN_FILES_FOR_WHOLE:
        return split_by_hash(name, _whole(paths), validation_fraction)
    halves = [
        Documents(
            lambda side=side: (  # type: ignore[misc]
                split_text(read_text(path), validation_fraction)[side] for path in paths
            )
        )
        for side in (0, 1)
    ]
    return make_corpus(name, halves[0], halves[1])


def own_split_message(name: str) -> str:
    """Why a validation fraction is refused where the source has its own split."""
    return (
        f"'{name}' has its own training and validation parts, so that a validation fraction has "
        "no effect: leave it out."
    )


def _whole(paths: Sequence[Path]) -> Documents:
    return Documents(lambda: map(read_text, paths))
