"""Input that cannot be used: one sentence, exit status 1, and nothing is damaged."""

import json
import shutil

import pytest
from runs import TINY, contents, ebb, only_line, workplace


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A text and a model trained on it."""
    with workplace(tmp_path_factory.mktemp("errors")) as folder:
        flags = [
            "--data",
            folder / "text.txt",
            *TINY,
            "--mixer",
            "attention",
            "--sample-every",
            "0",
        ]
        assert ebb("train", *flags, "--steps", "2", "--out", folder / "run") == 0
        yield folder


@pytest.fixture
def run(shop, tmp_path):
    """A copy of the run, to be damaged."""
    return shutil.copytree(shop / "run", tmp_path / "run")


def said_by(capsys, *args):
    assert ebb(*args) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    return only_line(shown.err)


def texts(folder):
    """Names of texts that cannot be used, and what is said of each."""
    (folder / "empty.txt").write_bytes(b"")
    (folder / "binary.txt").write_bytes(bytes(range(256)) * 40)
    (folder / "nul.txt").write_bytes(b"text\0text" * 100)
    (folder / "short.txt").write_text("too short for it")
    (folder / "rows.jsonl").write_text('{"body": "some text"}\n' * 30)
    (folder / "broken.jsonl").write_text('{"text": "some text"}\n{"text": \n')
    (folder / "no files").mkdir()
    return {
        "empty.txt": "is empty: give a file with text in it.",
        "binary.txt": "is not UTF-8 text (byte 128): convert it to UTF-8",
        "nul.txt": "is a binary file (it holds NUL bytes): give text in UTF-8",
        "short.txt": "fewer than one context of 16 and the token after it: give a longer text",
        "rows.jsonl": "text",
        "broken.jsonl": "broken.jsonl",
        "no files": "no files",
        "missing.txt": "There is no file or folder ",
    }


def test_text_that_cannot_be_used(shop, tmp_path, capsys):
    for name, expected in texts(tmp_path).items():
        flags = ["--data", tmp_path / name, *TINY, "--steps", "2", "--out", tmp_path / "out"]
        assert expected in said_by(capsys, "train", *flags), name
        assert list(contents(tmp_path / "out")) == [], f"{name} left something behind"
    flags = ["--data", shop / "text.txt", *TINY, "--steps", "2", "--out", tmp_path / "out"]
    assert ebb("train", *flags) == 0, "the folder cannot be used any more"


def test_text_for_eval_that_cannot_be_used(shop, tmp_path, capsys):
    for name, expected in texts(tmp_path).items():
        if name != "short.txt":
            said = said_by(capsys, "eval", shop / "run", "--data", tmp_path / name)
            assert expected in said, name


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tokenizer", "missing.json"], "missing.json"),
        (["--tokenizer", "bytes", "--vocab-size", "300"], "vocabulary"),
        (["--column", "body"], "column"),
        (["--context", "100000"], "fewer than one context of 100000"),
        (["--context", "1000"], "The validation text has"),
    ],
)
def test_settings_that_do_not_fit_the_text(shop, tmp_path, capsys, flags, said):
    common = ["--data", shop / "text.txt", *TINY, "--steps", "2", "--out", tmp_path / "out"]
    assert said in said_by(capsys, "train", *common, *flags)
    assert list(contents(tmp_path / "out")) == []


COMMANDS = ["eval", "info", "generate"]


@pytest.mark.parametrize("command", COMMANDS)
def test_path_that_is_no_checkpoint(shop, tmp_path, capsys, command):
    assert said_by(capsys, command, tmp_path / "nothing") == (
        f"There is no {tmp_path / 'nothing'}: name the folder of a run, such as checkpoints/NAME."
    )
    expected = "{} is not a checkpoint: it holds no config.json. `ebb train` makes one."
    assert said_by(capsys, command, tmp_path) == expected.format(tmp_path)
    text = shop / "text.txt"
    assert said_by(capsys, command, text) == expected.format(text)
    for content in ('{"vocab_size": 3}', "[]", '{"model": 1, "train": 2}'):
        (tmp_path / "config.json").write_text(content)
        said = said_by(capsys, command, tmp_path)
        assert said.startswith(f"{tmp_path / 'config.json'} does not describe a run of ebb")
    (tmp_path / "config.json").write_text('{"model": ')
    assert said_by(capsys, command, tmp_path).startswith(f"{tmp_path / 'config.json'} is damaged")


def resize(path, size):
    with path.open("r+b") as file:
        file.truncate(size)


@pytest.mark.parametrize("command", COMMANDS)
def test_weights_that_are_not_whole(run, capsys, command):
    weights = run / "model.safetensors"
    for size in (weights.stat().st_size - 1, 100_000, 20, 0):
        resize(weights, size)
        said = said_by(capsys, command, run)
        assert said.startswith(f"{weights} cannot be read as safetensors (")
        assert said.endswith("): it is damaged or incomplete.")
    weights.unlink()
    said = said_by(capsys, command, run)
    assert said == f"There is no {weights}: the run has not saved any weights yet."


@pytest.mark.parametrize("command", COMMANDS)
def test_vocabulary_of_another_model(run, capsys, command):
    path = run / "tokenizer.json"
    definition = json.loads(path.read_text())
    definition["added_tokens"].append(
        dict(definition["added_tokens"][-1], id=300, content="<|more|>")
    )
    path.write_text(json.dumps(definition))
    assert said_by(capsys, command, run) == (
        f"The tokenizer in {run} has 258 tokens, but the model 257: put back the tokenizer.json "
        "that it was trained with."
    )


def test_tokenizer_that_is_missing_or_not_whole(run, capsys):
    path = run / "tokenizer.json"
    resize(path, 500)
    assert str(path) in said_by(capsys, "eval", run)
    path.unlink()
    assert str(path) in said_by(capsys, "eval", run)


def test_weights_of_another_shape(run, capsys):
    path = run / "config.json"
    config = json.loads(path.read_text())
    config["model"]["d_model"] = 64
    path.write_text(json.dumps(config))
    said = said_by(capsys, "info", run)
    assert said.startswith(f"{run / 'model.safetensors'} does not fit config.json")


@pytest.mark.parametrize(
    ("name", "value"), [("mixer", "mamba9"), ("colour", "red"), ("num_layers", 0), ("d_model", "x")]
)
def test_model_that_cannot_be_built(run, capsys, name, value):
    path = run / "config.json"
    config = json.loads(path.read_text())
    config["model"][name] = value
    path.write_text(json.dumps(config))
    said = said_by(capsys, "info", run)
    assert said.startswith(f"{path} does not describe a model: ")
    assert str(value if name == "mixer" else name) in said


def test_resume_with_settings_of_a_later_version(run, capsys):
    path = run / "config.json"
    config = json.loads(path.read_text())
    config["train"]["colour"] = "red"
    path.write_text(json.dumps(config))
    assert ebb("train", "--resume", "--out", run) == 2
    said = only_line(capsys.readouterr().err)
    assert said == (
        f"{run} was made by another version of Ebb, with settings that this one does not take "
        "(there is no colour): go on with that version, or choose another --out."
    )
