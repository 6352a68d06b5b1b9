"""Text as `ebb generate` makes it: what is printed, when, and where it ends."""

import io
import sys

import pytest
import torch
from generation_helpers import SCRIPT, parrot, write_run
from marks import needs_kernels
from model_helpers import assert_states_close

from data.tokenizers import byte_tokenizer, train_bpe
from model import state as states
from model.generation import Generation, prefill
from model.ops import native
from model.sampling import Sampling
from train import checkpoint
from train.cli import main
from train.generate import GenerateConfig, generate
from train.session import StopFilter


class Recorder(io.StringIO):
    """Standard output that remembers every single write."""

    def __init__(self):
        super().__init__()
        self.writes = []
        self.flushed = 0

    def write(self, text):
        self.writes.append(text)
        return super().write(text)

    def flush(self):
        if len(self.writes) > self.flushed + 1:
            raise AssertionError("two pieces of text came at once")
        self.flushed = len(self.writes)


@pytest.fixture
def writes_of(monkeypatch):
    """The single writes to standard output for these settings."""

    def writes_of(folder, **settings):
        recorder = Recorder()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", recorder)
            generate(GenerateConfig(folder, **settings))
        assert recorder.flushed == len(recorder.writes), "something stayed in the buffer"
        return recorder.writes

    return writes_of


# Text as it is made.


def test_characters_of_many_bytes_arrive_whole_and_one_by_one(parrot_run, writes_of):
    count = len((SCRIPT * 3).encode())
    writes = writes_of(parrot_run, prompt="🙂", tokens=count)
    assert writes == ["🙂", *"nave", *SCRIPT, *SCRIPT, *"é漢🙂"]


def test_pieces_of_a_bpe_arrive_as_they_come(tmp_path, writes_of):
    tokenizer = train_bpe(["the café serves 漢字 and 🙂, the café"], 268)
    ids = tokenizer.encode(" the café 漢字🙂")
    assert len(ids) < len(" the café 漢字🙂".encode()), "no pair was merged"
    ids = list(dict.fromkeys(ids))
    folder = write_run(tmp_path / "bpe", parrot(tokenizer, ids), tokenizer)
    writes = writes_of(folder, prompt="", tokens=3 * len(ids))
    assert "".join(writes) == tokenizer.decode(ids * 3)
    assert not any("\ufffd" in text for text in writes)
    pieces = [text for i in ids if (text := tokenizer.decode([i])) and "\ufffd" not in text]
    assert max(map(len, pieces)) > 1
    assert set(pieces) | set("漢字🙂") >= set(writes)


@pytest.mark.parametrize("count", range(1, 12))
def test_a_stream_that_ends_within_a_character_is_that_of_all_tokens(random_run, text_of, count):
    tokenizer = byte_tokenizer()
    text = text_of(random_run, prompt="é", tokens=count, seed=count)
    loaded = checkpoint.load_checkpoint(random_run)
    logits, state = prefill(loaded.model, torch.tensor([tokenizer.encode("é")]))
    drawn = Generation(
        loaded.model,
        logits,
        state,
        max_tokens=count,
        sampling=Sampling(temperature=0.8),
        generators=[torch.Generator().manual_seed(count)],
        stop_ids=(256,),
    )
    assert text == "é" + tokenizer.decode([token for (token,) in drawn])


def test_a_character_that_the_terminal_lacks_does_not_end_the_text(parrot_run, monkeypatch):
    raw = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1"))
        generate(GenerateConfig(parrot_run, prompt="n", tokens=13))
        assert raw.getvalue().decode("latin-1") == "naveé??n"


# Where the text ends.


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (("漢",), "é"),
        (("nav",), "é漢🙂"),
        (("🙂nowhere", "vex"), SCRIPT * 2),
        (("ve漢", "veé漢🙂n"), "é漢🙂na"),
        (("🙂na", "漢"), "é"),
        (("é",), ""),
    ],
)
def test_stop_strings_end_the_text_and_are_not_printed(parrot_run, text_of, stop, text):
    assert text_of(parrot_run, tokens=2 * len(SCRIPT.encode()), stop=stop) == text


def test_text_is_held_back_only_while_it_can_become_a_stop_string():
    stops = StopFilter(["abab!", "xyz"])
    shown = [stops.push(piece) for piece in ["1a", "b", "a", "c", "x", "y", "ab", "ab", "ab", "!2"]]
    assert shown == ["1", "", "", "abac", "", "", "xy", "", "ab", ""]
    assert stops.stopped
    assert stops.finish() == ""
    unfinished = StopFilter(["stop"])
    assert [unfinished.push("a sto"), unfinished.finish()] == ["a ", "sto"]
    assert not unfinished.stopped


def test_the_end_of_a_document_ends_the_text_and_the_next_begins_afresh(tmp_path, text_of):
    tokenizer = byte_tokenizer()
    model = parrot(tokenizer, [*b"abc", tokenizer.end_id])
    folder, saved = write_run(tmp_path / "short", model, tokenizer), tmp_path / "state"
    assert text_of(folder, "b", tokens=50, save_state=saved) == "bc"
    assert text_of(folder, tokens=50, load_state=saved, save_state=saved) == "abc"
    gone_on = tmp_path / "gone_on"
    text_of(folder, "xyz", tokens=0, load_state=saved, save_state=gone_on)
    loaded = checkpoint.load_checkpoint(folder).model
    # As in training: the end token is all that the next document sees of what came before.
    _, first = prefill(loaded, torch.tensor([[tokenizer.end_id]]), loaded.initial_state(1))
    _, first = prefill(loaded, torch.tensor([[*b"xyz"]]), first)
    second = states.load(gone_on, loaded.initial_state(1), loaded.fingerprint())
    assert_states_close(second, first, 0.0)


