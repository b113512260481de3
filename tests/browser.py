"""Debian's Chromium without a window, told what to do over its pipe (DevTools protocol), as a page's reader has it."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_PATIENCE = 60.0  # seconds for an answer
_START = """import fcntl, os, sys
asked, answers = (fcntl.fcntl(int(pipe), fcntl.F_DUPFD, 10) for pipe in sys.argv[1:3])
os.dup2(asked, 3)
os.dup2(answers, 4)
os.execvp(sys.argv[3], sys.argv[3:])"""
"""Becomes the browser, which reads what it is asked at descriptor 3 and answers at 4."""


def executable():
    """The browser's path; raises `RuntimeError` that says how to get one."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        raise RuntimeError(
            "no Chromium is installed, in which reports are looked at; run `apt-get install chromium`, as .ci/run does."
        )
    return found


class Browser:
    """A running browser; `errors` are exceptions and messages of pages, `requests` what they asked for."""

    def __init__(self, folder):
        (asked, self._in), (self._out, answers) = os.pipe(), os.pipe()
        theirs = asked, answers
        command = [executable(), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
        command += ["--disable-dev-shm-usage", f"--user-data-dir={folder}", "--remote-debugging-pipe", "about:blank"]
        start = [sys.executable, "-IS", "-c", _START, *map(str, theirs), *command]
        self._process = subprocess.Popen(start, pass_fds=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for pipe in theirs:
            os.close(pipe)
        self._buffer, self._last, self._session = b"", 0, None
        self.errors, self.requests = [], []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method, **params):
        """Ask for something and wait for the answer."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._in, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._last:
            self._hear(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def open(self, path, *, width, dark=False, media="screen", scripts=True):
        """Show a file in a window of that width."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self("Emulation.setScriptExecutionDisabled", value=not scripts)
        self._loaded = False
        self("Page.navigate", url=path.as_uri())
        while not self._loaded:
            self._hear(self._next())

    def evaluate(self, expression):
        """The value of an expression in the page."""
        result = self("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self):
        """The whole page as a PNG file."""
        taken = self("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(taken["data"])

    def close(self):
        """End the browser."""
        self._session = None
        with contextlib.suppress(AssertionError, OSError):
            self("Browser.close")
        self._process.wait(_PATIENCE)
        os.close(self._in)
        os.close(self._out)

    def _hear(self, event):
        method, params = event.get("method"), event.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"]["text"])
        elif method in ("Runtime.consoleAPICalled", "Log.entryAdded"):
            self.errors.append(json.dumps(params))
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def _next(self):
        until = time.monotonic() + _PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._out], [], [], until - time.monotonic())
            part = os.read(self._out, 1 << 16) if ready else b""
            assert part, "the browser does not answer"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


@contextlib.contextmanager
def running():
    """A browser with a profile of its own, which ends with the body."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        browser = Browser(folder)
        try:
            yield browser
        finally:
            browser.close()
