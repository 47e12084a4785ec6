"""A headless Chromium, told what to do over its DevTools protocol: opens a page as a reader would see it."""

import asyncio
import base64
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# What a page may take: this machine may have other work.
SECONDS = 120


@dataclass
class Seen:
    """What came of a page.

    Attributes:
        console: messages and uncaught errors.
        requests: addresses that were asked for, but the page's own.
        values: of the expressions, in their order.
        picture: a PNG of the whole page.
    """

    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)
    picture: bytes = b""


def open_page(
    path: Path,
    expressions: Sequence[str] = (),
    width: int = 1280,
    height: int = 900,
    dark: bool = False,
    media: str = "",
    ready: str = "document.readyState == 'complete'",
    picture: bool = False,
) -> Seen:
    """Open a file; return what was seen.

    Args:
        path: of the page.
        expressions: of JavaScript, evaluated once it is ready; promises are waited for.
        width: of the screen, in CSS pixels.
        height: likewise.
        dark: whether the reader prefers dark colours.
        media: "print", or "" for a screen.
        ready: JavaScript that is true once the page is.
        picture: whether to make one.
    """
    assert PROGRAM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            PROGRAM,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
        ]
        command += ["--disable-background-networking", "--remote-debugging-port=0", f"--user-data-dir={profile}"]
        process = subprocess.Popen([*command, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port = _port(Path(profile) / "DevToolsActivePort")
            how = (path, expressions, width, height, dark, media, ready, picture)
            return asyncio.run(asyncio.wait_for(_open(port, *how), SECONDS))
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _port(path: Path) -> int:
    for _ in range(10 * SECONDS):
        with suppress(OSError, ValueError, IndexError):
            return int(path.read_text().splitlines()[0])
        time.sleep(0.1)
    raise TimeoutError("Chromium did not start")


async def _open(
    port: int,
    path: Path,
    expressions: Sequence[str],
    width: int,
    height: int,
    dark: bool,
    media: str,
    ready: str,
    picture: bool,
) -> Seen:
    seen = Seen()
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/json") as answer:
            pages = [each for each in await answer.json() if each["type"] == "page"]
        async with session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            number = 0

            async def call(method: str, **parameters: Any) -> dict:
                nonlocal number
                number += 1
                await socket.send_json({"id": number, "method": method, "params": parameters})
                while True:
                    message = await socket.receive_json()
                    if message.get("id") == number:
                        assert "error" not in message, message
                        return message["result"]
                    _note(seen, message, path)

            async def value(expression: str) -> Any:
                found = await call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
                return found["result"].get("value")

            for domain in ("Runtime", "Log", "Network", "Page"):
                await call(f"{domain}.enable")
            await call(
                "Emulation.setDeviceMetricsOverride",
                width=width,
                height=height,
                deviceScaleFactor=1,
                mobile=width < 600,
            )
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            await call("Emulation.setEmulatedMedia", media=media, features=[scheme])
            await call("Page.navigate", url=path.resolve().as_uri())
            while not await value(f"location.protocol == 'file:' && ({ready})"):
                await asyncio.sleep(0.1)
            for expression in expressions:
                seen.values.append(await value(expression))
            if picture:
                shot = await call("Page.captureScreenshot", captureBeyondViewport=True, format="png")
                seen.picture = base64.b64decode(shot["data"])
    return seen


def _note(seen: Seen, message: dict, path: Path) -> None:
    """Note an event that a reader would not want to see."""
    parameters = message.get("params", {})
    match message.get("method"):
        case "Runtime.consoleAPICalled":
            seen.console.append(str([each.get("value", each.get("description")) for each in parameters["args"]]))
        case "Runtime.exceptionThrown":
            seen.console.append(str(parameters["exceptionDetails"]))
        case "Log.entryAdded":
            seen.console.append(str(parameters["entry"]))
        case "Network.requestWillBeSent":
            url = parameters["request"]["url"]
            if url != path.resolve().as_uri() and not url.startswith("data:"):
                seen.requests.append(url)
