"""`ebb convert --weights`: runs made small enough to pass on, and read like any other."""

import json

import pytest
import torch
from model_helpers import random_model, small_config
from official import official_weights
from runs import contents, ebb, metrics, only_line, write_text
from safetensors.torch import load_file, save_file

from model.decode import with_rounded_weights
from train import checkpoint
from train.compact import FORMATS, grow, shrink

SHAPE = ["--size", "2x64", "--tokenizer", "bytes", "--context", "16", "--batch-size", "2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of some steps; not to be changed."""
    folder = tmp_path_factory.mktemp("small")
    text = write_text(folder / "text.txt")
    flags = [*SHAPE, "--steps", "4", "--sample-every", "0", "--learning-rate", "0.01"]
    assert ebb("train", "--data", text, *flags, "--out", folder / "run") == 0
    return folder / "run"


@pytest.fixture
def small(run, tmp_path):
    def small(weights):
        assert ebb("convert", run, tmp_path / "small", "--weights", weights) == 0
        return tmp_path / "small"

    return small


@pytest.mark.parametrize(("weights", "bits"), [("bf16", 16), ("int8", 8.5)])
def test_folder_is_small_and_computes_as_the_run_does(run, small, weights, bits, capsys):
    folder = small(weights)
    assert f"of weights in {weights}" in capsys.readouterr().out
    whole, rounded = (checkpoint.load_checkpoint(f) for f in (run, folder))
    counts = [x.numel() for x in whole.model.parameters() if x.dim() == 2 and x.shape[0] >= 16]
    others = whole.model.num_parameters() - sum(counts)
    assert others < sum(counts) / 10
    file = (folder / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(file[:8], "little")
    assert len(file) - header == sum(counts) * bits / 8 + others * 4
    tokens = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(0))
    expected, found = (c.model(tokens).logits for c in (whole, rounded))
    assert 0 < (found - expected).abs().max() < 0.03 * expected.abs().max()
    assert whole.tokenizer.fingerprint == rounded.tokenizer.fingerprint
    assert metrics(run) == metrics(folder)


def test_8_bits_are_those_that_a_model_writes_with(run, small):
    """Linear layers are rounded as by `--weights int8`; so are embeddings, which that leaves."""
    rounded = with_rounded_weights(checkpoint.load_model(run)[0], "int8").state_dict()
    found = checkpoint.load_model(small("int8"))[0].state_dict()
    linear = [n for n in found if n.endswith(".weight") and found[n].dim() == 2]
    assert len(linear) > 10
    for name in sorted(set(linear) - {"embedding.weight"}):
        assert torch.equal(found[name], rounded[name]), name


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("mixer", ["mamba2", "rwkv4", "attention"])
def test_any_mixer_comes_back_close(mixer, weights):
    own = random_model(small_config(mixer, d_model=64), dtype=torch.float32).state_dict()
    back = grow(shrink(own, weights))
    assert back.keys() == own.keys()
    for name, tensor in back.items():
        error = (tensor.float() - own[name]).abs().max() / own[name].abs().max()
        assert error <= (2**-8 if weights == "bf16" else 0.51 / 127 + 2**-8), name


def test_page_says_what_it_is(run, small):
    page = (small("int8") / "README.md").read_text()
    last = [line for line in metrics(run) if "validation_loss" in line][-1]
    for fact in (
        *("# small\n", "`rwkv7`, 2 layers, width 64", "8 bits, with a scale", "text.txt"),
        *("4 steps of 2 x 16 tokens, 128 in all, seed 0", "## Limits"),
        f"{last['validation_loss']:.4f} nats a token",
        f"{last['validation_bits_per_byte']:.4f} bits a byte",
    ):
        assert fact in page, page


def test_small_folder_writes_is_evaluated_fine_tuned_and_exported(run, small, tmp_path, capsys):
    folder, text = small("int8"), run.parent / "text.txt"
    assert ebb("generate", folder, "--prompt", "the", "--tokens", "5") == 0
    losses = []
    for of in (run, folder):
        capsys.readouterr()
        assert ebb("eval", of, "--data", text, "--json") == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=1e-3)
    tuned = ["--init-from", folder, "--data", text, "--out", tmp_path / "tuned"]
    flags = ["--context", "16", "--batch-size", "2", "--steps", "2", "--sample-every", "0"]
    assert ebb("train", *tuned, *flags) == 0
    assert ebb("convert", folder, tmp_path / "official.safetensors") == 0
    official = load_file(tmp_path / "official.safetensors")
    assert {tensor.dtype for tensor in official.values()} == {torch.float32}


def test_official_checkpoint_can_be_passed_on_too(tmp_path):
    save_file(official_weights("rwkv6", vocab=257), tmp_path / "a.safetensors")
    imported, folder = tmp_path / "run", tmp_path / "small"
    assert ebb("convert", tmp_path / "a.safetensors", imported, "--tokenizer", "bytes") == 0
    assert ebb("convert", imported, folder, "--weights", "bf16") == 0
    assert "an official checkpoint, RWKV-6" in (folder / "README.md").read_text()
    assert not (folder / "metrics.jsonl").exists()
    assert ebb("generate", folder, "--prompt", "the", "--tokens", "5") == 0


def test_small_folder_has_no_training_to_go_on_with(small, capsys):
    folder = small("bf16")
    before = contents(folder)
    assert ebb("train", "--resume", "--out", folder) == 1
    assert "holds weights, but no whole checkpoint" in only_line(capsys.readouterr().err)
    assert contents(folder) == before


@pytest.mark.parametrize("spoil", ["scales lost", "scales of another shape", "no integers"])
def test_damaged_8_bits_are_told(small, spoil, capsys):
    path = small("int8") / "model.safetensors"
    weights = load_file(path)
    if spoil == "scales lost":
        del weights["head.weight.scales"]
    elif spoil == "no integers":
        weights["head.weight.int8"] = weights["head.weight.int8"].float()
    else:
        weights["head.weight.scales"] = weights["head.weight.scales"][:, :1].contiguous()
    save_file(weights, path)
    capsys.readouterr()
    assert ebb("generate", path.parent, "--prompt", "a") == 1
    error = only_line(capsys.readouterr().err)
    assert "is damaged: the 8-bit weights of head.weight and their scales do not fit." in error


def test_what_cannot_be_made_small_is_told_and_leaves_nothing(run, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    for args, sentence in (
        ([run, tmp_path / "a.pth", "--weights", "int8"], "is the name of a file, and --weights m"),
        ([run, tmp_path / "a", "--weights", "int4"], "there is no format of weights to pass on"),
        ([run, tmp_path / "there", "--weights", "int8"], "is there already"),
        ([run, tmp_path / "a", "--weights", "int8", "--tokenizer", "bytes"], "leave it out"),
        (
            [run / "model.safetensors", tmp_path / "a", "--weights", "int8"],
            "convert into one first",
        ),
        ([tmp_path / "there", tmp_path / "a", "--weights", "int8"], "is not a checkpoint"),
    ):
        capsys.readouterr()
        assert ebb("convert", *args) in (1, 2)
        assert sentence in only_line(capsys.readouterr().err)
        assert [path.name for path in tmp_path.iterdir()] == ["there"]
