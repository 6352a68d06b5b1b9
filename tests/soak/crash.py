"""Runs that are stopped in every way, at random moments, and must end as one that never was.

    python tests/soak/crash.py --stops 500 --seed 1
    python tests/soak/crash.py --stops 100 --threads 2 --flags '--mixer mamba2 --carry-state'
    python tests/soak/crash.py --stops 20 --compile

Every attempt is a process of its own (forked, so that PyTorch is loaded only once), which goes on
with the run and is stopped for real:

    kill    SIGKILL
    int     Ctrl-C                      term    SIGTERM
    twice   Ctrl-C, and again at once or soon after
    power   SIGKILL; then the newest files are cut short, as when the power fails
    disk    no file can grow beyond a random size (RLIMIT_FSIZE), as when the disk is full

After each of them what is in the folder must be whole (but for what was cut on purpose). When a run
has come to its end, weights, best weights, optimiser, random numbers, settings, tokenizer and
metrics (all but times) are compared, byte by byte, with those of a run in one go, and the next
begins. With `--compile` every third attempt or so finds nothing that the compiler made before.
"""

import argparse
import collections
import json
import os
import random
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from runs import TINY, repeatable, write_text  # noqa: E402  # where it is, is said above
from safetensors.torch import load_file  # noqa: E402

from train.cli import main  # noqa: E402
from train.snapshot import check_snapshot  # noqa: E402

STEPS = 40
INTERVALS = ["--log-every", "3", "--eval-every", "10", "--save-every", "2", "--sample-every", "0"]
EQUAL = ("model.safetensors", "best.safetensors", "config.json", "tokenizer.json")
EQUAL_IN_SNAPSHOT = ("model.safetensors", "optimizer.safetensors", "extra.safetensors")
TIMES = ("seconds", "speeds", "stretch_seconds")
HOWS = ("kill", "int", "term", "twice", "power", "disk")
LARGEST = 12_000_000
"""Bytes, more than the largest file of a run has."""
PATIENCE = 900.0
FORGOTTEN = 0.3
"""How often an attempt compiles everything anew."""
LONGER = 1.5
"""Times as long as the one before works an attempt after one that saved nothing, on average."""


def start(args: list[str], said: Path, limit: int | None = None) -> int:
    """`ebb train ARGS` in a new process, what it says in a file; its number."""
    number = os.fork()
    if number:
        return number
    status = 70
    try:
        target = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, 1)
        os.dup2(target, 2)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        # A file that Python was reading when Ctrl-C came is its own; a user is not told either.
        warnings.simplefilter("ignore", ResourceWarning)
        status = main(["train", *args])
        sys.stdout.flush()
    except BaseException:  # noqa: BLE001  # a forked child must not go on with its parent's work
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def wait(number: int, seconds: float) -> int | None:
    """The exit status of a process, negative for a signal; None if it is still running then."""
    deadline = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(number, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.002)


def stop(number: int, how: str, draw: random.Random, seconds: float) -> int:
    """Lets a process work for some time and stops it; its exit status."""
    status = wait(number, seconds)
    if status is not None or how == "disk":
        return wait_to_end(number) if status is None else status
    sent = {"int": signal.SIGINT, "twice": signal.SIGINT, "term": signal.SIGTERM}
    os.kill(number, sent.get(how, signal.SIGKILL))
    if how == "twice":
        status = wait(number, draw.choice([0.0, draw.uniform(0, 0.1)]))
        if status is None:
            os.kill(number, signal.SIGINT)
    return wait_to_end(number) if status is None else status


def wait_to_end(number: int) -> int:
    """The exit status; a process that hangs is an error."""
    status = wait(number, PATIENCE)
    if status is None:
        os.kill(number, signal.SIGKILL)
        raise AssertionError("the process hangs")
    return status


def cut_newest(folder: Path, draw: random.Random) -> set[Path]:
    """Cuts the newest files short, but for those of one whole snapshot; which they were."""
    whole = next(filter(is_whole, sorted(snapshots(folder))), None)
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    if whole is None:  # the settings reached the disk before the first step
        files = [path for path in files if path.name != "config.json"]
    files = [path for path in files if path.parent != whole]
    files.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    chosen = files[: draw.randint(1, max(1, len(files)))]
    for path in chosen:
        os.truncate(path, draw.randrange(path.stat().st_size) if path.stat().st_size else 0)
    return set(chosen)


def snapshots(folder: Path) -> set[Path]:
    """Those in the folder of a run, whole or not."""
    return set((folder / "resume").glob("step-*"))


def is_whole(snapshot: Path) -> bool:
    """Whether a snapshot is as it was written."""
    try:
        check_snapshot(snapshot)
    except (OSError, ValueError):
        return False
    return True


