"""Runs that several files of tests look at: each is made once."""

import signal
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from runs import STEPS, TINY, ebb, has_logged, start_ebb, wait_for, workplace


class Killed(NamedTuple):
    """A run whose process was killed, and how a second one fared beside it."""

    folder: Path
    second_status: int
    second_error: str


@pytest.fixture(autouse=True)
def _threads():
    """`--threads` holds for a whole process, which here is that of all tests."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    """A folder with `text.txt`, and a cache of tokens beside it."""
    with workplace(tmp_path_factory.mktemp("training")) as folder:
        yield folder


@pytest.fixture(scope="session")
def flags(workshop):
    """Of the run that is interrupted in many ways: metrics, validation and saving out of step."""
    intervals = ["--log-every", "7", "--eval-every", "10", "--save-every", "5"]
    return [
        *("--data", str(workshop / "text.txt"), "--steps", str(STEPS), "--sample-every", "0"),
        *TINY,
        *intervals,
    ]


@pytest.fixture(scope="session")
def reference(workshop, flags):
    """The run from beginning to end in one go, in this process."""
    threads = torch.get_num_threads()
    folder = workshop / "reference"
    assert ebb("train", *flags, "--out", folder) == 0
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="session")
def killed(workshop, flags):
    """The same run, killed on the way; while it was held up, a second process tried its folder."""
    folder = workshop / "killed"
    process = start_ebb("train", *flags, "--out", folder)
    wait_for(lambda: has_logged(folder, 2) and len(list(_snapshots(folder))) == 2, process)
    process.send_signal(signal.SIGSTOP)
    second = start_ebb("train", "--resume", "--out", folder)
    _, error = second.communicate()
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    return Killed(folder, second.returncode, error)


def _snapshots(folder):
    return (folder / "resume").glob("step-*")


@pytest.fixture(scope="session")
def interrupted(workshop, flags):
    """The same run, interrupted by Ctrl-C; and what its process left behind."""
    folder = workshop / "inter rupted"
    process = start_ebb("train", *flags, "--out", folder)
    wait_for(lambda: has_logged(folder, 1), process)
    process.send_signal(signal.SIGINT)
    output, error = process.communicate()
    return folder, subprocess.CompletedProcess([], process.returncode, output, error)
