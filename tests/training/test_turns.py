"""Runs that take turns, rates that are tried, runs that diverge: a comparison from end to end."""

import json
import math
import shlex

import pytest
from runs import ebb, metrics, only_line

from train import compare, loop, step, turns
from train.compare import run_comparison
from train.compare_config import CompareConfig
from train.interrupt import Interrupted
from train.loss import next_token_loss
from train.progress import Display
from train.tuning import Trial, best_rate, multiples, recipe_rate, trial_steps

NAMES = ("attention:square_l1", "gla")


@pytest.fixture(scope="module")
def settings(workshop):
    return {
        "mixers": ",".join(NAMES),
        "size": "nano",
        "data": str(workshop / "text.txt"),
        "tokenizer": "bytes",
        "batch_size": 2,
        "context": 16,
        "contexts": "8",
        "extrapolate": 2,
        "eval_tokens": 64,
        "threads": 1,
    }


class Stopping(Display):
    """Somebody who presses Ctrl-C when something is said about a run for the second time."""

    def __init__(self, name):
        super().__init__()
        self.awaited, self.times = name, 0

    def say(self, text, style=None):
        super().say(text, style)
        if self._name == self.awaited:
            self.times += 1
            if self.times == 2:
                raise KeyboardInterrupt


def losses(folder):
    """All that a comparison says about losses and rates, and nothing about time."""
    results = json.loads((folder / "results.json").read_text())
    without = ("seconds", "tokens_per_second")
    return [
        (
            model["tuning"],
            model["learning_rate"],
            [(run["validation_loss"], run["validation_bits_per_byte"]) for run in model["runs"]],
            [
                {key: value for key, value in point.items() if key not in without}
                for run in model["runs"]
                for point in run["curve"] + run["validation_curve"]
            ],
            model["lengths"],
            model["sample"],
        )
        for model in results["models"]
    ]


@pytest.fixture(scope="module")
def interleaved(settings, workshop):
    """A comparison by time, in turns, with rates to try, stopped in trials and in runs; the order
    of its steps."""
    folder = workshop / "interleaved"
    config = CompareConfig(**settings, budget="1.5s", tune=2, out=folder, resume=True)
    order = []

    def watched(run, until, display, **options):
        order.append((run.out.parent.name, run.mixer, until))
        return loop.train_until(run, until, display, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns, "train_until", watched)
        patch.setattr(turns, "TURN_SECONDS", 0.1)
        for name in ("gla at 0.0078", "gla, seed 0"):
            with pytest.raises(Interrupted), Stopping(name) as display:
                run_comparison(config, display)
        with Display() as display:
            run_comparison(config, display)
    return folder, order


