"""`ebb convert`: official checkpoints in and out, and one sentence for what cannot be used."""

import json
import os
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import rwkv
import torch
from model_helpers import random_model, small_config
from official import TITLES, official_weights, same_tensors
from runs import contents, ebb, largest_file, only_line, write_text
from safetensors.torch import load_file, save_file

from data.tokenizers import byte_tokenizer
from train import checkpoint
from train.session import Session

VOCAB = 260
"""Three more than the byte tokenizer has."""


def write_official(path, version="rwkv7", dtype=torch.bfloat16, **sizes):
    weights = official_weights(version, dtype, **{"vocab": VOCAB, **sizes})
    save_file(weights, path) if path.suffix == ".safetensors" else torch.save(weights, path)
    return path


def read_official(path):
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, weights_only=True)


@pytest.fixture
def said(capsys):
    """The sentence in which a command is refused."""

    def said(*args, status=1):
        capsys.readouterr()
        assert ebb(*args) == status
        shown = capsys.readouterr()
        assert shown.out == ""
        return only_line(shown.err)

    return said


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A run that was imported with a tokenizer; not to be changed."""
    folder = tmp_path_factory.mktemp("convert")
    source = write_official(folder / "World-0.1B.pth")
    assert ebb("convert", source, folder / "run", "--tokenizer", "bytes") == 0
    return folder / "run"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("version", TITLES)
def test_there_and_back_keeps_every_bit(version, dtype, tmp_path, capsys):
    source = write_official(tmp_path / "a.pth", version, dtype)
    assert ebb("convert", source, tmp_path / "run") == 0
    shown = capsys.readouterr()
    name = str(dtype).removeprefix("torch.")
    assert f"run: {TITLES[version]}, 3 layers, width 24, 260 tokens, " in shown.out
    assert f" parameters in {name}\n" in shown.out
    assert "no tokenizer yet: convert again with --tokenizer, or put a tok" in shown.out
    assert shown.err == ""
    assert {x.dtype for x in load_file(tmp_path / "run/model.safetensors").values()} == {dtype}
    for name in ("b.pth", "b.safetensors"):
        assert ebb("convert", tmp_path / "run", tmp_path / name) == 0
        assert same_tensors(read_official(tmp_path / name), read_official(source))
    assert ebb("convert", tmp_path / "b.safetensors", tmp_path / "again") == 0
    first, second = (contents(tmp_path / run) for run in ("run", "again"))
    assert first.keys() == second.keys() == {"config.json", "model.safetensors"}
    assert first["model.safetensors"] == second["model.safetensors"]
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_folder_says_where_it_comes_from(imported):
    config = json.loads((imported / "config.json").read_text())
    assert config["train"] == {"imported": "RWKV-7", "file": "World-0.1B.pth"}
    assert config["model"]["vocab_size"] == VOCAB
    assert "tmp" not in (imported / "config.json").read_text()
    assert {*contents(imported)} == {"config.json", "model.safetensors", "tokenizer.json"}


def test_older_and_other_kinds_of_file(tmp_path):
    weights = official_weights("rwkv4")
    torch.save(weights, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    torch.save({n: torch.nn.Parameter(x) for n, x in weights.items()}, tmp_path / "b.bin")
    base = torch.cat([x.flatten() for x in weights.values()])
    pieces = base.split([x.numel() for x in weights.values()])
    parts = {n: piece.view_as(weights[n]) for n, piece in zip(weights, pieces, strict=True)}
    torch.save(parts, tmp_path / "c.pth")
    for name in ("a.pt", "b.bin", "c.pth"):
        assert ebb("convert", tmp_path / name, tmp_path / name[0]) == 0
        assert ebb("convert", tmp_path / name[0], tmp_path / f"{name}.pth") == 0
        assert same_tensors(read_official(tmp_path / f"{name}.pth"), weights)


def test_tied_weights_are_written_twice(tmp_path):
    weights = official_weights("rwkv6")
    weights["head.weight"] = weights["emb.weight"]
    torch.save(weights, tmp_path / "a.pth")
    assert ebb("convert", tmp_path / "a.pth", tmp_path / "run") == 0
    assert ebb("convert", tmp_path / "run", tmp_path / "b.pth") == 0
    assert same_tensors(read_official(tmp_path / "b.pth"), weights)


def test_a_run_that_was_trained_here(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = write_text(tmp_path / "text.txt")
    flags = ["--size", "nano", "--tokenizer", "bytes", "--context", "8", "--steps", "1"]
    run = tmp_path / "run"
    assert ebb("train", "--data", text, *flags, "--sample-every", "0", "--out", run) == 0
    assert ebb("convert", run, tmp_path / "a.pth") == 0
    official = read_official(tmp_path / "a.pth")
    assert not official["blocks.0.att.v1"].any()
    assert ebb("convert", tmp_path / "a.pth", tmp_path / "back", "--tokenizer", run) == 0
    before, after = (checkpoint.load_checkpoint(f) for f in (run, tmp_path / "back"))
    tokens = torch.arange(40)[None]
    assert torch.equal(before.model(tokens).logits, after.model(tokens).logits)
    assert before.tokenizer.fingerprint == after.tokenizer.fingerprint


@pytest.mark.parametrize("version", TITLES)
def test_an_imported_run_writes_and_is_evaluated(version, tmp_path, capsys):
    source = write_official(tmp_path / "a.pth", version)
    run, text = tmp_path / "run", write_text(tmp_path / "text.txt")
    assert ebb("convert", source, run, "--tokenizer", "bytes") == 0
    capsys.readouterr()
    assert ebb("generate", run, "--prompt", "the", "--tokens", "5") == 0
    assert capsys.readouterr().out.startswith("the")
    assert ebb("eval", run, "--data", text, "--split", "all", "--json") == 0
    assert 0 < json.loads(capsys.readouterr().out)["loss"] < 20
    assert ebb("info", run, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["training"] == {"imported": TITLES[version], "file": "a.pth"}
    assert report["model"]["vocab_size"] == VOCAB


def test_the_world_vocabulary(tmp_path, capsys):
    """Its tokenizer comes with the padding that the official models have."""
    source = write_official(tmp_path / "a.pth", "rwkv6", vocab=65_536, layers=1)
    vocabulary = Path(rwkv.__file__).with_name("rwkv_vocab_v20230424.txt")
    assert ebb("convert", source, tmp_path / "run", "--tokenizer", vocabulary) == 0
    loaded = checkpoint.load_checkpoint(tmp_path / "run")
    assert loaded.tokenizer.vocab_size == loaded.model.config.vocab_size == 65_536
    assert loaded.tokenizer.end_id == 0
    capsys.readouterr()
    assert ebb("generate", tmp_path / "run", "--prompt", "世界", "--tokens", "3") == 0
    assert capsys.readouterr().out.startswith("世界")


def test_weights_are_computed_with_in_single_precision(imported):
    model = checkpoint.load_checkpoint(imported).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    head = read_official(imported / "model.safetensors")["head.weight"]
    assert torch.equal(model.head.weight, head.float())


@pytest.mark.parametrize("temperature", ["0", "100"])
def test_no_token_is_drawn_that_the_tokenizer_does_not_have(imported, tmp_path, temperature):
    """The model's padding, which here is far likelier than anything else."""
    run = shutil.copytree(imported, tmp_path / "run")
    weights = load_file(run / "model.safetensors")
    weights["norm.weight"].zero_()
    weights["norm.bias"].fill_(1.0)
    weights["head.weight"][:257] = 0.0
    weights["head.weight"][256] = -1000.0  # no end
    weights["head.weight"][257:] = 1000.0
    save_file(weights, run / "model.safetensors")
    flags = ["--temperature", temperature, "--tokens", "300", "--repetition-penalty", "1.2"]
    state = tmp_path / "state"
    assert ebb("generate", run, "--prompt", "a", *flags, "--save-state", state) == 0
    assert ebb("generate", run, "--load-state", state, "--prompt", "", *flags) == 0


