"""`ebb` as a process: what goes where, on a terminal and off it, and how it takes signals."""

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
from runs import TINY, has_logged, only_line, start_ebb, wait_for, workplace

from train import progress
from train.progress import Display, duration


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    with workplace(tmp_path_factory.mktemp("process")) as folder:
        yield folder


def on_a_terminal(columns, *args):
    """`ebb ARGS` with a terminal for standard error: status, standard output, what was shown."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    environment |= {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
    process = start_ebb(*args, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
    except OSError:  # how Linux says that the other side is closed
        pass
    os.close(ours)
    output, _ = process.communicate()
    return process.returncode, output, shown.decode()


def test_terminal_shows_a_live_bar_and_results_go_to_stdout(shop):
    flags = ["--data", shop / "text.txt", *TINY, "--mixer", "attention", "--sample-every", "0"]
    timing = ["--steps", "60", "--log-every", "2", "--eval-every", "20"]
    status, output, shown = on_a_terminal(80, "train", *flags, *timing, "--out", shop / "terminal")
    assert status == 0, shown
    frames = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", frame) for frame in shown.split("\r")]
    bar = re.compile(
        r"Step \S+ \d+/60 [\d,]+ tok/s loss \d\.\d{3} \d\.\d{3} bits/B val \d\.\d{3} \S+ left"
    )
    assert any(bar.search(frame) for frame in frames), frames[-20:]
    assert "\x1b[?25l" in shown, "the bar is not live"
    assert shown.endswith("\x1b[?25h") or "\x1b[?25h" in shown[-40:], "the cursor stays hidden"
    assert len(output.splitlines()) == 2
    assert output.startswith(f"{shop / 'terminal'}: ")
    assert "\x1b" not in output


def test_interrupt_while_others_write_to_a_pipe(shop):
    """SIGTERM saves as Ctrl-C does; what is not a terminal gets plain lines."""
    folder = shop / "pipe"
    flags = ["--data", shop / "text.txt", *TINY, "--mixer", "attention", "--sample-every", "0"]
    process = start_ebb(
        *("train", *flags, "--steps", "9000", "--log-every", "1", "--eval-every", "5"),
        *("--out", folder),
    )
    wait_for(lambda: has_logged(folder, 8), process)
    process.send_signal(signal.SIGTERM)
    output, error = process.communicate()
    assert process.returncode == 130
    assert output == ""
    assert "\x1b" not in error
    assert "\r" not in error
    assert re.search(r"^step 5: validation \d\.\d{4} nats/token, \d\.\d{4} bits/byte$", error, re.M)
    assert f"-> {folder}\n" in error, "a path is broken over two lines"
    assert only_line(error).startswith("Saved after step ")


def test_ctrl_c_before_there_is_anything_to_save(shop):
    text = shop / "long.txt"
    text.write_text("many words of it " * 2_000_000)
    process = start_ebb("train", "--data", text, *TINY, "--out", shop / "early")
    wait_for(lambda: any((shop / "cache" / "ebb").glob("*.tmp/train.bin")), process)
    process.send_signal(signal.SIGINT)
    output, error = process.communicate()
    assert process.returncode == 130
    assert only_line(error) == "Interrupted."
    assert output == ""
    assert not list((shop / "cache" / "ebb").glob("*.tmp")), "half of the tokens are left"
    assert [path.name for path in (shop / "early").iterdir()] == [".lock"]


def test_reader_that_has_had_enough(shop):
    """As `ebb train --help | head -1`."""
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
        [sys.executable, "-m", "train.cli", "train", "--help"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert process.stderr == ""
    assert process.returncode == 0


def test_long_numbers_fit_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    note = "12,345 tok/s loss 2.123 1.789 bits/B val 1.456"
    with Display() as display, display.noted_task("Step", 20000, 10000) as show:
        show(15000, note)
        time.sleep(0.25)  # it is drawn ten times a second
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    assert f"15000/20000 {note} 00:0" in shown or f"15000/20000 {note} --:-- left" in shown
    assert "…" not in shown


def test_lines_in_place_of_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with Display() as display, display.noted_task("Step", 2000, 500) as show:
        show(1250, "1,234 tok/s loss 3.210 2.200 bits/B val 2.100")
        show(2000, "")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Step  1,250/2,000  1,234 tok/s loss 3.210 2.200 bits/B val ")
    assert re.search(r"  \d:\d\d left$", lines[0])
    assert lines[1].startswith("Step  2,000/2,000")


def test_lines_come_at_intervals(capsys):
    with Display() as display, display.task("Tokenising", 100) as advance:
        for done in range(100):
            advance(done)
    assert capsys.readouterr().err == ""


def test_text_is_never_read_as_markup(capsys):
    with Display() as display:
        display.say("[bold]text[/bold] [/] " + "long " * 40)
    assert capsys.readouterr().err == "[bold]text[/bold] [/] " + "long " * 40 + "\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (-5, "0:00"), (65, "1:05"), (59.6, "1:00"), (7265, "2:01:05")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_writing_starts_without_the_compiler(random_run):
    """Importing it takes longer than PyTorch and all of Ebb together."""
    script = (
        "import sys; from train.cli import main; "
        f"code = main(['generate', {str(random_run)!r}, '--prompt', 'a', '--tokens', '3']); "
        "sys.exit(code or 'torch._dynamo' in sys.modules)"
    )
    command = [sys.executable, "-c", script]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
