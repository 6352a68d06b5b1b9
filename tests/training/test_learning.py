"""What one run does: it learns, repeats, clips, follows its schedule, and writes it all down."""

import json

import pytest
import torch
from runs import TINY, ebb, metrics
from safetensors import safe_open
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

from model.layers import MIXERS
from train.config import TrainConfig
from train.loop import train
from train.recipes import recipe_of
from train.schedule import rate_factor


def tiny(workshop, folder, **changes):
    """A config of a run of some seconds."""
    settings = {
        "mixer": "attention",
        "size": "nano",
        "data": str(workshop / "text.txt"),
        "tokenizer": "bytes",
        "steps": 4,
        "batch_size": 2,
        "context": 16,
        "log_every": 1,
        "eval_every": 100,
        "eval_tokens": 64,
        "sample_every": 0,
        "threads": 1,
        "out": folder,
    }
    return TrainConfig(**{**settings, **changes})


def losses(folder):
    return [line["loss"] for line in metrics(folder) if "loss" in line]


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_every_mixer_learns(workshop, tmp_path, mixer):
    result = train(
        tiny(workshop, tmp_path, mixer=mixer, steps=20, batch_size=4, learning_rate=2e-3)
    )
    first, last = losses(tmp_path)[0], losses(tmp_path)[-5:]
    assert 5 < first < 6.5, "a new model is to find all 257 tokens about equally likely"
    assert sum(last) / 5 < first - 1.5
    assert result.validation.loss < first - 1.5
    assert result.tokens == 20 * 4 * 16
    assert result.num_parameters == sum(
        tensor.numel() for tensor in load_file(tmp_path / "model.safetensors").values()
    )


def test_another_seed_gives_other_weights_and_another_order(workshop, tmp_path):
    for seed in (0, 1):
        train(tiny(workshop, tmp_path / str(seed), seed=seed, steps=2))
    one, two = (load_file(tmp_path / seed / "model.safetensors") for seed in "01")
    assert not torch.equal(one["embedding.weight"], two["embedding.weight"])
    assert losses(tmp_path / "0") != losses(tmp_path / "1")


def test_weights_hold_no_paths_and_no_times(reference):
    with safe_open(reference / "model.safetensors", "pt") as file:
        assert not file.metadata()


def test_metrics_hold_every_step_and_the_schedule(workshop, tmp_path):
    train(
        tiny(workshop, tmp_path, mixer="rwkv7", steps=7, warmup=3, learning_rate=3e-3, eval_every=4)
    )
    lines = metrics(tmp_path)
    logged = [line for line in lines if "loss" in line]
    assert [line["step"] for line in logged] == [1, 2, 3, 4, 5, 6, 7]
    final = recipe_of("rwkv7").final_fraction
    for number, line in enumerate(logged):
        factor = rate_factor(number, steps=7, warmup=3, final_fraction=final)
        assert line["learning_rate"] == pytest.approx(3e-3 * factor)
        assert line["tokens"] == (number + 1) * 32
        assert line["bits_per_byte"] == pytest.approx(line["loss"] / 0.6931471805599453)
        assert line["gradient_norm"] > 0
        assert line["tokens_per_second"] > 0
    validated = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in validated] == [4, 7]
    for line in validated:
        bits = line["validation_loss"] / 0.6931471805599453
        assert line["validation_bits_per_byte"] == pytest.approx(bits)


def test_best_weights_are_those_of_the_lowest_validation(workshop, tmp_path):
    """A rate that ruins the model at once: the first validation is the best."""
    train(tiny(workshop, tmp_path, steps=3, warmup=0, learning_rate=1.0, eval_every=1))
    validation = [line["validation_loss"] for line in metrics(tmp_path) if "loss" not in line]
    assert min(validation) == validation[0] < validation[2]
    best, last = (load_file(tmp_path / f"{name}.safetensors") for name in ("best", "model"))
    assert not torch.equal(best["embedding.weight"], last["embedding.weight"])
    snapshot = load_file(tmp_path / "resume" / "step-000000002" / "model.safetensors")
    assert not torch.equal(best["embedding.weight"], snapshot["embedding.weight"])


@pytest.mark.parametrize("clip", [0.01, 1e9])
def test_gradient_is_clipped_before_the_step(workshop, tmp_path, clip):
    norms = []

    def look(optimizer, args, kwargs):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())

    hook = register_optimizer_step_pre_hook(look)
    try:
        train(tiny(workshop, tmp_path, clip=clip))
    finally:
        hook.remove()
    found = [line["gradient_norm"] for line in metrics(tmp_path) if "gradient_norm" in line]
    assert min(found) > 0.1, "nothing to clip"
    assert norms == pytest.approx([min(norm, clip) for norm in found], rel=1e-4)


def test_samples_are_shown_while_training(workshop, tmp_path, capsys):
    train(tiny(workshop, tmp_path, steps=4, eval_every=2, sample_every=None))
    lines = capsys.readouterr().err.splitlines()
    for step in (2, 4):
        place = next(n for n, line in enumerate(lines) if line.startswith(f"step {step}: valid"))
        assert len(lines[place + 1]) > 20, "no sample below the validation"


def test_settings_of_the_run_stand_in_its_folder(workshop, tmp_path):
    config = tiny(workshop, tmp_path, steps=1)
    train(config)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert TrainConfig(**saved["train"], out=tmp_path) == config
    assert saved["model"]["vocab_size"] == 257
    assert saved["model"]["mixer"] == "attention"


@pytest.mark.parametrize("mixer", MIXERS)
def test_bf16_trains_validates_and_samples(mixer, workshop, tmp_path, capsys):
    run = ("train", "--mixer", mixer, "--data", workshop / "text.txt", *TINY, "--steps", "2")
    assert ebb(*run, "--precision", "bf16", "--out", tmp_path / "bf16") == 0
    assert ebb(*run, "--precision", "fp32", "--out", tmp_path / "fp32") == 0
    logged = [metrics(tmp_path / name) for name in ("bf16", "fp32")]
    first, second = (next(line["loss"] for line in lines if "loss" in line) for lines in logged)
    assert first != second
    assert first == pytest.approx(second, rel=0.02)
