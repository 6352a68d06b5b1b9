"""Corpora: from what a user names to documents for training and for validation.

A source is, in the order in which it is looked for:

==============================  ===================================================================
``sotu``                        the embedded State of the Union addresses; ``./sotu`` is a path
a text file                     any UTF-8 file; its last tenth is the validation text
``.jsonl .parquet .csv``        one document a row, from one column
a folder or a glob              text files (``.txt``, ``.md``, recursively), or tables by a glob
a folder with a saved dataset   what ``datasets.Dataset.save_to_disk`` wrote
``org/name[:config[:split]]``   a data set of the Hugging Face hub
==============================  ===================================================================
"""

import re
from glob import glob
from pathlib import Path

from data.corpora.base import Corpus, Documents, check_fraction
from data.corpora.hub import is_saved_dataset, load_hub, load_saved
from data.corpora.sotu import load_sotu
from data.corpora.tables import TABLES, load_tables
from data.corpora.text import (
    TEXT_SUFFIXES,
    is_pattern,
    load_text_file,
    load_text_files,
    short_name,
)
from data.errors import DataError

__all__ = ["Corpus", "Documents", "load_corpus"]

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]*){0,2}")


def load_corpus(
    source: str = "sotu",
    *,
    column: str = "text",
    validation_fraction: float = 0.1,
    stream: int | None = None,
) -> Corpus:
    """Find a source, read it once, check it and split it.

    The split is a function of the content alone:

    * ``sotu``: by whole address; the years that end in 5 are the validation side.
    * one text file: the first ``int(n * (1 - validation_fraction))`` characters train.
    * text files in a folder or glob: by whole file from ten files on, otherwise the end of each.
    * tables and data sets: by whole document, by its hash, whatever the order of the rows.
    * files or splits that are called ``train`` and ``validation`` (or ``valid``, ``val``, ``dev``)
      are taken as they are, and any others beside them are left alone.

    Args:
        source: What to read; see the head of this module.
        column: The column that holds the text, in tables and data sets.
        validation_fraction: The share of the validation side, between 0 and 1.
        stream: Of a hub data set, take the first so many documents of each split as they come,
            without downloading the rest.

    Raises:
        DataError: The source cannot be read, a side is empty, or an option has no effect on it.
    """
    check_fraction(validation_fraction)
    if stream is not None and stream < 1:
        raise DataError(f"The number of documents to stream is {stream}: choose one above 0.")
    if _is_on_hub(source):
        return load_hub(source, column, validation_fraction, stream)
    if stream is not None:
        raise DataError(
            f"There is nothing to stream from '{source}', which is not a data set of the hub: "
            "leave the number of documents out."
        )
    if source == "sotu":
        _refuse_column(column, "the embedded text")
        if validation_fraction != 0.1:
            raise DataError(
                "The embedded text has a fixed split (the years that end in 5 validate): leave "
                "the validation fraction at 0.1."
            )
        return load_sotu()
    path = Path(source).expanduser()
    if not source or not path.exists():
        if is_pattern(source):
            paths = _matches(path)
            if not paths:
                raise DataError(
                    f"No file matches '{source}': check the pattern, and quote it in a shell."
                )
            return _load_files(short_name(path), paths, column, validation_fraction)
        raise DataError(
            f"There is no file or folder '{source}': give a path that exists, a pattern such as "
            "'texts/*.txt', a hub data set as 'org/name', or 'sotu' for the embedded text."
        )
    if path.is_dir():
        if is_saved_dataset(path):
            return load_saved(path, column, validation_fraction)
        _refuse_column(column, "a folder of text files")
        return load_text_files(
            path.resolve().name, _texts_in(path, source), validation_fraction, base=path
        )
    return _load_files(path.name, [path], column, validation_fraction)


def _load_files(name: str, paths: list[Path], column: str, validation_fraction: float) -> Corpus:
    """Read one file, or the matches of a pattern: all of them text or all of one kind of table."""
    kinds = {path.suffix.lower() if path.suffix.lower() in TABLES else "" for path in paths}
    if len(kinds) > 1:
        found = ", ".join(sorted(kind or "text" for kind in kinds))
        raise DataError(
            f"'{name}' matches different kinds of files ({found}): narrow the pattern to one kind."
        )
    if kinds != {""}:
        return load_tables(name, paths, column, validation_fraction)
    _refuse_column(column, "a text file")
    if len(paths) == 1:
        return load_text_file(paths[0], validation_fraction)
    return load_text_files(name, paths, validation_fraction)


def _matches(pattern: Path) -> list[Path]:
    found = glob(str(pattern), recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
    return [path for path in map(Path, sorted(found)) if path.is_file()]


def _texts_in(folder: Path, source: str) -> list[Path]:
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    ]
    texts = [path for path in files if path.suffix.lower() in TEXT_SUFFIXES]
    if texts:
        return texts
    tables = sorted({path.suffix.lower() for path in files} & set(TABLES))
    hint = (
        f"name its tables by a pattern such as '{source.rstrip('/')}/*{tables[0]}'"
        if tables
        else "give a folder with text in it, or a pattern such as 'folder/*.log' for other names"
    )
    raise DataError(f"The folder '{source}' holds no .txt or .md files: {hint}.")


def _is_on_hub(source: str) -> bool:
    """Whether it is spelled like a name of the hub, and nothing of that name is here."""
    path = Path(source)
    is_file = path.suffix.lower() in {*TEXT_SUFFIXES, *TABLES, ".json"}
    return bool(_HUB_NAME.fullmatch(source)) and not is_file and not path.exists()


def _refuse_column(column: str, what: str) -> None:
    if column != "text":
        raise DataError(f"The column '{column}' has no effect on {what}: leave it out.")