def test_without_a_tokenizer_it_can_be_looked_at_only(tmp_path, said, capsys):
    run = tmp_path / "run"
    assert ebb("convert", write_official(tmp_path / "a.pth"), run) == 0
    for args in (["generate", run, "--prompt", "a"], ["eval", run, "--data", "sotu"]):
        assert said(*args) == (
            f"{run} has no tokenizer: convert again with --tokenizer, or put a tokenizer.json into "
            "the folder."
        )
    assert ebb("info", run, "--json") == 0
    assert json.loads(capsys.readouterr().out)["model"]["mixer"] == "rwkv7"
    checkpoint.load_model(run)


def test_a_tokenizer_with_more_tokens_is_refused(tmp_path, said):
    source = write_official(tmp_path / "a.pth", vocab=256)
    sentence = said("convert", source, tmp_path / "run", "--tokenizer", "bytes")
    assert sentence.startswith("The tokenizer bytes has 257 tokens, but the model only 256: give")
    assert not (tmp_path / "run").exists()
    assert ebb("convert", source, tmp_path / "run") == 0
    byte_tokenizer().save(tmp_path / "run" / "tokenizer.json")
    assert "has 257 tokens, but the model 256: " in said("generate", tmp_path / "run")


def test_a_model_of_ours_still_needs_exactly_its_tokenizer(tmp_path, said):
    model = random_model(small_config("rwkv7", vocab_size=VOCAB), dtype=torch.float32)
    run = tmp_path / "run"
    run.mkdir()
    checkpoint.save_json(run / "config.json", {"model": model.config.to_dict(), "train": {}})
    checkpoint.save_weights(run / "model.safetensors", model.state_dict())
    byte_tokenizer().save(run / "tokenizer.json")
    assert "has 257 tokens, but the model 260: " in said("generate", run, "--prompt", "a")


