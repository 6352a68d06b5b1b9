"""Runs, trials and tasks that diverged: null in `results.json`, words in every part of a report."""

import json
import math
import re
from dataclasses import replace

import matplotlib.image
import pytest
from comparison_results import (
    attention,
    diverged,
    everything,
    gla,
    results,
    rwkv7,
    with_lengths,
)
from comparison_results import with_tasks as asked
from runs import ebb

from train import lengths_plot, step, tasks
from train import results as made
from train.lengths import study_lengths
from train.loss import next_token_loss
from train.report import report_text, summary_lines, write_report
from train.report.chart import task_charts
from train.report.html import page

RECALL, PARITY = (0.9, 0.8, 0.7, 0.6), (0.99, 0.9, 0.8, 0.7)


def with_failures(one, task, seeds):
    """A model of which the trials of these seeds at a task diverged."""
    for entry in one["tasks"][task]:
        left = [None if n in seeds else value for n, value in enumerate(entry["seeds"])]
        kept = [value for value in left if value is not None]
        entry |= {"seeds": left, "accuracy": sum(kept) / len(kept) if kept else None}
    return one


def said_of(word, *models):
    return [line for line in summary_lines(results(*models)) if word in line]


def no_constant(name):
    pytest.fail(f"{name} is no JSON")


def whole_report(folder):
    """The markdown and the page, when every picture can be read and no null shows."""
    text, shown = ((folder / f"report.{kind}").read_text() for kind in ("md", "html"))
    for picture in folder.glob("*.png"):
        assert matplotlib.image.imread(picture).std() > 0.01, picture.name
    for report in (text, shown.partition("<script>")[0]):
        assert re.findall(r"\b(None|nan|NaN|null)\b", report) == []
    return text, shown


def test_a_mixer_that_diverges_at_everything_is_reported(workshop, tmp_path, monkeypatch, capsys):
    """A real comparison: rates that are tried, runs with instruments, and a task."""

    def spoiled(model, *args):
        loss = next_token_loss(model, *args)
        return loss * math.inf if model.config.mixer == "gla" else loss

    def broken(*args, **settings):
        study = study_lengths(*args, **settings)
        *rest, longest = study.lengths
        return replace(study, lengths=(*rest, replace(longest, last=math.nan)))

    train = tasks.train_task
    monkeypatch.setattr(made, "study_lengths", broken)
    monkeypatch.setattr(step, "next_token_loss", spoiled)
    monkeypatch.setattr(
        tasks, "train_task", lambda t, s, **kw: None if s.mixer == "gla" else train(t, s, **kw)
    )
    flags = ["--mixers", "gla,softmax", "--size", "nano", "--tokenizer", "bytes", "--threads", "1"]
    flags += ["--budget", "50-steps", "--batch-size", "2", "--context", "16", "--contexts", "8"]
    flags += ["--eval-tokens", "64", "--extrapolate", "2", "--tune", "2", "--instruments", "all"]
    flags += ["--data", workshop / "text.txt", "--tasks", "s3", "--task-steps", "1"]
    assert ebb("compare", *flags, "--out", tmp_path) == 0
    said = capsys.readouterr().err
    assert "gla: diverged at all of 2 learning rates; its recipe's: 0.0039" in said
    found = json.loads((tmp_path / "results.json").read_text(), parse_constant=no_constant)
    failed = found["models"][0]
    assert {trial["validation_loss"] for trial in failed["tuning"]} == {None}
    assert failed["runs"][0]["validation_loss"] is failed["lengths"] is failed["attention"] is None
    assert all(entry["seeds"] == [None] for entry in failed["tasks"]["s3"])
    assert found["models"][1]["lengths"]["lengths"][-1]["last"] is None
    text, shown = whole_report(tmp_path)
    for report in (text, shown):
        assert "gla diverged in 1 of 1 runs: seed 0 at step 10" in report
        assert "Diverged at s3: gla in 1 of 1 trials." in report
        assert "Diverged at every rate tried" in report
    assert text.count("| gla | diverged") == 1, "inside the models"
    assert text.count("| diverged |") >= 4 + 2 + 3, "in the tables of the task, rates and results"


def test_everything_diverged(tmp_path):
    measured = everything()
    for one in measured["models"]:
        for seed in range(3):
            diverged(one, seed=seed)
        with_failures(with_failures(one, "recall", (0, 1)), "parity", (0, 1))
        one |= {"lengths": None, "attention": None, "sample": {"prompt": "The", "text": ""}}
        one["tuning"] = [trial | {"validation_loss": None} for trial in one["tuning"]]
    write_report(json.loads(json.dumps(measured)), tmp_path)
    text, _ = whole_report(tmp_path)
    assert text.count("diverged in 3 of 3 runs") == 4
    assert "Diverged at parity: rwkv7 in 2 of 2 trials, attention in 2 of 2 trials" in text
    assert "its recipe's is taken: rwkv7 0.001, attention 0.001, gla 0.001 and rwkv4 0.001" in text
    assert "the best was taken" not in text
    assert "is ahead" not in text