# Prompts.


def test_prompt_comes_from_standard_input_less_its_last_newline(random_run, text_of, monkeypatch):
    expected = text_of(random_run, "one\ntwo\n", tokens=5)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n\n"))
    assert text_of(random_run, None, tokens=5) == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert text_of(random_run, None, tokens=5) == text_of(random_run, "", tokens=5)


def test_without_echo_only_new_text_is_printed(random_run, text_of):
    whole = text_of(random_run, "Hello", tokens=9)
    assert whole == "Hello" + text_of(random_run, "Hello", tokens=9, echo=False)


def test_a_long_prompt_is_read(random_run, text_of, capsys):
    generate(GenerateConfig(random_run, prompt="long " * 4_000, tokens=1, echo=False, stats=True))
    assert "prompt: 20,000 tokens in" in capsys.readouterr().err


def test_the_settings_of_the_draw_arrive(random_run, text_of):
    plain = text_of(random_run, "a", tokens=16)
    assert plain == text_of(random_run, "a", tokens=16, seed=0)
    changes = [
        {"seed": 1},
        {"temperature": 2.0},
        {"top_k": 2},
        {"top_p": 0.2},
        {"min_p": 0.9},
        {"repetition_penalty": 3.0},
    ]
    texts = [text_of(random_run, "a", tokens=16, **change) for change in changes]
    assert plain not in texts
    assert text_of(random_run, "a", tokens=16, top_k=1) == text_of(
        random_run, "a", tokens=16, temperature=0
    )


@needs_kernels
@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8", "int4"])
def test_weights_of_fewer_bits_write_and_save(weights, parrot_run, tmp_path, text_of):
    """The parrot is so sure of itself that rounding does not change what it says."""
    start, path = SCRIPT[:2], tmp_path / "state"
    expected = text_of(parrot_run, start, tokens=20, temperature=0)
    settings = {"temperature": 0, "weights": weights}
    assert text_of(parrot_run, start, tokens=20, **settings) == expected
    first = text_of(parrot_run, start, tokens=4, save_state=path, **settings)
    second = text_of(parrot_run, "", tokens=16, load_state=path, **settings)
    assert first + second == expected


def test_weights_that_need_compiled_kernels_are_refused_without(random_run, monkeypatch, capsys):
    monkeypatch.setattr(native, "is_available", lambda: False)
    monkeypatch.setattr(native, "status", lambda: "no compiled kernels")
    assert main(["generate", str(random_run), "--prompt", "a", "--tokens", "1"]) == 0
    assert main(["generate", str(random_run), "--prompt", "a", "--weights", "int8"]) == 1
    assert "there is no native step: no compiled kernels" in capsys.readouterr().err


def test_best_weights_are_read(tmp_path, text_of):
    tokenizer = byte_tokenizer()
    folder = write_run(tmp_path / "run", parrot(tokenizer, list(b"xyz")), tokenizer)
    best = parrot(tokenizer, list(b"123"))
    checkpoint.save_weights(folder / checkpoint.BEST, best.state_dict())
    assert text_of(folder, tokens=4, temperature=0) == "xyzx"
    assert text_of(folder, tokens=4, temperature=0, best=True) == "1231"


# What is said beside the text.


def test_stats_go_to_standard_error(random_run, capsys):
    generate(GenerateConfig(random_run, prompt="Hello", tokens=7, stats=True))
    prompt, generated, state = capsys.readouterr().err.splitlines()
    assert prompt.startswith("prompt: 5 tokens in ")
    assert prompt.endswith(" tokens/s")
    assert generated.startswith("generated: 7 tokens in ")
    assert generated.endswith(" ms a token")
    size = states.num_bytes(checkpoint.load_checkpoint(random_run).model.initial_state(1))
    assert state == f"state: {size:,} bytes"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokens", "-1"], "tokens must be at least 0"),
        (["--threads", "0"], "threads must be at least 1"),
        (["--seed", "-1"], "seed must be between"),
        (["--stop", ""], "stop must not be empty"),
        (["--top-p", "2"], "top_p must be above 0"),
        (["--temperature", "0", "--top-k", "4"], "top_k has no effect"),
        (["--save-state", "nowhere/state"], "there is no folder nowhere"),
    ],
)
def test_wrong_usage_is_told_in_one_sentence(random_run, capsys, flags, message):
    assert main(["generate", str(random_run), "--prompt", "a", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_what_is_not_a_checkpoint_is_told_in_one_sentence(random_run, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in random_run.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / checkpoint.WEIGHTS).write_bytes(b"\x08" + bytes(20))
    for folder, message in [
        (tmp_path / "none", "There is no"),
        (tmp_path, "is not a checkpoint"),
        (broken, "damaged or incomplete"),
    ]:
        assert main(["generate", str(folder), "--prompt", "a"]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_standard_input_that_is_not_text_is_told_in_one_sentence(random_run, monkeypatch, capsys):
    for flags in ([], ["--interactive"]):
        text = io.TextIOWrapper(io.BytesIO(b"caf\xe9 au lait"), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", text)
        assert main(["generate", str(random_run), *flags]) == 1
        assert "standard input is not utf-8 text" in capsys.readouterr().err