def test_there_is_nothing_to_resume(imported, tmp_path, said):
    run = shutil.copytree(imported, tmp_path / "run")
    before = contents(run)
    for flags in (["--resume"], [], ["--resume", "--steps", "3"]):
        sentence = said("train", *flags, "--out", run)
        assert sentence.startswith(f"{run} holds an imported checkpoint, which has no state of tra")
    assert contents(run) == before


def test_the_eps_of_the_norm_goes_into_the_configuration(tmp_path, said):
    source = write_official(tmp_path / "a.pth", "rwkv5")
    assert ebb("convert", source, tmp_path / "run", "--group-norm-eps", "1e-5") == 0
    assert checkpoint.read_config(tmp_path / "run")["model"]["options"]["group_norm_eps"] == 1e-5
    for wrong in ("0", "-1", "nan", "inf"):
        sentence = said("convert", source, "x", "--group-norm-eps", wrong, status=2)
        assert sentence.startswith("group-norm-eps must be above 0, but is ")
    source = write_official(tmp_path / "b.pth", "rwkv4")
    sentence = said("convert", source, tmp_path / "x", "--group-norm-eps", "1e-5")
    assert sentence.endswith("RWKV-4 has no norm over heads: leave group-norm-eps out.")


def test_nothing_is_overwritten(imported, tmp_path, said):
    source = write_official(tmp_path / "a.pth")
    full = shutil.copytree(imported, tmp_path / "full")
    (tmp_path / "file").write_text("text")
    before = contents(tmp_path)
    for args in ([source, full], [source, tmp_path / "file"], [full, source], [full, full]):
        assert said("convert", *args) == (
            f"{args[1]} is there already: remove it, or choose another place."
        )
    assert contents(tmp_path) == before
    (tmp_path / "empty").mkdir()
    assert ebb("convert", source, tmp_path / "empty") == 0


def test_a_folder_that_another_process_writes_to(tmp_path, said):
    source, folder = write_official(tmp_path / "a.pth"), tmp_path / "run"
    with checkpoint.locked(folder):
        assert said("convert", source, folder).startswith("Another process is writing to")
    assert ebb("convert", source, folder) == 0


