"""What the README says is true: its commands, its tables and its Python are run or compared."""

import re
import runpy
from pathlib import Path

import pytest
from runs import TINY, ebb, write_text

from model.config import SIZES
from model.layers import MIXERS
from model.presets import parse_mixer
from train.cli import COMMANDS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEMO = "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/ebb demo"
TEST = "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest"


def rows(first_cell: str) -> list[list[str]]:
    """The rows of the table whose heading begins with that cell, without marks."""
    table = README.split(f"| {first_cell} |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return [[cell.strip(" `") for cell in row.strip("|").split("|")] for row in table]


def test_the_two_commands_of_the_start_stand_there_and_ci_runs_the_second():
    assert DEMO in README
    assert TEST in README
    gate = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert " ".join(TEST.split()) in " ".join(gate.replace("pip install -q", "pip install").split())


def test_the_table_of_mixers_is_generated(capsys):
    assert ebb("info", "--markdown") == 0
    assert capsys.readouterr().out in README, "put the output of `ebb info --markdown` there"


def test_the_table_of_sizes_is_the_table_of_the_code():
    shown = {row[0]: [int(cell) for cell in row[1:]] for row in rows("`--size`")}
    assert shown == {name: [s.num_layers, s.d_model, s.head_dim] for name, s in SIZES.items()}


def test_every_command_and_mixer_that_it_shows_exists():
    used = re.findall(r"^ebb (\w+)|\.venv/bin/ebb (\w+)", README, re.MULTILINE)
    names = {first or second for first, second in used}
    assert names
    assert names <= set(COMMANDS)
    for mixers in re.findall(r"--mixers (\S+)", README):
        for name in mixers.split(","):
            parse_mixer(name)


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(block: str, folder: Path) -> dict[str, object]:
    script = folder / "snippet.py"
    script.write_text(block, encoding="utf-8")
    return runpy.run_path(str(script))


def test_its_python_runs_from_beginning_to_end(tmp_path, monkeypatch, capsys):
    block, _ = python_blocks()
    (folder,) = re.findall(r'Path\("([^"]+)"\)', block)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = write_text(tmp_path / "text.txt")
    assert ebb("train", "--data", text, *TINY, "--steps", "2", "--out", folder) == 0
    capsys.readouterr()
    run(block, tmp_path)
    said = capsys.readouterr().out
    assert "The state of" in said
    assert len(said.splitlines()) >= 4


def test_its_mixer_is_proven_trained_and_compared(tmp_path, monkeypatch, capsys):
    """One file and one row: the commands know it like any other."""
    _, block = python_blocks()
    assert len([line for line in block.splitlines() if line.strip()]) <= 40
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = dict(MIXERS)
    try:
        run(block, tmp_path)
        assert capsys.readouterr().out == "proven\n"
        text = write_text(tmp_path / "text.txt")
        flags = ["--data", text, *TINY, "--mixer", "leaky", "--steps", "2"]
        assert ebb("train", *flags, "--out", tmp_path / "run") == 0
        assert ebb("generate", tmp_path / "run", "--prompt", "the", "--tokens", "5") == 0
        assert ebb("info", tmp_path / "run") == 0
    finally:
        MIXERS.clear()
        MIXERS.update(before)


@pytest.mark.parametrize("link", re.findall(r"\]\(((?!http)[^)]+)\)", README))
def test_every_link_leads_somewhere(link):
    path, _, heading = link.partition("#")
    assert (ROOT / path).exists()
    if heading:
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
        titles = [line.lstrip("# ") for line in lines if line.startswith("#")]
        assert heading in ["-".join(re.findall(r"[\w-]+", t.lower())) for t in titles]
