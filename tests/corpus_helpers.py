"""What the tests of corpora share: tables of any kind, and the look of a message."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data.errors import DataError


def write_table(path: Path, rows: list[str], column: str = "text") -> Path:
    if path.suffix == ".jsonl":
        lines = [json.dumps({column: row, "other": 1}) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif path.suffix == ".csv":
        lines = [f"other,{column}", *(f'1,"{row}"' for row in rows)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        table = pyarrow.table({column: rows, "other": [1] * len(rows)})
        pyarrow.parquet.write_table(table, path)
    return path


def one_sentence(error: pytest.ExceptionInfo[DataError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message
