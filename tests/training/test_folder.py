"""The folder of a run: one process at a time, whole files or none, and a disk that fills up."""

import shutil
import subprocess

import pytest
import torch
from runs import TINY, contents, ebb, largest_file, only_line, repeatable
from safetensors.torch import load_file

from train.checkpoint import locked, save_json, save_weights, write_atomically


@pytest.fixture
def stopped(killed, tmp_path):
    return shutil.copytree(killed.folder, tmp_path / "run", ignore=shutil.ignore_patterns(".lock"))


def test_second_process_in_a_folder_is_refused(killed):
    assert killed.second_status == 1
    assert only_line(killed.second_error) == (
        f"Another process is writing to {killed.folder}: wait for it, or choose another place."
    )


def test_lock_dies_with_its_process(killed):
    """The lock's file is still there; nobody holds it."""
    with locked(killed.folder), pytest.raises(ValueError, match="Another process is writing to"):
        locked(killed.folder).__enter__()
    with locked(killed.folder):
        pass


# The weights have 4 MB and the state of the optimiser 8 MB; config.json has some hundred bytes, and
# a limit below 1 KB also stops metrics.jsonl, which is written again at the start.
@pytest.mark.parametrize("limit", [600, 2_000_000, 6_000_000])
def test_full_disk_leaves_the_checkpoints_as_they_are(stopped, reference, capsys, limit):
    before = contents(stopped)
    with largest_file(limit):
        assert ebb("train", "--resume", "--out", stopped) == 1
    said = only_line(capsys.readouterr().err)
    assert "cannot be written (" in said
    assert said.endswith(": make room or choose another place.")
    after = contents(stopped)
    checkpoint = [name for name in before if name.startswith("resume/")]
    assert {name: after[name] for name in checkpoint} == {name: before[name] for name in checkpoint}
    newest = max(name for name in before if name.endswith("/model.safetensors"))
    assert after["model.safetensors"] in (before["model.safetensors"], before[newest])
    left = {name for name in after if ".tmp" in name}
    assert left <= before.keys(), "more than the killed process may have left"
    assert ebb("eval", stopped, "--max-tokens", "20") == 0
    assert ebb("train", "--resume", "--out", stopped) == 0
    model = "model.safetensors"
    assert (stopped / model).read_bytes() == (reference / model).read_bytes()
    assert repeatable(stopped) == repeatable(reference)


@pytest.fixture
def small_disk(tmp_path):
    """A disk that holds one snapshot and the weights twice, but no second snapshot."""
    place = tmp_path / "disk"
    place.mkdir()
    if mount("-t", "tmpfs", "-o", "size=30m", "none", place):
        pytest.skip("only root can make a small disk; the limits above stand in for it")
    yield place
    subprocess.run(["umount", place], check=True)


def mount(*args):
    """The exit status of `mount`."""
    try:
        return subprocess.run(["mount", *args], capture_output=True).returncode
    except OSError:
        return 1


def test_disk_that_is_really_full(flags, reference, small_disk, capsys):
    run = small_disk / "run"
    assert ebb("train", *flags, "--out", run) == 1
    said = only_line(capsys.readouterr().err)
    assert said == (
        f"{run / 'resume' / 'step-000000010'} cannot be written (No space left on device): "
        "make room or choose another place."
    )
    assert [path.name for path in (run / "resume").iterdir()] == ["step-000000005"]
    assert ebb("eval", run, "--max-tokens", "20") == 0
    assert mount("-o", "remount,size=100m", small_disk) == 0
    assert ebb("train", "--resume", "--out", run) == 0
    for name in ("model.safetensors", "best.safetensors"):
        assert (run / name).read_bytes() == (reference / name).read_bytes()
    assert repeatable(run) == repeatable(reference)


def test_full_disk_at_the_start(workshop, reference, tmp_path, capsys):
    flags = ["--data", workshop / "text.txt", *TINY, "--steps", "2"]
    with largest_file(100):
        assert ebb("train", *flags, "--out", tmp_path / "new") == 1
    said = only_line(capsys.readouterr().err)
    assert said.startswith(f"{tmp_path / 'new' / 'config.json'} cannot be written (")
    assert ebb("train", *flags, "--out", tmp_path / "new") == 0


def test_file_that_cannot_be_written_stays_as_it_was(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_weights(path, {"w": torch.ones(1000)})
    with largest_file(3000), pytest.raises(ValueError, match="cannot be written"):
        save_weights(path, {"w": torch.zeros(1000)})
    assert torch.equal(load_file(path)["w"], torch.ones(1000))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_file_is_never_seen_half_written(tmp_path):
    path = tmp_path / "value.json"
    save_json(path, {"before": 1})

    def write(beside):
        beside.write_text("{")
        assert path.read_text() == '{\n  "before": 1\n}\n'
        beside.write_text("{}")

    write_atomically(path, write)
    assert path.read_text() == "{}"


def test_out_that_is_a_file_is_refused(workshop, capsys):
    file = workshop / "text.txt"
    before = file.read_bytes()
    assert ebb("train", "--data", file, *TINY, "--out", file) == 1
    assert only_line(capsys.readouterr().err).startswith(f"{file} cannot be written (")
    assert file.read_bytes() == before


def test_weights_have_the_permissions_of_any_other_file(tmp_path):
    (tmp_path / "other").write_text("x")
    save_weights(tmp_path / "model.safetensors", {"w": torch.ones(2)})
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1
