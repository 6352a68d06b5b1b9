"""`ebb info`: the machine and the mixers, and what a checkpoint holds."""

import json
import math

import pytest
import torch
from runs import TINY, ebb, only_line, workplace
from safetensors.torch import load_file

from model import state as states
from model.language_model import LanguageModel
from model.layers import MIXERS
from model.ops.scores import SCORES
from model.presets import preset
from train.checkpoint import load_checkpoint
from train.half_lives import half_lives
from train.info import layer_state, smaller_cache_until


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A run of each kind of state: one that grows and one that does not."""
    with workplace(tmp_path_factory.mktemp("info")) as folder:
        for mixer in ("attention", "retnet"):
            flags = ["--data", folder / "text.txt", *TINY, "--mixer", mixer, "--sample-every", "0"]
            assert ebb("train", *flags, "--steps", "1", "--out", folder / mixer) == 0
        yield folder


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


@pytest.mark.parametrize("mixer", ["attention", "retnet"])
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
    lives = [name for name in report if name.startswith("half-lives")]
    assert bool(lives) == (mixer == "retnet")
    assert ebb("info", shop / mixer) == 0
    assert f"{report['parameters']['all']:,}" in capsys.readouterr().out


def test_half_lives_of_retnet_are_those_of_its_fixed_decays():
    """`(1 - 2^(-5-h))^n = 1/2` in every layer."""
    model = LanguageModel(preset("nano", "retnet", 20))
    lives = [math.log(0.5) / math.log(1 - 2.0 ** (-5 - head)) for head in range(4)]
    found = half_lives(model, torch.zeros(1, 3, dtype=torch.long))
    assert len(found) == 4
    for row in found:
        assert row["smallest"] == pytest.approx(lives[0], rel=1e-5)
        assert row["median"] == pytest.approx(lives[1], rel=1e-5)
        assert row["largest"] == pytest.approx(lives[3], rel=1e-5)


@torch.no_grad()
def test_half_lives_follow_the_decays_of_the_data():
    """A decay whose projection gives a constant is that constant everywhere."""
    model = LanguageModel(preset("nano", "rwkv6", 20))
    for layer, block in enumerate(model.blocks):
        block.time_mix.decay.bias.fill_(math.log(math.log(2) / (layer + 1)))
    for layer, row in enumerate(half_lives(model, torch.arange(20)[None])):
        assert list(row.values()) == pytest.approx([layer + 1.0] * 3, rel=1e-5)


def test_no_decay_has_no_half_life():
    for mixer in ("linear_transformer", "deltanet", "attention"):
        model = LanguageModel(preset("nano", mixer, 20))
        assert half_lives(model, torch.zeros(1, 2, dtype=torch.long)) == []


def test_scores_say_where_a_constant_state_is_the_larger_one(capsys):
    rows = {row["attention"]: row for row in read(capsys)["scores of attention"]}
    assert list(rows) == list(SCORES)
    for name, row in rows.items():
        assert (row["constant state of a layer"] == "none") == (not SCORES[name].exact)
    constant, cache = layer_state("attention:taylor:constant"), layer_state("attention:taylor")
    until = smaller_cache_until(constant, cache)
    assert f"up to {until:,} tokens" in rows["taylor"]["constant state of a layer"]
    assert cache.at(until) <= constant.at(until) == constant.first < cache.at(until + 1)
    width, features = 64, 1 + 64 + 64 * 65 // 2
    assert constant.first == 4 * features * (width + 1) * 4 + 8


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_the_state_is_a_line_in_the_context(mixer):
    size = layer_state(mixer)
    assert (size.growth > 0) == (mixer == "attention")
    model = LanguageModel(preset("micro", mixer, 2))
    _, state = model.features(torch.zeros(1, 50, dtype=torch.long))
    assert states.num_bytes(state) == len(model.blocks) * size.at(50)


def test_instruments_of_a_checkpoint(shop, capsys):
    """A row for each layer, and two plots in the folder, beside another model if there is one."""
    report = read(capsys, shop / "retnet", "--instruments", "--beside", shop / "attention")
    (rows,) = (value for name, value in report.items() if name.startswith("instruments"))
    assert [row["layer"] for row in rows] == [0, 1, 2, 3]
    names = ["attention_norm", "attention_entropy", "attention_span", "state_norm", "state_rank"]
    assert [*rows[0]] == ["layer", *names, "half_life", "gradient_norm"]
    assert all(float(value.replace(",", "")) >= 0 for row in rows for value in [*row.values()][1:])
    plots = [shop / "retnet" / name for name in ("attention.png", "instruments.png")]
    assert [*report["plots"].values()] == [str(path) for path in plots]
    beside = plots[0].read_bytes()
    assert ebb("info", shop / "retnet", "--instruments") == 0
    assert "gradient" in capsys.readouterr().out
    assert plots[0].read_bytes() != beside
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in plots)


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (["--instruments"], "instruments need a checkpoint to read"),
        (["retnet", "--beside", "attention"], "beside is of the plots of --instruments"),
    ],
)
def test_instruments_without_what_they_need(shop, capsys, args, problem):
    assert ebb("info", *args) == 2
    assert problem in only_line(capsys.readouterr().err)
