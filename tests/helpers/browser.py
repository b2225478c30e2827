"""A headless Chromium, asked over its own protocol (DevTools), for pages that have to be seen in a browser."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
    "--window-size=900,900",
]


def chromium() -> str | None:
    """The browser's program, where there is one."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


class Tab:
    """The one page of a browser."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse):
        self.socket, self.numbers = socket, itertools.count(1)

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self.numbers)
        await self.socket.send_json({"id": number, "method": method, "params": parameters})
        async for message in self.socket:
            answer = json.loads(message.data)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
        raise ConnectionError("the browser is gone")

    async def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        found = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, script: str, seconds: float = 60.0) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not await self.evaluate(script):
            assert time.monotonic() < end, f"never true: {script}"
            await asyncio.sleep(0.1)

    async def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode((await self.call("Page.captureScreenshot", format="png"))["data"]))


@contextlib.contextmanager
def _running(program: str) -> Iterator[int]:
    """A browser with a profile of its own; its port."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                said, end = Path(profile, "DevToolsActivePort"), time.monotonic() + 120
                while not (said.is_file() and said.read_text().strip()):
                    assert process.poll() is None and time.monotonic() < end, "the browser did not start"
                    time.sleep(0.1)
                yield int(said.read_text().split()[0])
            finally:
                process.terminate()
                process.wait(30)


@contextlib.asynccontextmanager
async def tab(address: str) -> AsyncIterator[Tab]:
    """A page at `address`, loaded."""
    program = chromium()
    assert program is not None
    environment = {name: os.environ.pop(name) for name in list(os.environ) if name.lower().endswith("_proxy")}
    try:
        with _running(program) as port:
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as listed:
                    pages = [page for page in await listed.json() if page["type"] == "page"]
                async with session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    page = Tab(socket)
                    await page.call("Page.navigate", url=address)
                    await page.until("document.readyState === 'complete' && location.href !== 'about:blank'")
                    yield page
    finally:
        os.environ |= environment
