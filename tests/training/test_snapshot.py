"""`resume/step-N/`: whole or not there, enough by itself, and the newest whole one counts."""

import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from runs import ebb, repeatable

from train import checkpoint as files
from train.snapshot import Snapshot, load_snapshot, newest_before, restore, save_snapshot


@pytest.fixture
def stopped(killed, tmp_path):
    return shutil.copytree(killed.folder, tmp_path / "run", ignore=shutil.ignore_patterns(".lock"))


def snapshot(step):
    weight = torch.full((3,), float(step))
    state = {0: {"step": torch.tensor(float(step)), "exp_avg": -weight}}
    optimizer = {"state": state, "param_groups": [{"lr": 0.1, "params": [0]}]}
    return Snapshot(step, {"w": weight}, optimizer, {"step": step}, {"mine": weight + 1})


def names(folder):
    return sorted(path.name for path in (folder / "resume").iterdir())


def step_folder(folder, step):
    return folder / "resume" / f"step-{step:09d}"


def test_what_is_saved_is_loaded(tmp_path):
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / name).write_text(name)
    save_snapshot(tmp_path, snapshot(7))
    loaded = load_snapshot(tmp_path, pytest.fail)
    torch.testing.assert_close(loaded._asdict(), snapshot(7)._asdict(), rtol=0, atol=0)
    assert (step_folder(tmp_path, 7) / "metrics.jsonl").read_text() == "metrics.jsonl"


@pytest.mark.parametrize("keep", [1, 3])
def test_so_many_are_kept(tmp_path, keep):
    for step in range(1, 6):
        save_snapshot(tmp_path, snapshot(step), keep)
    assert names(tmp_path) == [f"step-{step:09d}" for step in range(6 - keep, 6)]


def test_damaged_one_of_a_later_step_is_not_kept_in_place_of_a_whole_one(tmp_path):
    """As when a run goes on from before it, and is stopped before it gets there again."""
    save_snapshot(tmp_path, snapshot(4), keep=1)
    step_folder(tmp_path, 4).rename(step_folder(tmp_path, 9))
    save_snapshot(tmp_path, snapshot(5), keep=1)
    assert names(tmp_path) == ["step-000000005"]


def test_one_that_goes_is_not_seen_half_removed(tmp_path, monkeypatch):
    """As when the process is killed while it removes the files."""
    for step in (1, 2):
        save_snapshot(tmp_path, snapshot(step))
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: next(path.iterdir()).unlink())
    save_snapshot(tmp_path, snapshot(3))
    monkeypatch.undo()
    seen = [name for name in names(tmp_path) if not name.startswith(".")]
    assert seen == ["step-000000002", "step-000000003"]
    save_snapshot(tmp_path, snapshot(4))
    assert names(tmp_path) == ["step-000000003", "step-000000004"]


def test_every_flipped_bit_is_found(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    save_snapshot(tmp_path, snapshot(1))
    save_snapshot(tmp_path, snapshot(2))
    whole = step_folder(tmp_path, 2)
    assert newest_before(tmp_path, 3) == 2
    for file in sorted(whole.iterdir()):
        before = bytearray(file.read_bytes())
        file.write_bytes(before[:-2] + bytes([before[-2] ^ 1]) + before[-1:])
        said = []
        assert load_snapshot(tmp_path, said.append).step == 1, file.name
        assert len(said) == 1
        assert said[0].startswith(f"{whole} is damaged (")
        assert newest_before(tmp_path, 3) == 1
        file.write_bytes(before)
    assert load_snapshot(tmp_path, pytest.fail).step == 2


def test_files_are_put_back_where_they_differ(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("then")
    save_snapshot(tmp_path, snapshot(1))
    (tmp_path / "metrics.jsonl").write_text("then and later")
    restore(tmp_path, 1, ["metrics.jsonl", "model.safetensors", "best.safetensors"])
    assert (tmp_path / "metrics.jsonl").read_text() == "then"
    saved = step_folder(tmp_path, 1) / "model.safetensors"
    assert (tmp_path / "model.safetensors").read_bytes() == saved.read_bytes()
    assert not (tmp_path / "best.safetensors").exists()


@pytest.fixture
def disk(monkeypatch):
    """What reaches the disk, and when it gets its name: `(call, path)` in order."""
    events, flush, rename = [], os.fsync, os.rename

    def fsync(descriptor):
        events.append(("flush", Path(f"/proc/self/fd/{descriptor}").readlink()))
        flush(descriptor)

    def renamed(source, target, **options):
        events.append(("rename", Path(source), Path(target)))
        rename(source, target, **options)

    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, renamed)
    return events


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="tells descriptors by /proc")
def test_all_of_a_snapshot_is_on_the_disk_before_it_has_its_name(disk, tmp_path):
    save_snapshot(tmp_path / "new" / "run", snapshot(3))
    resume = tmp_path / "new" / "run" / "resume"
    beside, final = resume / ".step-000000003.tmp", step_folder(tmp_path / "new" / "run", 3)
    named = disk.index(("rename", beside, final))
    before, after = disk[:named], disk[named + 1 :]
    for path in final.iterdir():
        assert ("flush", beside / path.name) in before, path.name
    assert ("flush", beside) in before, "the names in the folder"
    for made in (tmp_path, tmp_path / "new", tmp_path / "new" / "run"):
        assert ("flush", made) in before, "the name of the folder in it"
    assert ("flush", resume) in after


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="tells descriptors by /proc")
def test_a_file_is_on_the_disk_before_it_has_its_name(disk, tmp_path):
    files.save_json(tmp_path / "a.json", 1)
    beside = tmp_path / ".a.json.tmp"
    assert disk == [
        ("flush", beside),
        ("rename", beside, tmp_path / "a.json"),
        ("flush", tmp_path),
    ]


def test_loss_of_power_may_take_all_but_one_snapshot(stopped, reference, capsys):
    """Every other file is cut short, whether it is read at the start or not."""
    older, newest = sorted((stopped / "resume").iterdir())
    for path in stopped.rglob("*"):
        if path.is_file() and path.parent != older:
            os.truncate(path, path.stat().st_size // 3)
    assert ebb("train", "--resume", "--out", stopped) == 0
    assert f"{newest} is damaged (" in capsys.readouterr().err
    for name in ("model.safetensors", "best.safetensors", "config.json", "tokenizer.json"):
        assert (stopped / name).read_bytes() == (reference / name).read_bytes(), name
    assert repeatable(stopped) == repeatable(reference)


def test_weights_missing_from_a_finished_run_are_put_back(reference, tmp_path):
    """As when it is killed after its last snapshot, before the weights."""
    run = shutil.copytree(reference, tmp_path / "run", ignore=shutil.ignore_patterns(".lock"))
    weights = run / "model.safetensors"
    weights.unlink()
    assert ebb("train", "--resume", "--out", run) == 0
    assert weights.read_bytes() == (reference / "model.safetensors").read_bytes()


def test_a_snapshot_is_a_checkpoint_of_its_own(stopped, capsys):
    """The weights of any step that was kept can be looked at."""
    newest = max((stopped / "resume").iterdir())
    assert ebb("eval", newest, "--max-tokens", "20") == 0
    assert ebb("eval", newest, "--max-tokens", "20", "--best") == 0
    assert "bits per byte" in capsys.readouterr().out
    assert all(stat.S_ISREG(path.stat().st_mode) for path in newest.iterdir())
