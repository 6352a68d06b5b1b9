"""Tables with one document a row: ``.jsonl``, ``.parquet`` and ``.csv``."""

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from data.corpora.base import Corpus, Documents, make_corpus, split_by_hash
from data.corpora.text import own_sides, own_split_message
from data.errors import DataError, first_line


def load_tables(
    name: str, paths: Sequence[Path], column: str, validation_fraction: float
) -> Corpus:
    """Read tables of one kind row by row; null and empty texts are left out."""
    read = TABLES[paths[0].suffix.lower()]

    def documents(some: Sequence[Path]) -> Documents:
        return Documents(lambda: (text for path in some for text in read(path, column)))

    sides = own_sides(paths)
    if sides is None:
        return split_by_hash(name, documents(paths), validation_fraction)
    if validation_fraction != 0.1:
        raise DataError(own_split_message(name))
    return make_corpus(name, documents(sides[0]), documents(sides[1]))


def check_text(value: object, column: str, where: str) -> str:
    """The text of one cell; null counts as empty.

    Raises:
        DataError: The cell holds something else than text.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"The column '{column}' of {where} holds {type(value).__name__} values, not text: "
            "name a column of text."
        )
    return value


def missing_column(column: str, where: str, existing: Iterable[str]) -> DataError:
    """The error for a column that is not there, naming those that are."""
    return DataError(
        f"There is no column '{column}' in {where}: choose one of {', '.join(existing) or 'none'}."
    )


def _read_jsonl(path: Path, column: str) -> Iterator[str]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _parse_line(line, column, f"line {number} of '{path}'")
    except OSError as error:
        raise _unreadable(path, error) from error


def _parse_line(line: bytes, column: str, where: str) -> str:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where[0].upper()}{where[1:]} is not JSON ({first_line(error)}): write one JSON "
            "object a line, in UTF-8."
        ) from error
    if not isinstance(row, dict):
        raise DataError(
            f"{where[0].upper()}{where[1:]} is not a JSON object: write lines such as "
            f'{{"{column}": "..."}}.'
        )
    if column not in row:
        raise missing_column(column, where, row)
    text = check_text(row[column], column, where)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where[0].upper()}{where[1:]} holds half of a surrogate pair, which is no "
            "character: mend or remove that line."
        ) from error
    return text


def _read_csv(path: Path, column: str) -> Iterator[str]:
    csv.field_size_limit(sys.maxsize)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, strict=True)
            names = rows.fieldnames or []
            if column not in names:
                raise missing_column(column, f"'{path}'", names)
            for row in rows:
                if row[column] is None:
                    raise DataError(
                        f"Line {rows.line_num} of '{path}' is too short to have a column "
                        f"'{column}': mend or remove that line."
                    )
                yield row[column]
    except csv.Error as error:
        raise DataError(
            f"Line {rows.line_num} of '{path}' is not CSV ({first_line(error)}): check its quotes."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}' is not UTF-8 text: convert it to UTF-8.") from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _read_parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise missing_column(column, f"'{path}'", file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                for value in batch.column(0).to_pylist():
                    yield check_text(value, column, f"'{path}'")
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(
        f"'{path}' cannot be read as {path.suffix.lower()} ({first_line(error)}): check that the "
        "file is whole and of this kind."
    )


TABLES: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}