def check_whole(folder: Path, cut: set[Path]) -> None:
    """Everything in place can be read, but what was cut; what is unfinished has another name."""
    for snapshot in snapshots(folder):
        assert is_whole(snapshot) or cut & set(snapshot.iterdir()), snapshot
    for path in {*folder.glob("*.safetensors"), *folder.glob("*.json")} - cut:
        load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text())


def check_end(folder: Path, reference: Path) -> None:
    """The run has come to the same end as the one that was never stopped."""
    for name in EQUAL:
        assert (folder / name).read_bytes() == (reference / name).read_bytes(), name
    assert repeatable(folder) == repeatable(reference), "metrics"
    last = Path("resume") / f"step-{STEPS:09d}"
    for name in EQUAL_IN_SNAPSHOT:
        assert (folder / last / name).read_bytes() == (reference / last / name).read_bytes(), name
    one, two = (
        json.loads((run / last / "training.json").read_text()) for run in (folder, reference)
    )
    for values in (one["progress"], two["progress"]):
        for name in TIMES:
            del values[name]
    assert one == two, "training.json"


def check_status(how: str, status: int, said: str) -> None:
    """A process ends as it is told, or is done, and never with a traceback."""
    allowed = {
        "kill": (-signal.SIGKILL,),
        "power": (-signal.SIGKILL,),
        "int": (130,),
        "twice": (130,),
        "term": (130, -signal.SIGTERM),  # before the first step there is nothing to save
        "disk": (1,),
    }[how]
    assert status in (0, *allowed), f"{how}: exit status {status}\n{said}"
    assert "Traceback" not in said or "KeyboardInterrupt" in said, said
    if status == 1:
        assert "cannot be written" in said, said


def soak(flags: list[str], stops: int, seed: int, work: Path) -> collections.Counter[str]:
    """Stops runs `stops` times; what was done, counted."""
    draw, counts = random.Random(seed), collections.Counter[str]()
    flags = [*flags, "--data", str(write_text(work / "text.txt")), "--steps", str(STEPS)]
    os.environ["XDG_CACHE_HOME"] = str(work / "cache")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(work / "compiled")
    reference, run, said = work / "reference", work / "run", work / "said"
    begin = time.monotonic()
    status = wait_to_end(start([*flags, "--out", str(reference)], said))
    assert status == 0, said.read_text()
    machine = json.loads((reference / "config.json").read_text())["machine"]
    assert machine["compile"] == ("--compile" in flags), said.read_text()
    whole = time.monotonic() - begin
    hows: list[str] = []
    cut: set[Path] = set()
    fruitless = 0  # attempts in a row: the machine may have become slower since the beginning
    while sum(counts[how] for how in HOWS) < stops or run.exists():
        hows = hows or draw.sample(HOWS, len(HOWS))
        how = hows.pop()
        if "--compile" in flags:
            if how == "disk":  # the compiler writes files too, or gives up
                continue
            if (work / "compiled").exists() and draw.random() < FORGOTTEN:
                shutil.rmtree(work / "compiled")
                counts["compiled anew"] += 1
        args = ["--resume", "--out", str(run)] if (run / "config.json").exists() else []
        args = args or [*flags, "--resume", "--out", str(run)]
        limit = int(LARGEST ** draw.uniform(0.4, 1.0)) if how == "disk" else None
        before = snapshots(run)
        seconds = draw.uniform(0, 0.7 * whole) * LONGER**fruitless
        status = stop(start(args, said, limit), how, draw, seconds)
        fruitless = 0 if snapshots(run) - before else fruitless + 1
        check_status(how, status, said.read_text())
        if status == 0:
            counts["runs"] += 1
            check_end(run, reference)
            print(f"run {counts['runs']}: {sum(counts[how] for how in HOWS)} stops", flush=True)
            shutil.rmtree(run)
            cut.clear()
            continue
        counts[how] += 1
        counts["amid writing"] += any(run.rglob("*.tmp"))
        if run.exists():
            check_whole(run, cut)
            if how == "power":
                new = cut_newest(run, draw)
                counts["files cut"] += len(new)
                cut |= new
    return counts


def command() -> None:
    """Reads the command line, and prints what was done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stops", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="runs with compiled blocks")
    parser.add_argument("--flags", default="", help="more of `ebb train`")
    chosen = parser.parse_args()
    flags = [*TINY, *INTERVALS, "--threads", str(chosen.threads), *shlex.split(chosen.flags)]
    flags += ["--compile"] * chosen.compile
    with tempfile.TemporaryDirectory() as work:
        counts = soak(flags, chosen.stops, chosen.seed, Path(work))
    stops = ", ".join(f"{counts[how]} {how}" for how in HOWS)
    print(f"{counts['runs']} runs, stopped {sum(counts[how] for how in HOWS)} times ({stops})")
    print(f"{counts['amid writing']} times amid writing, {counts['files cut']} files cut short")
    if chosen.compile:
        print(f"{counts['compiled anew']} times compiled anew")
    print("every run ended as the one that was never stopped")


if __name__ == "__main__":
    command()
