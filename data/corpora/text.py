"""Plain text files: one, or many."""

import codecs
import re
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path

from data.corpora.base import Corpus, Documents, make_corpus, split_by_hash
from data.errors import DataError

TEXT_SUFFIXES = (".txt", ".md")
_MIN_FILES_FOR_WHOLE = 10
_PART_BYTES = 1 << 20
_SIDE = re.compile(r"(train)|(valid|validation|val|dev)")
_WILDCARD = re.compile(r"[*?\[]")


def is_pattern(source: str) -> bool:
    """Whether it may stand for several files: ``texts/*.txt``."""
    return _WILDCARD.search(source) is not None


def short_name(path: Path) -> str:
    """The last part of a path; of a pattern, which says little alone, the folder before it too.

    ``/some/where/lib/**/*.py`` is ``lib/**/*.py``, and ``*.py`` gets the name of this folder.
    """
    plain = list(takewhile(lambda part: not is_pattern(part), path.parts))
    if len(plain) == len(path.parts):
        return path.name
    folder = Path(*plain)
    if folder.name in ("", ".."):
        folder = folder.resolve()
    return Path(folder.name, *path.parts[len(plain) :]).as_posix()


def read_parts(path: Path) -> Iterator[str]:
    """A UTF-8 file as it stands, part by part (line ends are kept, a byte order mark is not text).

    Raises:
        DataError: The file cannot be opened, or is not UTF-8 text.
    """
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    try:
        with path.open("rb") as file:
            if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:
                done = len(codecs.BOM_UTF8)
            file.seek(done)
            while raw := file.read(_PART_BYTES):
                begun = len(decoder.getstate()[0])  # of a character whose end was not read yet
                yield _without_nul(decoder.decode(raw), path)
                done += len(raw)
            begun = len(decoder.getstate()[0])
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise DataError(
            f"'{path}' is not UTF-8 text (byte {done - begun + error.start}): convert it to UTF-8, "
            "or unpack it if it is compressed."
        ) from error
    except OSError as error:
        raise DataError(
            f"'{path}' cannot be read ({error.strerror}): check the file and its permissions."
        ) from error


def _without_nul(text: str, path: Path) -> str:
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
    if next(read_parts(path), None) is None:
        raise DataError(f"'{path}' is empty: give a file with text in it.")
    return make_corpus(path.name, *_both_ends([path], validation_fraction))


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
    return make_corpus(name, *_both_ends(paths, validation_fraction))


def own_split_message(name: str) -> str:
    """Why a validation fraction is refused where the source has its own split."""
    return (
        f"'{name}' has its own training and validation parts, so that a validation fraction has "
        "no effect: leave it out."
    )


def _whole(paths: Sequence[Path]) -> Documents:
    return Documents(lambda: map(read_parts, paths))


def _both_ends(paths: Sequence[Path], validation_fraction: float) -> tuple[Documents, Documents]:
    """The first ``int(n * (1 - validation_fraction))`` characters of each file, and the rest."""
    cuts = [int(sum(map(len, read_parts(path))) * (1 - validation_fraction)) for path in paths]
    return (
        Documents(lambda: (_up_to(cut, path) for cut, path in zip(cuts, paths, strict=True))),
        Documents(lambda: (_from(cut, path) for cut, path in zip(cuts, paths, strict=True))),
    )


def _up_to(cut: int, path: Path) -> Iterator[str]:
    for part in read_parts(path):
        yield part[:cut]
        cut -= len(part)
        if cut <= 0:
            return


def _from(cut: int, path: Path) -> Iterator[str]:
    for part in read_parts(path):
        yield part[max(cut, 0) :]
        cut -= len(part)
