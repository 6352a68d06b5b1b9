"""A headless Chromium, asked over a pipe: what a page logs, loads and shows."""

import json
import os
import shutil
import subprocess
import sys
import threading
from base64 import b64decode
from contextlib import suppress

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)

PIPES = """
import fcntl, os, sys
pipes = [fcntl.fcntl(int(pipe), fcntl.F_DUPFD, 10) for pipe in sys.argv[1:3]]
for at, pipe in zip((3, 4), pipes):
    os.dup2(pipe, at)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Starts a program whose pipes are where Chromium expects them."""

PATIENCE = 60.0
"""Seconds after which a browser is ended: one that hangs would hang the tests."""


class Browser:
    """One page in one process, which ends with the block."""

    def __init__(self, profile):
        self.profile, self.number, self.session, self.events = profile, 0, None, []

    def __enter__(self):
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        self.read, self.write = os.fdopen(ours_in, "rb"), os.fdopen(ours_out, "wb")
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        command += ["--disable-dev-shm-usage", "--remote-debugging-pipe"]
        command += [f"--user-data-dir={self.profile}", "about:blank"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", PIPES, str(theirs_in), str(theirs_out), *command],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.guard = threading.Timer(PATIENCE, self.process.kill)
        self.guard.start()
        try:
            target = self.ask("Target.createTarget", url="about:blank")["targetId"]
            attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
            self.session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.ask(f"{domain}.enable")
        except BaseException:  # whatever ends the test, Ctrl-C too, must not leave it running
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        try:
            self.session = None
            self.ask("Browser.close")
            self.process.wait(20)
        except (AssertionError, OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        self.guard.cancel()
        self.read.close()
        with suppress(OSError):  # what it has not read any more
            self.write.close()

    def ask(self, method, **params):
        """The answer to one command; events that come meanwhile are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.write.write(json.dumps(message).encode() + b"\0")
        self.write.flush()
        while (got := self._receive()).get("id") != self.number:
            self.events.append(got)
        assert "error" not in got, got["error"]
        return got["result"]

    def open(self, path, width, scheme):
        """Loads a file in a window of this width, in a light or a dark scheme."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.ask("Emulation.setEmulatedMedia", features=features)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        self.events.clear()
        self.ask("Page.navigate", url=path.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._receive())

    def run(self, script):
        """The value of a JavaScript expression."""
        got = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in got, got["exceptionDetails"]
        return got["result"].get("value")

    def complaints(self):
        """All that was logged or thrown since the page was opened."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [event for event in self.events if event["method"] in kinds]

    def requests(self):
        """All that was loaded since then."""
        sent = [e for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def screenshot(self, path):
        """The whole page, as a PNG."""
        got = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(b64decode(got["data"]))

    def _receive(self):
        message = bytearray()
        while (byte := self.read.read(1)) != b"\0":
            assert byte, "the browser is gone"
            message += byte
        return json.loads(message)
