"""`ebb train --find-lr`: a rate that trains well, a plot, and a folder still free for a run."""

import dataclasses
import json
import math

import pytest
from runs import TINY, ebb, only_line, write_text

from train.config import TrainConfig
from train.find_rate import HIGHEST, LOWEST, STEPS, RangeTest, find_rate, save_plot
from train.loop import train
from train.progress import Display


def falling_then_rising(turn):
    rates = [LOWEST * (HIGHEST / LOWEST) ** (step / (STEPS - 1)) for step in range(STEPS)]
    return RangeTest(rates, [1 + math.log10(rate / turn) ** 2 for rate in rates])


@pytest.mark.parametrize("turn", [1e-3, 1e-2])
def test_suggestion_is_below_the_rate_where_the_loss_turns(turn):
    """The mean lags some steps behind, each of which raises the rate by 8 %."""
    test = falling_then_rising(turn)
    assert turn < test.best < 3 * turn
    assert test.suggestion == pytest.approx(test.best / 3, rel=0.05)
    assert len(f"{test.suggestion:e}".split("e")[0].rstrip("0")) <= 3


def test_mean_begins_at_the_first_loss():
    assert RangeTest([1e-5, 2e-5], [4.0, 4.0]).smoothed == pytest.approx([4.0, 4.0])


@pytest.fixture(scope="module")
def config(workshop, tmp_path_factory):
    return TrainConfig(
        mixer="attention",
        size="2x32",
        data=str(workshop / "text.txt"),
        tokenizer="bytes",
        batch_size=4,
        context=16,
        sample_every=0,
        eval_every=1000,
        eval_tokens=512,
        threads=1,
        out=tmp_path_factory.mktemp("rates") / "run",
    )


def test_suggested_rate_beats_much_lower_and_much_higher_ones(config, tmp_path):
    test = find_rate(config, "fp32", Display())
    assert len(test.rates) == len(test.losses) <= STEPS
    assert test.rates == sorted(test.rates)
    assert 5 < test.losses[0] < 6.5

    def loss(rate):
        run = dataclasses.replace(config, learning_rate=rate, steps=60, out=tmp_path / f"{rate}")
        return train(run).validation.loss

    found = loss(test.suggestion)
    assert found < loss(test.suggestion / 30) - 0.2
    assert found < loss(test.suggestion * 30) - 0.2


def test_command_draws_suggests_and_leaves_the_folder_free(workshop, tmp_path, capsys):
    run = ["train", "--data", workshop / "text.txt", *TINY, "--size", "1x32", "--out", tmp_path]
    assert ebb(*run, "--find-lr") == 0
    said = capsys.readouterr().out
    numbers = json.loads((tmp_path / "learning-rate.json").read_text())
    assert f"Try --learning-rate {numbers['suggestion']:g}\n" in said
    assert len(numbers["rates"]) == len(numbers["losses"])
    image = (tmp_path / "learning-rate.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) > 20_000
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".lock") == [
        "learning-rate.json",
        "learning-rate.png",
    ]
    assert ebb(*run, "--steps", "1", "--warmup", "0", "--learning-rate", "1e-3") == 0
    settings = json.loads((tmp_path / "config.json").read_text())["train"]
    assert "find_lr" not in settings


def test_equal_tests_draw_equal_plots(tmp_path):
    for name in ("one", "two"):
        save_plot(falling_then_rising(1e-2), "rwkv7 nano", tmp_path / f"{name}.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_text_that_is_too_short_is_told(tmp_path, capsys):
    text = write_text(tmp_path / "short.txt", words=3)
    assert ebb("train", "--find-lr", "--data", text, *TINY, "--out", tmp_path / "run") == 1
    assert "fewer than one context" in only_line(capsys.readouterr().err)
