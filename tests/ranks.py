"""Commands started as a launcher starts them: once a rank, each told which one it is."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from runs import PATIENCE

Process = subprocess.Popen[str]


def free_port() -> str:
    """Where the ranks can meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start_ranks(count: int, *command: object) -> list[Process]:
    """`python COMMAND` in so many processes with one thread each; warnings are errors."""
    world = {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]),
    }
    return [
        subprocess.Popen(
            [sys.executable, "-W", "error", *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]


def start_training(count: int, *args: object) -> list[Process]:
    """`ebb train ARGS`."""
    return start_ranks(count, "-m", "train.cli", "train", *args)


def ended(processes: list[Process]) -> list[subprocess.CompletedProcess[str]]:
    """Waits for all of them; none may be stuck."""
    try:
        said = [process.communicate(timeout=PATIENCE) for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.kill()
        said = [process.communicate() for process in processes]
    return [
        subprocess.CompletedProcess([], process.returncode, output, error)
        for process, (output, error) in zip(processes, said, strict=True)
    ]
