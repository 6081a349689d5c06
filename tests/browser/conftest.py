"""A page in headless Chromium: `tox -e browser`, or `pytest --effattn-browser tests/browser`.

Chromium is driven over the two pipes of its debugging protocol (https://chromedevtools.github.io/devtools-protocol/), so
nothing else is needed. Without `--effattn-browser` nothing here is collected; with it, a missing Chromium is an error.
Screenshots are kept in the folder that EFFATTN_SCREENSHOTS names.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

#: Names under which distributions install it.
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Nothing of this folder without the flag."""
    return None if config.getoption("--effattn-browser") else True


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """One page for all tests of a module."""
    with Page(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def screenshots(tmp_path: Path) -> Path:
    """Where pictures are kept."""
    folder = Path(os.environ.get("EFFATTN_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def program() -> str:
    """Where Chromium is; `EFFATTN_CHROMIUM` names another. An error says how to install it."""
    named = os.environ.get("EFFATTN_CHROMIUM")
    found = named or next(filter(None, map(shutil.which, NAMES)), None)
    if not found:
        raise RuntimeError(
            "the tests of the report need Chromium: `apt-get install chromium`, or name one in EFFATTN_CHROMIUM"
        )
    return found


class Page:
    """One page. Collects console messages, errors and requests from the start."""

    def __init__(self, profile: Path, *, width: int = 1280, height: int = 900) -> None:
        to_chrome, self._out = os.pipe()
        self._in, from_chrome = os.pipe()
        self._numbers = itertools.count(1)
        self._buffer = b""
        self._events: list[dict[str, Any]] = []
        flags = [
            "--headless=new", "--remote-debugging-pipe", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
            f"--user-data-dir={profile}", f"--window-size={width},{height}",
        ]  # fmt: skip
        if os.getuid() == 0:
            flags.append("--no-sandbox")  # Chromium refuses to run as root with it
        # Chromium wants the pipes as descriptors 3 and 4.
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$0" "$@" 3<&{to_chrome} 4>&{from_chrome}', program(), *flags],
            pass_fds=(to_chrome, from_chrome), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_chrome)
        os.close(from_chrome)
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        """End the browser."""
        self._process.kill()
        self._process.wait()
        os.close(self._out)
        os.close(self._in)

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One call of the protocol, for the page."""
        return self._send(method, session=self._session, **parameters)

    def open(self, file: Path) -> None:
        """Open a file and wait until its charts are drawn."""
        self._events.clear()
        self.call("Page.navigate", url=file.absolute().as_uri())
        self.wait_for("document.documentElement?.dataset.ready")

    def wait_for(self, condition: str) -> None:
        """Wait, in the page, until a condition holds; an error after a minute."""
        self.evaluate(
            "new Promise((done, fail) => {"
            " const end = Date.now() + 60000;"
            f" (function look() {{ if ({condition}) done(true); else if (Date.now() > end)"
            f" fail(new Error({json.dumps(condition)} + ' does not hold')); else setTimeout(look, 20); }})(); }})"
        )

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page, promises awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise AssertionError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def refresh(self, action: str) -> None:
        """Do something that filters, and wait until the page has followed."""
        before = self.evaluate("document.documentElement.dataset.ready")
        self.evaluate(action)
        self.wait_for(f"document.documentElement?.dataset.ready !== {json.dumps(before)}")

    def move_to(self, x: float, y: float) -> None:
        """Move the mouse."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key: str) -> None:
        """Press a key."""
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key,
                windowsVirtualKeyCode={"Tab": 9, "Enter": 13}[key],
                text={"Enter": "\r"}.get(key, "") if kind == "keyDown" else "",
            )  # fmt: skip

    def media(self, *, scheme: str = "light", kind: str = "") -> None:
        """Light or dark, screen or print."""
        self.call(
            "Emulation.setEmulatedMedia",
            media=kind,
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )

    def size(self, width: int, height: int) -> None:
        """The size of the window in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    def screenshot(self, file: Path, *, whole: bool = False) -> None:
        """Keep what is seen as PNG."""
        taken = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(taken["data"]))

    def pdf(self) -> bytes:
        """The page as it prints."""
        return base64.b64decode(self.call("Page.printToPDF")["data"])

    def complaints(self) -> list[Any]:
        """Errors, warnings and exceptions so far."""
        found: list[Any] = []
        for event in self._all_events():
            parameters = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                found.append(parameters["exceptionDetails"])
            elif event["method"] == "Runtime.consoleAPICalled" and parameters["type"] in (
                "error",
                "warning",
                "assert",
            ):
                found.append([argument.get("value") for argument in parameters["args"]])
            elif event["method"] == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
                found.append(parameters["entry"]["text"])
        return found

    def requests(self) -> list[str]:
        """What the page asked for, by URL."""
        return [
            event["params"]["request"]["url"]
            for event in self._all_events()
            if event["method"] == "Network.requestWillBeSent"
        ]

    def dialogs(self) -> list[str]:
        """Messages of alert boxes and the like."""
        return [
            event["params"]["message"]
            for event in self._all_events()
            if event["method"] == "Page.javascriptDialogOpening"
        ]

    def _all_events(self) -> list[dict[str, Any]]:
        self.call("Runtime.evaluate", expression="0")  # whatever came before its answer has been read then
        return self._events

    def _send(self, method: str, *, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            if "method" in answer:
                self._events.append(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._in, 1 << 20)
            if not part:
                raise RuntimeError(f"Chromium ended with code {self._process.wait()}")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)