def test_runs_take_turns(interleaved):
    folder, order = interleaved
    plan = json.loads((folder / "comparison.json").read_text())
    steps = plan["steps"]["gla"]
    assert steps == plan["steps"][NAMES[0]] > 3
    assert plan["turns"] > 2
    runs = [(mixer, until) for place, mixer, until in order if place == "runs"]
    done = sorted(set(runs), key=runs.index)
    borders = [steps * turn // plan["turns"] for turn in range(1, plan["turns"] + 1)]
    assert done == [(mixer, until) for until in borders for mixer in NAMES]
    assert len(runs) == len(done) + 1, "only the turn that was stopped is taken again"
    tried = [(mixer, until) for place, mixer, until in order if place == "tune"]
    first, second = ([mixer for mixer, _ in tried].count(name) for name in NAMES)
    assert second - first in (0, 1), "at most the turn that was stopped is taken again"
    assert max(until for _, until in tried) == trial_steps(steps)


def test_steps_of_a_time_give_the_same_losses_bit_for_bit(interleaved, tmp_path, monkeypatch):
    folder, _ = interleaved
    results = json.loads((folder / "results.json").read_text())
    command = results["settings"]["command"]
    assert f"--budget {results['settings']['steps']}-steps --tune 2 " in command
    assert ebb(*shlex.split(command)[1:], "--out", tmp_path) == 0
    again = json.loads((tmp_path / "comparison.json").read_text())
    assert again["turns"] == 1, "the order of the runs is another"
    assert losses(tmp_path) == losses(folder)


def test_every_mixer_has_its_grid_and_its_best_rate(interleaved):
    folder, _ = interleaved
    results = json.loads((folder / "results.json").read_text())
    for model in results["models"]:
        assert [trial["learning_rate"] for trial in model["tuning"]] == [3.9e-3, 7.8e-3]
        best = min(model["tuning"], key=lambda trial: trial["validation_loss"])
        assert model["learning_rate"] == best["learning_rate"]
        config = json.loads((folder / model["runs"][0]["folder"] / "config.json").read_text())
        assert config["train"]["learning_rate"] == best["learning_rate"]
    assert not (folder / "tune").exists()


def test_grid_lies_around_the_recipe():
    assert multiples(2) == [1, 2]
    assert multiples(3) == [0.5, 1, 2]
    assert multiples(5) == [0.25, 0.5, 1, 2, 4]


def test_rate_of_the_recipe_stands_where_nothing_was_learned():
    assert best_rate([], 1e-3) == 1e-3
    assert best_rate([Trial(5e-4, None), Trial(2e-3, None)], 1e-3) == 1e-3
    assert best_rate([Trial(5e-4, 2.0), Trial(1e-3, None), Trial(2e-3, 1.9)], 1e-3) == 2e-3


def test_wider_models_have_lower_rates():
    for mixer in ("softmax", "attention:square_l1", "rwkv7", "gla"):
        assert recipe_rate(mixer, "12x1024") == 4.9e-4
        assert recipe_rate(mixer, "2x2048") == 2.4e-4
        assert recipe_rate(mixer, "2x128") == recipe_rate(mixer, "2x32") == 3.9e-3


@pytest.mark.parametrize(("flag", "value"), [("tune", 1), ("tune", -2), ("extrapolate", 3)])
def test_grid_of_one_and_odd_lengths_are_refused(flag, value, capsys):
    assert ebb("compare", f"--{flag}={value}") == 2
    assert only_line(capsys.readouterr().err).startswith(f"{flag} must be 0")


def test_run_that_diverges_is_a_result(settings, tmp_path, monkeypatch, capsys):
    """One seed of one mixer comes to nothing: the rest is compared as if it were not there."""

    def spoiled(model, *args):
        loss = next_token_loss(model, *args)
        spoils = model.config.mixer == "gla" and spoiled.runs
        spoiled.steps += spoils
        return loss * math.inf if spoils and spoiled.steps > 3 else loss

    spoiled.runs, spoiled.steps = True, 0
    monkeypatch.setattr(step, "next_token_loss", spoiled)
    say = Display.say

    def stop_once(self, text, style=None):
        say(self, text, style)
        if text.startswith("diverged: "):
            spoiled.runs = False
        if self._name == f"{NAMES[0]}, seed 1" and spoiled.steps > 3:
            spoiled.steps = 0
            raise KeyboardInterrupt

    monkeypatch.setattr(Display, "say", stop_once)
    config = {**settings, "budget": "20-steps", "seeds": 2, "out": tmp_path, "resume": True}
    with pytest.raises(Interrupted), Display() as display:
        run_comparison(CompareConfig(**config), display)
    with Display() as display:
        results = run_comparison(CompareConfig(**config), display)
    attention, gla = results["models"]
    first, second = gla["runs"]
    assert first["diverged"]["step"] == 13
    assert first["diverged"]["reason"] == (
        "Loss or gradient were not finite in 10 steps in a row, up to step 13, and not applied"
    )
    assert first["validation_loss"] is first["validation_bits_per_byte"] is None
    assert first["tokens"] == 13 * 32
    assert [point["tokens"] for point in first["curve"]] == [320]
    assert first["validation_curve"][0]["tokens"] == 64
    assert second["diverged"] is None
    assert all(run["validation_loss"] > 0 for run in (second, *attention["runs"]))
    assert gla["sample"]["text"], "by the seed that did not diverge"
    assert metrics(tmp_path / first["folder"])[-1]["step"] == 13, "not begun again"
    compare.print_results(results, tmp_path)
    assert "diverged" in capsys.readouterr().out


def test_flops_buy_each_mixer_its_own_steps(settings, tmp_path):
    config = CompareConfig(**{**settings, "budget": "6e8-flops", "out": tmp_path, "seeds": 1})
    with Display() as display:
        results = run_comparison(config, display)
    for model in results["models"]:
        assert model["steps"] == int(6e8 / (32 * model["flops_per_token"])) > 1
        assert model["runs"][0]["tokens"] == 32 * model["steps"]
    assert "--budget 6e8-flops" in results["settings"]["command"]
