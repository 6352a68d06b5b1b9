import io
import signal
import subprocess
import sys

import pytest
import torch
from model_helpers import ALL_MIXERS, assert_states_close, random_model, small_config

from data.tokenizers import byte_tokenizer, train_bpe
from model import state as states
from model.generation import Generation, Sampling, prefill
from model.ops import native
from train import checkpoint
from train.cli import main
from train.generate import GenerateConfig, generate
from train.interrupt import Interrupted
from train.session import StopFilter

SCRIPT = "é漢🙂nave"  # no byte comes twice


def write_run(folder, model, tokenizer):
    folder.mkdir()
    model = model.float()
    checkpoint.save_json(folder / checkpoint.CONFIG, {"model": model.config.to_dict(), "train": {}})
    checkpoint.save_weights(folder / checkpoint.WEIGHTS, model.state_dict())
    tokenizer.save(folder / checkpoint.TOKENIZER)
    return folder


def parrot(tokenizer, ids):
    """A model that says the ids in a circle, and begins it after any other token.

    Its blocks give nothing, so that the features tell the last token, and the head knows the next.
    """
    following = [ids[0]] * tokenizer.vocab_size
    for token, after in zip(ids, [*ids[1:], ids[0]], strict=True):
        following[token] = after
    assert len(set(ids)) == len(ids), "a token comes twice"
    config = small_config("rwkv7", vocab_size=tokenizer.vocab_size, d_model=320, num_layers=1)
    model = random_model(config)
    with torch.no_grad():
        model.blocks[0].time_mix.output.weight.zero_()
        model.blocks[0].channel_mix.value.weight.zero_()
        features, _ = model.features(torch.arange(tokenizer.vocab_size)[:, None])
        logits = 60 * torch.nn.functional.one_hot(torch.tensor(following), tokenizer.vocab_size)
        model.head.weight.copy_(torch.linalg.lstsq(features[:, 0], logits.double()).solution.T)
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A random model of bytes: what it says is mostly not even UTF-8."""
    config = small_config("rwkv7", vocab_size=257)
    folder = tmp_path_factory.mktemp("runs") / "random"
    return write_run(folder, random_model(config), byte_tokenizer())


@pytest.fixture(scope="module")
def parrot_run(tmp_path_factory):
    tokenizer = byte_tokenizer()
    model = parrot(tokenizer, list(SCRIPT.encode()))
    return write_run(tmp_path_factory.mktemp("runs") / "parrot", model, tokenizer)


@pytest.fixture
def text_of(capsys):
    """What `ebb generate` prints for these settings."""

    def text_of(folder, prompt="", **settings):
        capsys.readouterr()
        generate(GenerateConfig(folder, prompt=prompt, **settings))
        return capsys.readouterr().out

    return text_of


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
def test_a_stream_that_ends_within_a_character_is_that_of_all_tokens(run, text_of, count):
    tokenizer = byte_tokenizer()
    text = text_of(run, prompt="é", tokens=count, seed=count)
    loaded = checkpoint.load_checkpoint(run)
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


def test_prompt_comes_from_standard_input_less_its_last_newline(run, text_of, monkeypatch):
    expected = text_of(run, "one\ntwo\n", tokens=5)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n\n"))
    assert text_of(run, None, tokens=5) == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert text_of(run, None, tokens=5) == text_of(run, "", tokens=5)


def test_without_echo_only_new_text_is_printed(run, text_of):
    whole = text_of(run, "Hello", tokens=9)
    assert whole == "Hello" + text_of(run, "Hello", tokens=9, echo=False)


def test_a_long_prompt_is_read(run, text_of, capsys):
    generate(GenerateConfig(run, prompt="long " * 4_000, tokens=1, echo=False, stats=True))
    assert "prompt: 20,000 tokens in" in capsys.readouterr().err


def test_the_settings_of_the_draw_arrive(run, text_of):
    plain = text_of(run, "a", tokens=16)
    assert plain == text_of(run, "a", tokens=16, seed=0)
    changes = [
        {"seed": 1},
        {"temperature": 2.0},
        {"top_k": 2},
        {"top_p": 0.2},
        {"min_p": 0.9},
        {"repetition_penalty": 3.0},
    ]
    texts = [text_of(run, "a", tokens=16, **change) for change in changes]
    assert plain not in texts
    assert text_of(run, "a", tokens=16, top_k=1) == text_of(run, "a", tokens=16, temperature=0)


@pytest.mark.skipif(not native.is_available(), reason=native.status())
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


def test_weights_that_need_compiled_kernels_are_refused_without(run, monkeypatch, capsys):
    monkeypatch.setattr(native, "is_available", lambda: False)
    monkeypatch.setattr(native, "status", lambda: "no compiled kernels")
    assert main(["generate", str(run), "--prompt", "a", "--tokens", "1"]) == 0
    assert main(["generate", str(run), "--prompt", "a", "--weights", "int8"]) == 1
    assert "there is no native step: no compiled kernels" in capsys.readouterr().err


def test_best_weights_are_read(tmp_path, text_of):
    tokenizer = byte_tokenizer()
    folder = write_run(tmp_path / "run", parrot(tokenizer, list(b"xyz")), tokenizer)
    best = parrot(tokenizer, list(b"123"))
    checkpoint.save_weights(folder / checkpoint.BEST, best.state_dict())
    assert text_of(folder, tokens=4, temperature=0) == "xyzx"
    assert text_of(folder, tokens=4, temperature=0, best=True) == "1231"


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


def test_a_prompt_after_a_loaded_text_is_read_after_it(run, tmp_path, text_of):
    saved = tmp_path / "state"
    text_of(run, "one two", tokens=0, save_state=saved)
    expected = text_of(run, "one two three", tokens=12, temperature=0)
    found = text_of(run, " three", tokens=12, temperature=0, load_state=saved)
    assert "one two" + found == expected


def test_a_state_saved_from_python_needs_a_prompt(run, tmp_path, text_of):
    model, saved = checkpoint.load_checkpoint(run).model, tmp_path / "state"
    _, state = prefill(model, torch.tensor([list(b"one two")]))
    states.save(state, saved, model.fingerprint())
    expected = text_of(run, "one two three", tokens=12, temperature=0)
    found = text_of(run, " three", tokens=12, temperature=0, load_state=saved)
    assert "one two" + found == expected
    with pytest.raises(ValueError, match="give a --prompt"):
        text_of(run, load_state=saved)
    states.save(states.select_rows(state, [0, 0]), saved, model.fingerprint())
    with pytest.raises(ValueError, match="holds 2 texts"):
        text_of(run, load_state=saved)


def test_states_of_other_models_and_other_files_are_refused(run, parrot_run, tmp_path, text_of):
    saved = tmp_path / "state"
    text_of(run, "a", tokens=1, save_state=saved)
    with pytest.raises(ValueError, match="another model"):
        text_of(parrot_run, load_state=saved)
    with pytest.raises(ValueError, match="not a saved state"):
        text_of(run, load_state=run / checkpoint.WEIGHTS)
    saved.write_bytes(saved.read_bytes()[:200])
    with pytest.raises(ValueError, match="cannot be read as a saved state"):
        text_of(run, load_state=saved)
    with pytest.raises(ValueError, match="cannot be read as a saved state"):
        text_of(run, load_state=tmp_path / "none")


# Line by line.


def test_interactive_goes_on_from_each_line(run, tmp_path, text_of, monkeypatch):
    first, second, third = (tmp_path / name for name in "123")
    settings = {"tokens": 6, "temperature": 0}
    texts = [
        text_of(run, "one", save_state=first, echo=False, **settings),
        text_of(run, load_state=first, save_state=second, **settings),
        text_of(run, " two", load_state=second, save_state=third, echo=False, **settings),
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\n two\n"))
    found = text_of(run, None, interactive=True, save_state=tmp_path / "4", **settings)
    model = checkpoint.load_checkpoint(run).model
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


def test_an_interrupt_keeps_what_was_said(run, tmp_path, monkeypatch, text_of):
    class Interrupting(io.StringIO):
        def readline(self):
            line = super().readline()
            if not line:
                raise KeyboardInterrupt
            return line

    saved = tmp_path / "state"
    monkeypatch.setattr(sys, "stdin", Interrupting("one\n"))
    config = GenerateConfig(run, interactive=True, tokens=6, save_state=saved)
    with pytest.raises(Interrupted, match=r"--load-state .*state` goes on from here"):
        generate(config)
    whole = text_of(run, "one", tokens=12)
    assert whole.endswith(text_of(run, tokens=6, load_state=saved)[-1])
    monkeypatch.setattr(sys, "stdin", Interrupting(""))
    saved.unlink()
    with pytest.raises(Interrupted, match=r"Interrupted\.$"):
        generate(config)
    assert not saved.exists()


# What is said beside the text.


def test_stats_go_to_standard_error(run, capsys):
    generate(GenerateConfig(run, prompt="Hello", tokens=7, stats=True))
    prompt, generated, state = capsys.readouterr().err.splitlines()
    assert prompt.startswith("prompt: 5 tokens in ")
    assert prompt.endswith(" tokens/s")
    assert generated.startswith("generated: 7 tokens in ")
    assert generated.endswith(" ms a token")
    size = states.num_bytes(checkpoint.load_checkpoint(run).model.initial_state(1))
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
def test_wrong_usage_is_told_in_one_sentence(run, capsys, flags, message):
    assert main(["generate", str(run), "--prompt", "a", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_what_is_not_a_checkpoint_is_told_in_one_sentence(run, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in run.iterdir():
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


def test_standard_input_that_is_not_text_is_told_in_one_sentence(run, monkeypatch, capsys):
    for flags in ([], ["--interactive"]):
        text = io.TextIOWrapper(io.BytesIO(b"caf\xe9 au lait"), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", text)
        assert main(["generate", str(run), *flags]) == 1
        assert "standard input is not utf-8 text" in capsys.readouterr().err


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
