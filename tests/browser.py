"""A headless Chromium that tests look at pages with, over the DevTools protocol on two pipes."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["Tab", "chromium_program", "open_browser"]

_DEADLINE_S = 60.0


def chromium_program() -> str | None:
    """Chromium: the one that `make browser` unpacked, or the system's; None where there is none."""
    unpacked = os.environ.get("ONNXSMITH_TEST_CHROMIUM", "")
    if unpacked and Path(unpacked).is_file():
        return unpacked
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Tab:
    """One page at a time, and everything that its console says.

    Attributes:
        said: Errors, warnings, refused loads and uncaught exceptions since the page was opened.
    """

    def __init__(self, read: int, write: int) -> None:
        """Takes the browser's two pipes."""
        self._read, self._write = read, write
        self._buffer, self._number = b"", 0
        self._session: str | None = None
        self._loaded = False
        self.said: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, address: str) -> None:
        """Opens a page and waits until it is loaded."""
        self.said, self._loaded = [], False
        self._call("Page.navigate", url=address)
        deadline = time.monotonic() + _DEADLINE_S
        while not self._loaded:
            self._hear(self._receive(deadline))

    def show(self, *, width: int, height: int = 844, scheme: str = "light", media: str = "screen") -> None:
        """What the page is shown on from now on."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._call("Emulation.setEmulatedMedia", media=media, features=features)

    def value_of(self, expression: str) -> Any:
        """What a JavaScript expression is, as plain data."""
        found = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def picture(self, path: Path) -> None:
        """Writes the whole page as a PNG."""
        found = self._call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def printed(self) -> bytes:
        """The page as a PDF on A4."""
        found = self._call("Page.printToPDF", printBackground=True, paperWidth=8.27, paperHeight=11.69)
        return base64.b64decode(found["data"])

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        asked: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            asked["sessionId"] = self._session
        os.write(self._write, json.dumps(asked).encode() + b"\0")
        deadline = time.monotonic() + _DEADLINE_S
        while True:
            told = self._receive(deadline)
            if told.get("id") == self._number:
                assert "error" not in told, f"{method}: {told['error']}"
                answer: dict[str, Any] = told["result"]
                return answer
            self._hear(told)

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            left = deadline - time.monotonic()
            ready = select.select([self._read], [], [], max(left, 0))[0]
            part = os.read(self._read, 1 << 16) if ready else b""
            assert part, "Chromium ended" if ready else "Chromium does not answer"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        told: dict[str, Any] = json.loads(message)
        return told

    def _hear(self, told: dict[str, Any]) -> None:
        method, about = told.get("method"), told.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Runtime.exceptionThrown":
            self.said.append(str(about["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled":
            self.said.append(str(about["args"]))
        elif method == "Log.entryAdded":
            self.said.append(str(about["entry"]["text"]))
        elif method == "Network.requestWillBeSent":
            address = about["request"]["url"]
            if not address.startswith(("file:", "data:", "about:")):
                self.said.append(f"asked for {address}")


@contextlib.contextmanager
def open_browser(profile: Path) -> Iterator[Tab]:
    """Starts Chromium, which ends with the block.

    Args:
        profile: A directory for what it keeps.
    """
    program = chromium_program()
    assert program is not None, "there is no Chromium"
    to_read, its_write = os.pipe()
    its_read, to_write = os.pipe()
    # Its pipes must be descriptors 3 and 4; the shell is what can say so without code between fork and exec.
    script = f'exec "$0" "$@" 3<&{its_read} 4>&{its_write}'
    command = [
        "bash", "-c", script, program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-extensions",
        "--disable-background-networking", "--disable-dev-shm-usage", "--no-first-run",
        "--remote-debugging-pipe", f"--user-data-dir={profile}",
    ]  # fmt: skip
    with (profile.parent / "chromium.log").open("wb") as log:
        browser = subprocess.Popen(command, stderr=log, stdout=log, pass_fds=(its_read, its_write))
    os.close(its_read)
    os.close(its_write)
    try:
        yield Tab(to_read, to_write)
    finally:
        os.close(to_write)
        os.close(to_read)
        # It ends when its pipes are closed.
        try:
            browser.wait(20)
        except subprocess.TimeoutExpired:
            browser.kill()
            browser.wait()
