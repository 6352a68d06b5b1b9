"""A run that was stopped, in whatever way, ends as if it had not been."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runs import (
    STEPS,
    TINY,
    contents,
    ebb,
    metrics,
    only_line,
    repeatable,
    write_text,
)
from safetensors.torch import load_file

from train import snapshot
from train.snapshot import load_snapshot


@pytest.fixture
def stopped(killed, tmp_path):
    """A copy of the killed run, to go on with or to damage."""
    return shutil.copytree(killed.folder, tmp_path / "run", ignore=shutil.ignore_patterns(".lock"))


def snapshots(folder):
    return sorted((folder / "resume").glob("step-*"))


def assert_same_end(folder, reference):
    for name in ("model.safetensors", "best.safetensors", "config.json", "tokenizer.json"):
        assert (folder / name).read_bytes() == (reference / name).read_bytes(), name
    assert repeatable(folder) == repeatable(reference)


def test_interrupt_saves_says_how_to_resume_and_resumes_exactly(interrupted, reference, capsys):
    folder, ended = interrupted
    assert ended.returncode == 130
    assert ended.stdout == ""
    match = re.fullmatch(
        rf"Saved after step (\d+) of {STEPS}; go on with: ebb (.*)", only_line(ended.stderr)
    )
    step, command = int(match[1]), shlex.split(match[2])
    assert 0 < step < STEPS
    assert command == ["train", "--resume", "--out", str(folder)]
    assert snapshots(folder)[-1].name == f"step-{step:09d}"
    assert load_file(folder / "model.safetensors").keys()
    assert ebb(*command) == 0
    assert f"Going on after step {step}." in capsys.readouterr().err
    assert_same_end(folder, reference)


@pytest.fixture
def signals(monkeypatch):
    """Sends signals to this process while it writes the first snapshot of a step or later."""

    def send(step, *numbers):
        write = snapshot.save_file
        left = list(numbers)

        def save_file(tensors, path):
            write(tensors, path)
            if path.name == "optimizer.safetensors" and int(path.parent.name[6:-4]) >= step:
                while left:
                    signal.raise_signal(left.pop(0))

        monkeypatch.setattr(snapshot, "save_file", save_file)

    return send


def test_sigterm_saves_too(flags, reference, signals, tmp_path, capsys):
    signals(10, signal.SIGTERM)
    assert ebb("train", *flags, "--out", tmp_path) == 130
    said = only_line(capsys.readouterr().err)
    assert said.startswith(f"Saved after step 10 of {STEPS}; go on with: ebb train --resume --out ")
    assert ebb("train", "--resume", "--out", tmp_path) == 0
    assert_same_end(tmp_path, reference)


@pytest.mark.parametrize("step", [5, 10])
def test_second_interrupt_stops_at_once_and_corrupts_nothing(
    flags, reference, signals, tmp_path, capsys, step
):
    """Here amid the writing of a snapshot: of the first one, and of another."""
    signals(step, signal.SIGINT, signal.SIGINT)
    assert ebb("train", *flags, "--out", tmp_path) == 130
    said = only_line(capsys.readouterr().err)
    assert said == f"Stopped at once; go on with: ebb train --resume --out {tmp_path}"
    assert [path.name for path in snapshots(tmp_path)] == ["step-000000005"][: step > 5]
    assert (load_snapshot(tmp_path, pytest.fail) is None) == (step == 5)
    assert ebb("train", "--resume", "--out", tmp_path) == 0
    assert_same_end(tmp_path, reference)


def test_runs_stopped_at_random_moments_end_alike():
    """Real processes, stopped for real, in six ways; more of it by hand, as the script says."""
    script = Path(__file__).parents[1] / "soak" / "crash.py"
    command = [sys.executable, "-W", "error", str(script), "--stops", "9"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "every run ended as the one that was never stopped" in ended.stdout


def test_killed_run_resumes_exactly(stopped, reference):
    assert metrics(stopped)[-1]["step"] < STEPS
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"step": 28, "lo')  # a line cut short
    (stopped / "resume" / ".step-000000012.tmp").mkdir()  # and a snapshot
    assert ebb("train", "--resume", "--out", stopped) == 0
    assert_same_end(stopped, reference)
    assert [path.name for path in snapshots(stopped)] == ["step-000000025", "step-000000028"]
    assert not list((stopped / "resume").glob(".*")), "the unfinished snapshot is left behind"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "training.json"])
def test_truncated_snapshot_is_named_and_the_one_before_used(stopped, reference, capsys, name):
    older, newest = snapshots(stopped)
    for file in newest.iterdir():
        if name == file.name:
            with file.open("r+b") as opened:
                opened.truncate(file.stat().st_size // 2)
    assert ebb("train", "--resume", "--out", stopped) == 0
    said = capsys.readouterr().err
    assert f"{newest} is damaged" in said
    assert f"Going on after step {int(older.name.removeprefix('step-'))}." in said
    assert_same_end(stopped, reference)


def test_run_without_a_whole_snapshot_is_not_overwritten(stopped, capsys):
    for path in snapshots(stopped):
        (path / "model.safetensors").unlink()
    before = contents(stopped)
    assert ebb("train", "--resume", "--out", stopped) == 1
    assert "would overwrite them: choose another --out" in only_line(capsys.readouterr().err)
    assert contents(stopped) == before


def test_snapshot_holds_the_step_and_all_of_the_optimizer(stopped):
    snapshot = load_snapshot(stopped, pytest.fail)
    assert snapshot.step == int(snapshots(stopped)[-1].name.removeprefix("step-"))
    assert snapshot.progress["step"] == snapshot.step
    groups = snapshot.optimizer["param_groups"]
    count = sum(len(group["params"]) for group in groups)
    assert count == len(snapshot.weights)
    assert set(snapshot.optimizer["state"]) == set(range(count))
    assert all(
        entry["step"] == snapshot.step and entry["exp_avg_sq"].min() >= 0
        for entry in snapshot.optimizer["state"].values()
    )


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--learning-rate", "0.5", "learning-rate None, not 0.5"),
        ("--mixer", "attention", "mixer rwkv7, not attention"),
        ("--steps", "50", "steps 28, not 50"),
        ("--seed", "3", "seed 0, not 3"),
    ],
)
def test_another_setting_is_refused_on_resume(stopped, capsys, flag, value, said):
    before = contents(stopped)
    assert ebb("train", "--resume", "--out", stopped, flag, value) == 1
    assert f"was made with {said}: " in only_line(capsys.readouterr().err)
    assert contents(stopped) == before


def test_intervals_may_change_on_resume(stopped, reference):
    changed = {"log_every": 5, "eval_every": 20, "sample_every": 28, "save_every": 28}
    args = [x for name, n in changed.items() for x in (f"--{name.replace('_', '-')}", n)]
    before = metrics(stopped)
    step = int(snapshots(stopped)[-1].name.removeprefix("step-"))
    assert ebb("train", "--resume", "--out", stopped, *args) == 0
    lines = metrics(stopped)
    kept = [line for line in before if line["step"] <= step]
    assert lines[: len(kept)] == kept
    logged = [line["step"] for line in lines[len(kept) :] if "loss" in line]
    assert logged == [n for n in range(step + 1, STEPS + 1) if n % 5 == 0 or n == STEPS]
    validated = [line["step"] for line in lines[len(kept) :] if "validation_loss" in line]
    assert validated == [n for n in (20, STEPS) if n > step]
    model = "model.safetensors"
    assert (stopped / model).read_bytes() == (reference / model).read_bytes()
    settings = json.loads((stopped / "config.json").read_text())["train"]
    assert {name: settings[name] for name in changed} == changed


def test_folder_with_a_run_is_refused_without_resume(reference, flags, capsys):
    before = contents(reference)
    assert ebb("train", *flags, "--out", reference) == 1
    said = only_line(capsys.readouterr().err)
    assert said == (
        f"{reference} already holds a run: add --resume to go on with it, or choose another --out."
    )
    assert contents(reference) == before


def test_finished_run_resumes_to_nothing(reference, capsys):
    before = contents(reference)
    assert ebb("train", "--resume", "--out", reference) == 0
    last = metrics(reference)[-1]
    assert f"validation {last['validation_loss']:.4f} nats/token" in capsys.readouterr().out
    assert contents(reference) == before


def test_resume_without_a_checkpoint_starts_afresh_and_equal_runs_give_equal_bytes(
    flags, reference, tmp_path
):
    assert ebb("train", "--resume", *flags, "--out", tmp_path / "new") == 0
    assert_same_end(tmp_path / "new", reference)


def test_resume_before_the_first_checkpoint_starts_afresh(stopped, reference):
    """As after a kill in the first steps: settings and metrics, but nothing saved."""
    shutil.rmtree(stopped / "resume")
    (stopped / "model.safetensors").unlink()
    assert ebb("train", "--resume", "--out", stopped) == 0
    assert_same_end(stopped, reference)


def test_another_vocabulary_is_refused_on_resume(stopped, capsys):
    path = stopped / "tokenizer.json"
    definition = json.loads(path.read_text())
    extra = dict(definition["added_tokens"][-1], id=300, content="<|more|>")
    definition["added_tokens"].append(extra)
    path.write_text(json.dumps(definition))
    before = contents(stopped)
    assert ebb("train", "--resume", "--out", stopped) == 1
    said = only_line(capsys.readouterr().err)
    assert "does not fit config.json and tokenizer.json: embedding.weight" in said
    assert contents(stopped) == before


def test_text_that_has_changed_since_is_refused(workshop, tmp_path, capsys):
    text = write_text(tmp_path / "text.txt")
    run = ("train", "--data", text, *TINY, "--steps", "4", "--out", tmp_path / "run")
    assert ebb(*run) == 0
    before = contents(tmp_path / "run")
    write_text(tmp_path / "text.txt", seed=1)
    capsys.readouterr()
    assert ebb("train", "--resume", "--out", tmp_path / "run") == 1
    assert "has changed since it began" in only_line(capsys.readouterr().err)
    assert contents(tmp_path / "run") == before
