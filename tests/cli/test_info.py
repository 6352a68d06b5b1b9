"""`ebb info`: the machine and the mixers, and what a checkpoint holds."""

import json

import pytest
import torch
from runs import TINY, ebb, write_text
from safetensors.torch import load_file

from model import state as states
from model.layers import MIXERS
from train.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A run of each kind of state: one that grows and one that does not."""
    folder = tmp_path_factory.mktemp("info")
    text = write_text(folder / "text.txt")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        for mixer in ("attention", "linear_transformer"):
            flags = ["--data", text, *TINY, "--mixer", mixer, "--sample-every", "0"]
            assert ebb("train", *flags, "--steps", "1", "--out", folder / mixer) == 0
        yield folder
    torch.set_num_threads(threads)


def read(capsys, *args):
    capsys.readouterr()
    assert ebb("info", *args, "--json") == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert shown.out.count("\n") == 1
    return json.loads(shown.out)


def test_machine(capsys):
    report = read(capsys)
    assert report["versions"]["torch"] == torch.__version__
    assert report["machine"]["threads"] == torch.get_num_threads()
    assert [row["mixer"] for row in report["mixers"]] == list(MIXERS)
    assert ebb("info") == 0
    shown = capsys.readouterr().out
    for name in (*report, *report["versions"], "nano", "small"):
        assert name in shown


@pytest.mark.parametrize("mixer", ["attention", "linear_transformer"])
def test_checkpoint(shop, capsys, mixer):
    report = read(capsys, shop / mixer)
    weights = load_file(shop / mixer / "model.safetensors")
    assert report["parameters"]["all"] == sum(w.numel() for w in weights.values())
    assert sum(report["parameters"].values()) == 2 * report["parameters"]["all"]
    assert report["model"]["mixer"] == mixer
    assert report["model"]["d_model"] == 128
    assert report["training"]["batch_size"] == 2
    model = load_checkpoint(shop / mixer).model
    assert report["model"]["fingerprint"] == model.fingerprint()
    _, state = model.features(torch.zeros(1, 1024, dtype=torch.long))
    found = report["state, batch 1"]
    assert found["1,024 tokens"] == f"{states.num_bytes(state):,} bytes"
    assert (found["1,024 tokens"] == found["16,384 tokens"]) == (mixer != "attention")
    assert ebb("info", shop / mixer) == 0
    assert f"{report['parameters']['all']:,}" in capsys.readouterr().out
