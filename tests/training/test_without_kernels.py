"""A machine without compiled kernels trains too, and hears once what would make it faster."""

import pytest
from runs import TINY, ebb

from model.ops.native import loading


@pytest.fixture
def no_library(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "FOLDER", tmp_path)
    loading._load.cache_clear()
    yield
    loading._load.cache_clear()


@pytest.mark.parametrize(("mixer", "times"), [("rwkv7", 1), ("attention", 0)])
def test_training_says_once_that_there_are_no_kernels(
    workshop, tmp_path, capsys, no_library, mixer, times
):
    data = ["--data", str(workshop / "text.txt"), "--steps", "2", "--sample-every", "0", *TINY]
    assert ebb("train", *data, "--mixer", mixer, "--out", tmp_path / "run") == 0
    told = " ".join(capsys.readouterr().err.split())
    notice = "The recurrence runs in plain PyTorch: no compiled kernels: install a C++ compiler"
    assert told.count(notice) == times
