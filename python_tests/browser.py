"""A headless Chromium for tests, driven by the DevTools protocol over two pipes: nothing to install but the browser."""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
KEYS = {"Space": " ", "Digit0": "0"}  # key code -> text, where the key types another text than its code
CODES = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "End": 35, "Home": 36, "Space": 32}


def find() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One tab at one address; a context manager. `requests`: all requested addresses. `complaints`: errors."""

    def __init__(self, path: Path, fragment: str = "", width: int = 1280, height: int = 900, dark: bool = False):
        self.profile = tempfile.mkdtemp(prefix="chromium")
        command, answer = os.pipe(), os.pipe()
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (command[0], answer[1])]

        def connect():  # the browser reads commands from 3 and writes to 4
            for target, fd in enumerate(ends, 3):
                os.dup2(fd, target)

        self.process = subprocess.Popen(
            [
                *(find(), "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu"),
                *("--no-first-run", "--disable-dev-shm-usage", f"--user-data-dir={self.profile}", "about:blank"),
            ],
            preexec_fn=connect,
            close_fds=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in (command[0], answer[1], *ends):
            os.close(fd)
        self.to, self.back = command[1], answer[0]
        self.rest, self.count, self.session = b"", 0, None
        self.requests: list[str] = []
        self.complaints: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.resolve().as_uri() + fragment)
        self.until("document.readyState === 'complete' && images[state.picture] && images[state.picture].ready")

    def __enter__(self) -> "Page":
        return self

    def __exit__(self, *error) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            self.session = None
            self.call("Browser.close")
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.to)
        os.close(self.back)
        shutil.rmtree(self.profile, ignore_errors=True)

    def call(self, method: str, **params) -> dict:
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            got = self._read()
            if got.get("id") == self.count:
                if "error" in got:
                    raise RuntimeError(f"{method}: {got['error']['message']}")
                return got["result"]

    def _read(self, seconds: float = 60) -> dict:
        while b"\0" not in self.rest:
            if not select.select([self.back], [], [], seconds)[0]:
                raise RuntimeError(f"the browser says nothing for {seconds} s")
            part = os.read(self.back, 1 << 20)
            if not part:
                raise RuntimeError("the browser has ended")
            self.rest += part
        text, self.rest = self.rest.split(b"\0", 1)
        message = json.loads(text)
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        if message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(message["params"]["exceptionDetails"]["exception"].get("description", "exception"))
        if message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
            self.complaints.append(message["params"]["entry"]["text"])
        return message

    def __call__(self, expression: str):
        """The value of a JavaScript expression, after all earlier changes are drawn."""
        value = f"requestAnimationFrame(() => requestAnimationFrame(() => done({expression})))"
        drawn = f"new Promise((done) => {value})"
        result = self.call("Runtime.evaluate", expression=drawn, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["exception"].get("description"))
        return result["result"].get("value")

    def until(self, expression: str, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not self.call("Runtime.evaluate", expression=f"Boolean({expression})")["result"].get("value"):
            if time.monotonic() > end:
                raise RuntimeError(f"not so within {seconds} s: {expression}; {self.complaints}")
            time.sleep(0.05)

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """Scrolls to the first element that matches; returns its left, top, width and height on the screen."""
        found = f"document.querySelector({json.dumps(selector)})"
        return tuple(
            self(
                f"({found}.scrollIntoView({{block: 'center'}}), (({{x, y, width, height}}) => [x, y, width, height])"
                f"({found}.getBoundingClientRect()))"
            )
        )

    def mouse(self, kind: str, x: float, y: float) -> None:
        pressed = {"button": "left", "clickCount": 1} if kind != "mouseMoved" else {}
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **pressed)

    def click(self, selector: str, across: float = 0.5, down: float = 0.5) -> None:
        left, top, width, height = self.box(selector)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.mouse(kind, left + across * width, top + down * height)

    def key(self, code: str) -> None:
        text = KEYS.get(code, code if len(code) == 1 else "")
        event = {"key": text or code, "code": code, "windowsVirtualKeyCode": CODES.get(code, ord(text.upper() or "\0"))}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **event)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def picture(self, path: Path, full: bool = False) -> None:
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=full)["data"]
        path.write_bytes(base64.b64decode(data))
