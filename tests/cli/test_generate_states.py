"""A text that is left and goes on: saved states, line by line, and after an interrupt."""

import io
import signal
import subprocess
import sys

import pytest
import torch
from generation_helpers import SCRIPT, write_run
from model_helpers import ALL_MIXERS, assert_states_close, random_model, small_config

from data.tokenizers import byte_tokenizer
from model import state as states
from model.generation import prefill
from train import checkpoint
from train.generate import GenerateConfig, generate
from train.interrupt import Interrupted

# States.


PENALTY = {"repetition_penalty": 1.5, "seed": 5, "top_k": 50}


@pytest.mark.parametrize(
    ("mixer", "settings"),
    [
        ("rwkv7", {"temperature": 0}),
        ("rwkv7", {"seed": 4}),
        *((mixer, PENALTY) for mixer in ALL_MIXERS),
    ],
)
def test_a_loaded_text_goes_on_as_if_it_had_not_been_left(mixer, settings, tmp_path, text_of):
    model = random_model(small_config(mixer, vocab_size=257))
    folder, saved = write_run(tmp_path / mixer, model, byte_tokenizer()), tmp_path / "state"
    whole = text_of(folder, "Fellow", tokens=24, **settings)
    text = text_of(folder, "Fellow", tokens=8, save_state=saved, **settings)
    later = {name: value for name, value in settings.items() if name != "seed"}
    for last in (False, True):
        again = {} if last else {"save_state": saved}
        text += text_of(folder, tokens=8, load_state=saved, **again, **later)
    assert text == whole


def test_a_character_is_finished_by_the_text_that_goes_on(parrot_run, tmp_path, text_of):
    saved, texts, size = tmp_path / "state", [], len(SCRIPT.encode())
    before = {}
    for _ in range(size):
        texts.append(text_of(parrot_run, tokens=1, save_state=saved, **before))
        before = {"load_state": saved}
    assert texts == [
        c if last else "" for c in SCRIPT for last in [0] * (len(c.encode()) - 1) + [1]
    ]


def test_a_prompt_after_a_loaded_text_is_read_after_it(random_run, tmp_path, text_of):
    saved = tmp_path / "state"
    text_of(random_run, "one two", tokens=0, save_state=saved)
    expected = text_of(random_run, "one two three", tokens=12, temperature=0)
    found = text_of(random_run, " three", tokens=12, temperature=0, load_state=saved)
    assert "one two" + found == expected


def test_a_state_saved_from_python_needs_a_prompt(random_run, tmp_path, text_of):
    model, saved = checkpoint.load_checkpoint(random_run).model, tmp_path / "state"
    _, state = prefill(model, torch.tensor([list(b"one two")]))
    states.save(state, saved, model.fingerprint())
    expected = text_of(random_run, "one two three", tokens=12, temperature=0)
    found = text_of(random_run, " three", tokens=12, temperature=0, load_state=saved)
    assert "one two" + found == expected
    with pytest.raises(ValueError, match="give a --prompt"):
        text_of(random_run, load_state=saved)
    states.save(states.select_rows(state, [0, 0]), saved, model.fingerprint())
    with pytest.raises(ValueError, match="holds 2 texts"):
        text_of(random_run, load_state=saved)


def test_states_of_other_models_and_other_files_are_refused(
    random_run, parrot_run, tmp_path, text_of
):
    saved = tmp_path / "state"
    text_of(random_run, "a", tokens=1, save_state=saved)
    with pytest.raises(ValueError, match="another model"):
        text_of(parrot_run, load_state=saved)
    with pytest.raises(ValueError, match="not a saved state"):
        text_of(random_run, load_state=random_run / checkpoint.WEIGHTS)
    saved.write_bytes(saved.read_bytes()[:200])
    with pytest.raises(ValueError, match="cannot be read as a saved state"):
        text_of(random_run, load_state=saved)
    with pytest.raises(ValueError, match="cannot be read as a saved state"):
        text_of(random_run, load_state=tmp_path / "none")


# Line by line.


def test_interactive_goes_on_from_each_line(random_run, tmp_path, text_of, monkeypatch):
    first, second, third = (tmp_path / name for name in "123")
    settings = {"tokens": 6, "temperature": 0}
    texts = [
        text_of(random_run, "one", save_state=first, echo=False, **settings),
        text_of(random_run, load_state=first, save_state=second, **settings),
        text_of(random_run, " two", load_state=second, save_state=third, echo=False, **settings),
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\n two\n"))
    found = text_of(random_run, None, interactive=True, save_state=tmp_path / "4", **settings)
    model = checkpoint.load_checkpoint(random_run).model
    after = [
        states.load(path, model.initial_state(1), model.fingerprint())
        for path in (third, tmp_path / "4")
    ]
    assert_states_close(after[1], after[0], 0.0)
    assert found.count("\n") == 3 + "".join(texts).count("\n")
    assert found.startswith(texts[0])


def test_interactive_takes_a_prompt_first(parrot_run, text_of, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("🙂\n"))
    assert text_of(parrot_run, "é", tokens=3, interactive=True) == "é漢\nnav\n"


def test_an_interrupt_keeps_what_was_said(random_run, tmp_path, monkeypatch, text_of):
    class Interrupting(io.StringIO):
        def readline(self):
            line = super().readline()
            if not line:
                raise KeyboardInterrupt
            return line

    saved = tmp_path / "state"
    monkeypatch.setattr(sys, "stdin", Interrupting("one\n"))
    config = GenerateConfig(random_run, interactive=True, tokens=6, save_state=saved)
    with pytest.raises(Interrupted, match=r"--load-state .*state` goes on from here"):
        generate(config)
    whole = text_of(random_run, "one", tokens=12)
    assert whole.endswith(text_of(random_run, tokens=6, load_state=saved)[-1])
    monkeypatch.setattr(sys, "stdin", Interrupting(""))
    saved.unlink()
    with pytest.raises(Interrupted, match=r"Interrupted\.$"):
        generate(config)
    assert not saved.exists()


# Real processes.

ENDLESS = 20_000
"""Tokens that take far longer than the test, but not for ever if it fails."""


def start(*flags):
    command = [sys.executable, "-m", "train.cli", "generate", *map(str, flags)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)


def test_ctrl_c_saves_and_the_text_goes_on(parrot_run, tmp_path, text_of):
    saved = tmp_path / "state"
    flags = ["--prompt", "🙂", "--tokens", ENDLESS, "--temperature", 0, "--save-state", saved]
    process = start(parrot_run, *flags)
    first = process.stdout.read(40)  # arrives while the text is being made
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    rest, error = process.stdout.read(), process.stderr.read()
    assert process.wait(timeout=60) == 130
    for pipe in (process.stdin, process.stdout, process.stderr):
        pipe.close()
    assert error.decode() == f"ebb: Interrupted. `--load-state {saved}` goes on from here.\n"
    assert len(first + rest) < ENDLESS, "it did not stop before the end"
    text = (first + rest).decode()
    more = text_of(parrot_run, tokens=30, load_state=saved, temperature=0)
    expected = "🙂nave" + SCRIPT * (len(text) + 30)
    assert expected.startswith(text + more.rstrip("\ufffd"))


def test_a_reader_that_leaves_ends_it_quietly(parrot_run):
    process = start(parrot_run, "--tokens", ENDLESS)
    process.stdin.close()
    assert process.stdout.read(2).decode() == "é"
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == b""
    process.stderr.close()
