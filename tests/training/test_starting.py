"""Recipes for budgets of time, and runs that start from the weights of another."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from official import official_weights
from runs import TINY, ebb, metrics, only_line, write_text
from safetensors.torch import load_file

from model.layers import MIXERS
from model.presets import preset
from train.cli import _parse
from train.config import TrainConfig
from train.matching import num_parameters
from train.recipes import BUDGETS, budget_settings
from train.starting import starting_settings


def parsed(*args):
    return _parse("train", TrainConfig, args)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("mixer", [*sorted(MIXERS), "attention:square_l1"])
def test_every_recipe_suits_every_mixer(budget, mixer):
    config = parsed("--recipe", budget, "--mixer", mixer)
    assert config == starting_settings(recipe=budget, mixer=mixer)
    for name, value in budget_settings(budget, mixer).items():
        assert getattr(config, name) == value
    assert (config.mixer, config.recipe) == (mixer, budget)
    assert num_parameters(preset(config.size, mixer, 257)) > 0


@pytest.mark.parametrize("order", [1, -1])
def test_flags_stand_above_the_recipe(order):
    flags = [["--recipe=cpu-2min"], ["--steps", "7", "--warmup", "3"], ["--size", "2x64"]]
    config = parsed(*(word for flag in flags[::order] for word in flag))
    expected = starting_settings(recipe="cpu-2min")
    assert config == dataclasses.replace(expected, steps=7, warmup=3, size="2x64")


def test_flag_that_only_the_recipe_makes_possible():
    """A warm-up longer than a run would be without the recipe."""
    steps = starting_settings(recipe="cpu-1h").steps
    assert steps > TrainConfig().steps
    assert parsed("--recipe", "cpu-1h", "--warmup", str(steps - 1)).warmup == steps - 1


def test_each_body_has_its_own_settings_and_longer_budgets_more_training():
    for body in ("rwkv7", "attention"):
        tokens = []
        for budget in ("cpu-2min", "cpu-10min", "cpu-1h"):
            config = starting_settings(recipe=budget, mixer=body)
            shape = preset(config.size, body, 257)
            tokens.append(config.steps * config.batch_size * config.context * num_parameters(shape))
        assert 3 < tokens[1] / tokens[0] < 8
        assert 3 < tokens[2] / tokens[1] < 9


def test_recipe_trains_and_resumes(workshop, tmp_path):
    run = ["train", "--recipe", "cpu-2min", "--data", workshop / "text.txt", *TINY]
    run += ["--size", "1x32", "--steps", "2", "--warmup", "0", "--out", tmp_path]
    assert ebb(*run) == 0
    settings = json.loads((tmp_path / "config.json").read_text())["train"]
    assert settings["recipe"] == "cpu-2min"
    assert settings["optimizer"] == "muon"
    assert ebb(*run, "--resume") == 0


@pytest.mark.parametrize(
    ("steps", "flags", "made", "share"),
    [
        (2, (), 2, "0"),
        (24, (), 24, "0.1"),
        (48, (), 40, "0.2"),
        (48, ("--dropout", "0.3", "--max-epochs", "11"), 44, "0.3"),
    ],
)
def test_recipe_minds_how_often_a_text_is_read(
    workshop, tmp_path, capsys, steps, flags, made, share
):
    text, context = workshop / "text.txt", 64
    tokens = int(0.9 * len(text.read_bytes()))
    run = ["train", "--recipe", "cpu-2min", "--data", text, *TINY, "--size", "1x32", *flags]
    run += ["--steps", str(steps), "--warmup", str(steps - 1), "--out", tmp_path]
    run += [
        "--context",
        str(context),
        "--batch-size",
        str(tokens // context // 4),
    ]  # a quarter of an epoch a step
    assert ebb(*run) == 0
    said = capsys.readouterr().err.splitlines()[0]
    assert (f"dropout {share}," in said) if share != "0" else "dropout" not in said, said
    assert (f"in {made} of {steps} steps" in said) == (made < steps)
    lines = metrics(tmp_path)
    assert lines[-1]["step"] == made
    assert all(line["step"] <= made for line in lines)


@pytest.fixture(scope="module")
def base(workshop, tmp_path_factory):
    """A run of two layers to start others from; not to be changed."""
    folder = tmp_path_factory.mktemp("base") / "base"
    run = ["train", "--mixer", "gla", "--data", workshop / "text.txt", *TINY, "--size", "2x64"]
    run += ["--tokenizer", "bpe", "--vocab-size", "300", "--steps", "20", "--warmup", "0"]
    run += ["--learning-rate", "3e-3", "--eval-every", "20", "--sample-every", "0"]
    assert ebb(*run, "--out", folder) == 0
    return folder


SHORT = [*("--context", "16", "--batch-size", "2", "--eval-tokens", "64", "--threads", "1")]
SHORT += [*("--steps", "2", "--warmup", "0", "--sample-every", "0", "--eval-every", "1")]


def test_fine_tuning_starts_from_weights_shape_and_tokenizer(base, tmp_path, capsys):
    text = write_text(tmp_path / "other.txt", seed=5)
    run = ["train", "--init-from", base, "--data", text, *SHORT, "--learning-rate", "1e-30"]
    assert ebb(*run, "--weight-decay", "0", "--out", tmp_path / "run") == 0
    before, after = (load_file(x / "model.safetensors") for x in (base, tmp_path / "run"))
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-9)
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == (
        base / "tokenizer.json"
    ).read_bytes()
    one, two = (json.loads((x / "config.json").read_text()) for x in (base, tmp_path / "run"))
    assert one["model"] == two["model"]
    assert (two["train"]["mixer"], two["train"]["size"]) == ("gla", "2x64")
    assert metrics(tmp_path / "run")[0]["validation_loss"] < 4.5, (
        "a new model begins at ln 300 = 5.7"
    )


def test_fine_tuning_learns_and_resumes_without_its_source(base, tmp_path):
    source = shutil.copytree(base, tmp_path / "source")
    text = write_text(tmp_path / "other.txt", seed=5)
    run = ["train", "--init-from", source, "--data", text, *SHORT, "--steps", "4"]
    for name in ("whole", "cut"):
        assert ebb(*run, "--save-every", "2", "--out", tmp_path / name) == 0
    shutil.rmtree(source)
    shutil.rmtree(tmp_path / "cut" / "resume" / "step-000000004")
    assert ebb("train", "--resume", "--out", tmp_path / "cut") == 0
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert not torch.equal(
        whole["head.weight"], load_file(base / "model.safetensors")["head.weight"]
    )


def test_converted_official_checkpoint_is_trained_on(workshop, tmp_path, capsys):
    """Its vocabulary is larger than its tokenizer's: such rows stay, and are never asked for."""
    source, run = tmp_path / "official.pth", tmp_path / "run"
    torch.save(official_weights("rwkv7", torch.bfloat16, width=32, vocab=260), source)
    assert ebb("convert", source, tmp_path / "base", "--tokenizer", "bytes") == 0
    start = ["train", "--init-from", tmp_path / "base", "--data", workshop / "text.txt", *SHORT]
    assert ebb(*start, "--optimizer", "muon", "--learning-rate", "1e-3", "--out", run) == 0
    weights = load_file(run / "model.safetensors")
    assert weights["head.weight"].shape == (260, 32)
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert ebb("eval", run, "--max-tokens", "64") == 0
    assert ebb("convert", run, tmp_path / "back.pth") == 0
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert set(back) == set(torch.load(source, weights_only=True))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--mixer", "rwkv7"], "has gla for mixer, not rwkv7: leave --mixer out"),
        (["--size", "nano"], "has 2x64 for size, not nano: leave --size out"),
        (["--tokenizer", "bytes"], "tokenizer.json for tokenizer, not bytes: leave --tokenizer"),
        (["--ffn-dim", "64"], "has its own for ffn-dim, not 64: leave --ffn-dim out"),
    ],
)
def test_what_the_checkpoint_fixes_cannot_be_set(base, workshop, tmp_path, capsys, flags, said):
    run = ["train", "--init-from", base, "--data", workshop / "text.txt", *SHORT, *flags]
    assert ebb(*run, "--out", tmp_path / "run") == 1
    assert said in only_line(capsys.readouterr().err)
    assert not (tmp_path / "run" / "config.json").exists()


def test_checkpoint_that_is_none_is_told(tmp_path, capsys):
    assert ebb("train", "--init-from", tmp_path / "none", "--out", tmp_path / "run") == 2
    assert "There is no" in only_line(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_page_shows_the_recipes():
    page = (Path(__file__).parents[2] / "train" / "README.md").read_text()
    assert table_of_budgets() in page


def table_of_budgets():
    names = {"rwkv": "RWKV", "transformer": "others"}
    return "\n".join(
        f"| `{budget}` | {names[body]} | {s['size']} | {s['context']} | {s['batch_size']} | "
        f"{s['steps']:,} | {s['learning_rate']:g} |"
        for budget, bodies in BUDGETS.items()
        for body, s in bodies.items()
    )
