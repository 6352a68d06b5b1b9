"""Losses and gradients that are not finite: never applied, counted, logged; too many stop it."""

import math

import pytest
import torch
from runs import TINY, ebb, metrics, only_line, repeatable
from safetensors.torch import load_file

from train import distributed, loop
from train import step as step_module
from train.loss import next_token_loss
from train.optimizer import make_optimizer

ADVICE = "Start afresh with a lower --learning-rate, a longer --warmup or a smaller --clip."


@pytest.fixture
def flags(workshop, tmp_path):
    return [
        *("train", "--data", workshop / "text.txt", *TINY, "--mixer", "attention"),
        *("--sample-every", "0", "--eval-every", "100", "--log-every", "1", "--out", tmp_path),
    ]


@pytest.fixture
def spoil(monkeypatch):
    """Makes the losses of some steps infinite, or the gradients of finite losses."""

    def spoil(steps, *, only_gradient=False):
        step = iter(range(1, 1000))

        def spoiled(model, *args):
            loss = next_token_loss(model, *args)
            if next(step) not in steps:
                return loss
            if not only_gradient:
                return loss * math.inf
            parameter = next(model.parameters())
            return loss + (parameter.flatten()[0] * 0).sqrt()  # 0, with an infinite slope

        monkeypatch.setattr(step_module, "next_token_loss", spoiled)

    return spoil


@pytest.fixture
def changes(monkeypatch):
    """Whether each optimiser step changed the weights."""
    found = []

    def watched(model, *args):
        optimizer = make_optimizer(model, *args)
        before = [parameter.detach().clone() for parameter in model.parameters()]

        def after_gradients(*_):
            nonlocal before
            now = [parameter.detach().clone() for parameter in model.parameters()]
            found.append(not all(map(torch.equal, before, now)))
            before = now

        optimizer.register_step_post_hook(after_gradients)
        return optimizer

    monkeypatch.setattr(loop, "make_optimizer", watched)
    return found


@pytest.mark.parametrize("only_gradient", [False, True])
def test_step_that_is_not_finite_is_skipped_counted_and_said(
    flags, spoil, changes, tmp_path, capsys, only_gradient
):
    spoil({3, 4, 6}, only_gradient=only_gradient)
    assert ebb(*flags, "--steps", "8", "--max-skipped", "3") == 0
    assert changes == [True] * 5, "one for each step that was applied"
    said = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert len(said) == 2, "once for those in a row"
    assert said[0].startswith("step 3: loss ")
    assert said[1].endswith("skipped (3 so far)")
    lines = [line for line in metrics(tmp_path) if "tokens_per_second" in line]
    assert [line["step"] for line in lines if "loss" not in line] == [3, 4, 6]
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 2, 2, 3, 3, 3]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    weights = load_file(tmp_path / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_mean_of_a_stretch_leaves_out_what_was_skipped(flags, spoil, tmp_path):
    spoil({2})
    assert ebb(*flags, "--steps", "3", "--log-every", "3") == 0
    (line,) = (line for line in metrics(tmp_path) if "tokens_per_second" in line)
    assert math.isfinite(line["loss"])
    assert line["skipped_steps"] == 1
    assert line["tokens"] == 3 * 32


def test_too_many_in_a_row_stop_with_the_last_good_weights(flags, spoil, tmp_path, capsys):
    spoil({7, 8, 9})
    run = [*flags, "--steps", "20", "--save-every", "2", "--max-skipped", "3"]
    assert ebb(*run) == 1
    # Those of step 6 are the ones that give nothing finite.
    assert only_line(capsys.readouterr().err) == (
        "Loss or gradient were not finite in 3 steps in a row, up to step 9, and not applied; "
        f"the weights of step 4 are kept. {ADVICE}"
    )
    kept = load_file(tmp_path / "model.safetensors")
    saved = load_file(tmp_path / "resume" / "step-000000004" / "model.safetensors")
    assert all(torch.equal(kept[name], saved[name]) for name in saved)
    assert metrics(tmp_path)[-1]["skipped_steps"] == 3
    assert not (tmp_path / "resume" / "step-000000008").exists(), "saved while in doubt"


def test_weights_that_a_step_ruins_are_found_out(flags, tmp_path, capsys):
    wild = ["--learning-rate", "1e30", "--warmup", "0", "--save-every", "5", "--steps", "30"]
    assert ebb(*flags, *wild) == 1
    assert only_line(capsys.readouterr().err) == (
        "Loss or gradient were not finite in 10 steps in a row, up to step 11, and not applied; "
        f"nothing had been saved yet. {ADVICE}"
    )
    assert [line["step"] for line in metrics(tmp_path) if "loss" in line] == [1]


def test_validation_that_is_not_finite_stops(flags, monkeypatch, tmp_path, capsys):
    evaluation = loop.Evaluation(math.nan, 1, 1)
    monkeypatch.setattr(distributed, "evaluate", lambda *_: evaluation)
    assert ebb(*flags, "--steps", "4", "--eval-every", "3", "--save-every", "1") == 1
    assert only_line(capsys.readouterr().err) == (
        f"The validation loss is not finite at step 3; the weights of step 2 are kept. {ADVICE}"
    )


def test_saving_waits_for_a_step_that_is_applied(flags, spoil, tmp_path):
    spoil({4})
    assert ebb(*flags, "--steps", "9", "--save-every", "4", "--keep", "9") == 0
    saved = sorted(path.name for path in (tmp_path / "resume").iterdir())
    assert saved == ["step-000000005", "step-000000008", "step-000000009"]


def test_clipped_steps_are_counted(flags, tmp_path):
    assert ebb(*flags, "--steps", "3", "--clip", "0.01") == 0
    lines = [line for line in metrics(tmp_path) if "loss" in line]
    assert [line["clipped_steps"] for line in lines] == [1, 2, 3]
    assert all(line["gradient_norm"] > 0.01 for line in lines)


def test_interrupt_between_skipped_steps_saves_and_counts_on(flags, spoil, tmp_path, monkeypatch):
    """Nothing is lost of a run that is stopped in a bad stretch, nor is the stretch forgotten."""
    spoil({4, 5, 6})
    run = [*flags, "--steps", "12", "--save-every", "2", "--max-skipped", "3"]
    seen = loop.RunFolder.look_at_skipped

    def interrupt(self, loss, norm, say):
        seen(self, loss, norm, say)
        if self._progress.step == 5:
            raise_signal()

    monkeypatch.setattr(loop.RunFolder, "look_at_skipped", interrupt)
    assert ebb(*run) == 130
    good = load_file(tmp_path / "resume" / "step-000000002" / "model.safetensors")
    kept = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(kept[name], good[name]) for name in good)
    spoil({1})  # counted from the start of a process
    before = repeatable(tmp_path)
    assert ebb("train", "--resume", "--out", tmp_path) == 1
    assert repeatable(tmp_path)[: len(before)] == before
    assert metrics(tmp_path)[-1]["step"] == 6


def raise_signal():
    import signal

    signal.raise_signal(signal.SIGINT)
