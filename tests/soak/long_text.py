"""How much memory `ebb train` takes with a text of any length.

    python tests/soak/long_text.py --megabytes 2000 --tokenizer bytes

Writes a text of that size into a temporary folder, trains a small model on it for some steps in a
process of its own and prints the most memory that it and its children have held at any time, from
reading the text to the last step. It ends with status 1 where that is a gigabyte or more.
"""

import argparse
import contextlib
import os
import random
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

LIMIT = 1_000_000_000
ROOT = Path(__file__).parents[2]


def write_text(path: Path, num_bytes: int) -> None:
    """Words of a rising vocabulary, with numbers and names that come only once between them."""
    draw, done = random.Random(0), 0
    words = ["".join(draw.choices(string.ascii_lowercase, k=2 + n % 9)) for n in range(20_000)]
    with path.open("w", encoding="ascii") as file:
        while done < num_bytes:
            common = draw.choices(words, k=2000)
            line = " ".join([*common, *(str(draw.randrange(10**9)) for _ in range(20))]) + "\n"
            done += file.write(line)


def peak_memory(process: subprocess.Popen[bytes]) -> int:
    """The most bytes that a process and its children held at once, watched until it ends.

    What is theirs is anonymous and shared memory; a mapped file's pages the system can take back.
    """
    peak = 0
    while process.poll() is None:
        tree = [process.pid]
        with contextlib.suppress(psutil.NoSuchProcess):
            tree += [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        peak = max(peak, sum(map(held, tree)))
        time.sleep(0.2)
    return peak


def held(number: int) -> int:
    """Bytes of one process; 0 if it has ended."""
    try:
        status = Path(f"/proc/{number}/status").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    lines = [line for line in status.splitlines() if line.startswith(("RssAnon:", "RssShmem:"))]
    return sum(int(line.split()[1]) * 1024 for line in lines)


def main() -> int:
    """Measures and prints one line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--tokenizer", default="bytes", help="as ebb train takes it")
    parser.add_argument("--mixer", default="rwkv7")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_text(folder / "text.txt", options.megabytes * 1_000_000)
        begin = time.monotonic()
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "train.cli", "train", "--data", str(folder / "text.txt")),
                *("--tokenizer", options.tokenizer, "--size", "nano", "--context", "64"),
                *("--steps", str(options.steps), "--sample-every", "0", "--mixer", options.mixer),
                *("--eval-every", str(options.steps), "--eval-tokens", "4096"),
                *("--out", str(folder / "run")),
            ],
            cwd=ROOT,
            env={**os.environ, "XDG_CACHE_HOME": str(folder / "cache")},
        )
        peak = peak_memory(process)
        seconds = time.monotonic() - begin
    print(
        f"{options.megabytes:,} MB of text, {options.tokenizer}: at most {peak / 1e6:,.0f} MB "
        f"resident, {seconds:.0f} s, status {process.returncode}"
    )
    return int(process.returncode != 0 or peak >= LIMIT)


if __name__ == "__main__":
    sys.exit(main())
