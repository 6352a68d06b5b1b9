"""The table of runs that train side by side, as it is drawn in terminals of several widths."""

import io
import json
import math

import pytest
from rich.cells import cell_len
from rich.console import Console

from train.live import BARS, WIDTH, RunTable, sparkline

LONG = "linear_transformer, seed 0"


def drawn(table, width):
    """The lines of the table; none is longer than the terminal."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(table)
    lines = console.file.getvalue().rstrip("\n").split("\n")
    assert max(map(cell_len, lines)) <= width, lines
    return [line.rstrip() for line in lines]


def write_metrics(folder, losses, bits=None):
    folder.mkdir()
    lines = [
        {"step": 10 * n + 10, "tokens_per_second": 12345.6, "loss": loss}
        for n, loss in enumerate(losses)
    ]
    if bits is not None:
        lines.append({"step": lines[-1]["step"], "validation_bits_per_byte": bits})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def table(tmp_path):
    """A run that goes on, one that diverged, one that has not begun, and one without any loss."""
    write_metrics(tmp_path / "good", [5 - 0.1 * n for n in range(30)], 1.4567)
    write_metrics(tmp_path / "bad", [4.0, 3.0, math.nan])
    (tmp_path / "bad" / "diverged.json").write_text('{"step": 30, "reason": "why"}')
    (tmp_path / "all bad").mkdir()
    (tmp_path / "all bad" / "metrics.jsonl").write_text('{"step": 10, "tokens_per_second": 9.0}\n')
    names = {"good": LONG, "bad": "gla, seed 0", "none": "rwkv7, seed 0", "all bad": "[b], seed 0"}
    return RunTable({name: (tmp_path / folder, 1000) for folder, name in names.items()})


def test_wide_terminal(table):
    head, good, bad, none, all_bad = drawn(table, 120)
    assert head.split() == ["run", "step", "tok/s", "loss", "val", "bits/B"]
    assert good.startswith(f"{LONG}  300/1,000  12,346     2.100       1.457  {BARS[-1]}")
    assert good.endswith(BARS[0])
    assert len(good.split()[-1]) == WIDTH
    assert bad.split() == [
        "gla,",
        "seed",
        "0",
        "30/1,000",
        "12,346",
        "diverged",
        BARS[-1] + BARS[0],
    ]
    assert none.split() == ["rwkv7,", "seed", "0", "0/1,000"]
    assert all_bad.split() == ["[b],", "seed", "0", "10/1,000", "9"]


@pytest.mark.parametrize("width", [60, 72, 80])
def test_narrow_terminal_keeps_the_numbers_and_shortens_the_course(table, width):
    lines = drawn(table, width)
    text = "\n".join(lines)
    for number in ("300/1,000", "12,346", "2.100", "1.457", "diverged"):
        assert number in text
    assert "…" not in text
    bars = max(sum(char in BARS for char in line) for line in lines)
    assert bars == {60: 0, 72: 0, 80: 80 - 26 - 9 - 6 - 8 - 10 - 2 * 5}[width]
    assert len(lines) == (5 if width > 60 else 6), "only a long name takes two lines"


def test_lines_where_there_is_no_terminal(table):
    assert table.line("rwkv7, seed 0") == "step 0/1,000"
    assert table.line("gla, seed 0") == f"step 30/1,000  {BARS[-1]}{BARS[0]}  diverged"
    line = table.line(LONG)
    assert line.startswith(f"step 300/1,000  {BARS[-1]}")
    assert line.endswith("  loss 2.100, validation 1.457 bits/byte")


def test_the_table_follows_the_files(table, tmp_path):
    assert "0/1,000" in drawn(table, 120)[3]
    write_metrics(tmp_path / "none", [3.25])
    assert drawn(table, 120)[3].split()[-3:] == ["12,346", "3.250", BARS[0]]


def test_sparkline():
    assert sparkline([]) == ""
    assert sparkline([3.0, 2.0, 1.0]) == "█▅▁"
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert sparkline([0, 0, 7, 7], width=2) == "▁█", "means of neighbours"