class Code:
    """Runs a command when it is unpickled."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


def test_code_in_a_file_is_not_run(tmp_path, said):
    proof = tmp_path / "it ran"
    torch.save({"emb.weight": Code(proof)}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps(Code(proof), protocol=2))
    (tmp_path / "d.pth").write_bytes(pickle.dumps(Code(proof)))
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "c.pth")
    for name, asked in (("a", "posix.mkdir"), ("b", "posix.mkdir"), ("c", "torch.nn.modules.")):
        sentence = said("convert", tmp_path / f"{name}.pth", tmp_path / "run")
        assert f"holds more than tensors: it asks to run {asked}" in sentence
        assert sentence.endswith("Save its tensors alone, best as safetensors.")
    assert "damaged, incomplete or" in said("convert", tmp_path / "d.pth", tmp_path / "run")
    assert not proof.exists()
    assert not (tmp_path / "run").exists()


def broken_files(folder):
    """Files that cannot be imported, and what is said of each."""
    whole = write_official(folder / "whole.pth").read_bytes()
    old = folder / "old.pth"
    torch.save(official_weights("rwkv4"), old, _use_new_zipfile_serialization=False)
    safe = write_official(folder / "whole.safetensors").read_bytes()
    files = {
        "empty.pth": b"",
        "text.pth": b"hello\n" * 99,
        "noise.pth": bytes(range(256)) * 20,
        "half.pth": whole[: len(whole) // 2],
        "end.pth": whole[:-30],
        "start.pth": b"PK\x03\x04" + bytes(99),
        "old.pth": old.read_bytes()[:-50],
        "safe.pth": safe,
        "half.safetensors": safe[: len(safe) // 2],
        "empty.safetensors": b"",
        "pickle.safetensors": whole,
    }
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    torch.save([torch.zeros(1)], folder / "list.pth")
    torch.save({"model": {"a": torch.zeros(1)}}, folder / "nested.pth")
    torch.save({"a": torch.zeros(1)}, folder / "other.pth")
    torch.save({}, folder / "nothing.pth")
    (folder / "a.txt").write_text("text")
    damaged = "it is damaged, incomplete or something else."
    return {
        **{name: damaged for name in files if name.endswith(".pth")},
        **{name: "it is damaged or incomplete." for name in files if name.endswith("tensors")},
        "list.pth": "is not a checkpoint: it holds something other than tensors by their names.",
        "nested.pth": "is not a checkpoint: it holds something other than tensors by their names.",
        "other.pth": "cannot be imported: these are not the weights of an RWKV model under",
        "nothing.pth": "cannot be imported: these are not the weights of an RWKV model under",
        "a.txt": "does not look like a checkpoint: give a file whose name ends in .pth, .pt, .bin",
        "missing.pth": "There is no ",
    }


def test_files_that_cannot_be_used(tmp_path, said):
    for name, sentence in broken_files(tmp_path).items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            told = said("convert", tmp_path / name, tmp_path / "run")
        assert sentence in told, name
        assert name in told
        assert not (tmp_path / "run").exists()


def test_what_is_missing_or_too_much_is_named(tmp_path, said):
    weights = official_weights("rwkv6")
    del weights["blocks.1.att.time_maa_w2"]
    weights["blocks.2.att.time_state"] = torch.zeros(3, 8, 8)
    torch.save(weights, tmp_path / "a.pth")
    assert said("convert", tmp_path / "a.pth", tmp_path / "run") == (
        f"{tmp_path}/a.pth cannot be imported: this is not a whole RWKV-6 model: "
        "blocks.1.att.time_maa_w2 is missing; blocks.2.att.time_state is not part of this version."
    )


def test_exports_that_cannot_be(imported, tmp_path, said):
    out = tmp_path / "a.pth"
    for target in ("a.bin", "folder"):
        sentence = said("convert", imported, tmp_path / target)
        assert (
            "must end in .pth or .safetensors: a run becomes a file, or with --weights a folder."
            in sentence
        )
    assert "There is no folder " in said("convert", imported, tmp_path / "no" / "a.pth")
    for flag, value in (("--tokenizer", "bytes"), ("--group-norm-eps", "1e-5")):
        sentence = said("convert", imported, out, flag, value)
        assert sentence.startswith(f"{flag[2:]} is for an official checkpoint that comes in")
    assert "is not a checkpoint: it holds no config.json" in said("convert", tmp_path, out)
    sentence = said("convert", write_official(tmp_path / "b.pth"), tmp_path / "c.pth")
    assert "is the name of a file: a checkpoint is imported into a folder" in sentence
    run = shutil.copytree(imported, tmp_path / "run")
    (run / "model.safetensors").unlink()
    assert "the run has not saved any weights yet." in said("convert", run, out)
    model = random_model(small_config("gla"), dtype=torch.float32)
    checkpoint.save_json(run / "config.json", {"model": model.config.to_dict(), "train": {}})
    assert "holds a gla model, which has no official form; RWKV-4, RWKV-5.2, " in said(
        "convert", run, out
    )
    assert not out.exists()


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_full_disk_leaves_nothing_behind(imported, tmp_path, said, name):
    with largest_file(20_000):
        assert "cannot be written (" in said("convert", imported, tmp_path / name)
        source = imported.parent / "World-0.1B.pth"
        assert "cannot be written (" in said("convert", source, tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_session_goes_on_in_a_padded_vocabulary(imported, tmp_path):
    session = Session(imported)
    session.read(session.encode("some text"))
    session.save(tmp_path / "state")
    again = Session(imported, state=tmp_path / "state")
    assert torch.equal(again._logits, session._logits)