def test_a_trial_that_diverged_leaves_its_mixer_out_of_that_task():
    """It would have won by the seed that is left."""
    best = with_failures(asked(rwkv7(1.4), (0.99,) * 4, PARITY), "recall", (0,))
    models = best, asked(attention(1.4), RECALL, PARITY), asked(gla(1.4), (0.1,) * 4, PARITY)
    ahead, failed = said_of("recall", *models)
    assert ahead == (
        "recall at its last point (num pairs 32): attention is ahead (attention 60.0 ± 12.7 %, gla "
        "10.0 ± 12.7 %)."
    )
    assert failed == (
        "Diverged at recall: rwkv7 in 1 of 2 trials. A mixer is not compared where one of its "
        "trials diverged."
    )
    assert len(said_of("parity", *models)) == 1, "nothing diverged there"
    report, shown = report_text(results(*models)), page(results(*models))
    assert "| num pairs 32 | 100.0 %, 1 diverged | 60.0 ± 12.7 % |" in report
    assert "<figcaption>Diverged at recall: rwkv7 in 1 of 2 trials.</figcaption>" in shown


def test_trials_are_counted_once_a_width():
    one = asked(rwkv7(1.4), RECALL, PARITY)
    entries = one["tasks"]["recall"]
    for entry, width in zip(entries, (64, 64, 32, 32), strict=True):
        entry["point"] = {"width": width} | entry["point"]
    for entry in entries[:2]:
        entry["seeds"] = [None, 0.5]
    (only, failed) = said_of("recall", one)
    assert only.endswith("(width 32, num pairs 32): rwkv7 60.0 ± 12.7 %.")
    assert failed.startswith("Diverged at recall: rwkv7 in 1 of 4 trials.")


def test_models_of_several_widths_have_a_chart_each():
    """In one chart a line went from the hardest point of a width to the easiest of the next."""
    one = asked(rwkv7(1.4), RECALL, PARITY)
    entries = one["tasks"]["recall"]
    for entry, width in zip(entries, (64, 64, 32, 32), strict=True):
        entry["point"] = {"width": width} | entry["point"]
    charts = task_charts([one])
    assert [chart.title for chart in charts["recall"]] == [
        "Task: recall, width 64",
        "Task: recall, width 32",
    ]
    pairs = [entry["point"]["num_pairs"] for entry in entries]
    xs = [x for chart in charts["recall"] for x, _ in chart.lines[0].points]
    assert xs == pairs
    assert [chart.x.label for chart in charts["recall"]] == ["num pairs"] * 2
    assert [chart.title for chart in charts["parity"]] == ["Task: parity"]


@pytest.mark.parametrize(
    ("lost", "line"),
    [
        ((), None),
        ((0,), "Diverged at some of the rates tried: rwkv7 at 1 of 3."),
        ((0, 1, 2), "Diverged at every rate tried, so that its recipe's is taken: rwkv7 0.002."),
    ],
)
def test_rates_that_diverged_are_said(lost, line):
    measured = everything()
    one = measured["models"][0]
    one["learning_rate"] = 2e-3
    for place in lost:
        one["tuning"][place]["validation_loss"] = None
    said = summary_lines(measured)
    assert [text for text in said if text.startswith("Diverged at")] == ([line] if line else [])
    of_the_best = "the best was taken: rwkv7 0.002" in "\n".join(said)
    assert of_the_best is ("The best rate of rwkv7 is at an end" in "\n".join(said))
    assert of_the_best is (len(lost) < 3)
    assert report_text(measured).count("| diverged |  |") + report_text(measured).count(
        "| diverged | taken |"
    ) == len(lost)
    assert ("Not drawn: " in page(measured)) is bool(lost)


def test_a_loss_at_some_length_that_is_no_number_is_said(tmp_path, monkeypatch):
    """The same sentences before and after it has been null in a file; the others are drawn."""
    monkeypatch.setattr(lengths_plot, "say_empty", lambda *_: pytest.fail("others have losses"))
    broken = with_lengths(attention(1.4), 0.4)
    for entry in broken["lengths"]["lengths"][3:]:
        entry |= dict.fromkeys(("loss", "last", "gain", "margin"), math.nan)
    for entry in broken["lengths"]["positions"]:
        entry["loss"] = math.nan
    before = said_of("attention:", rwkv7(1.4), broken)
    broken["lengths"] = made._without_nan(broken["lengths"])
    measured = results(with_lengths(rwkv7(1.4), 0), broken)
    write_report(json.loads(json.dumps(measured, allow_nan=False)), tmp_path)
    text, _ = whole_report(tmp_path)
    assert said_of("attention:", rwkv7(1.4), broken) == before
    assert before[-1] == "attention: with 8,192 tokens the loss is not a finite number."
    assert "attention none that is finite" in text
    assert "| 8,192 | 3.9000 | not finite |" in text
