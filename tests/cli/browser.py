"""A page of a served application in headless Chromium, driven over the DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import shutil
import subprocess
import threading
import time
import urllib.request
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


class Page:
    """One tab."""

    def __init__(self, socket: Any) -> None:
        self.socket, self.number = socket, 0

    async def call(self, method: str, **values: Any) -> Any:
        self.number += 1
        await self.socket.send(json.dumps({"id": self.number, "method": method, "params": values}))
        while True:
            answer = json.loads(await self.socket.recv())
            if answer.get("id") == self.number:
                return answer["result"]

    async def run(self, script: str) -> Any:
        found = await self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True
        )
        return found["result"].get("value")

    async def until(self, script: str, seconds: float = 60.0) -> Any:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            value = await self.run(script)
            if value:
                return value
            await asyncio.sleep(0.2)
        raise AssertionError(f"never true: {script}; the page says {await self.run('document.body.innerText')!r}")

    async def choose(self, file: Path) -> None:
        """Put a file into the page's file field, as a person does."""
        await self.run(
            f"(() => {{ const list = new DataTransfer(), at = document.getElementById('file');"
            f"list.items.add(new File([new Uint8Array({list(file.read_bytes())})], {json.dumps(file.name)}));"
            "at.files = list.files; at.dispatchEvent(new Event('change')); })()"
        )

    async def picture(self, target: Path) -> None:
        target.write_bytes(base64.b64decode((await self.call("Page.captureScreenshot"))["data"]))


def visit(app: Any, folder: Path, drive: Callable[[Page], Awaitable[None]], flags: Sequence[str] = ()) -> None:
    """Serve `app`, open its page in Chromium, and drive it; skips where there is no Chromium."""
    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH")
    uvicorn = pytest.importorskip("uvicorn")
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0",
        f"--user-data-dir={folder / 'profile'}", *flags, f"http://127.0.0.1:{port}/",
    ]  # fmt: skip
    browser = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert browser.stderr is not None
    try:
        found = None
        while found is None:
            line = browser.stderr.readline()
            assert line, "chromium ended"
            found = re.search(r"ws://127\.0\.0\.1:(\d+)/", line)
        threading.Thread(target=browser.stderr.read, daemon=True).start()
        asyncio.run(_drive(int(found[1]), port, drive))
    finally:
        browser.terminate()
        browser.wait(20)
        browser.stderr.close()
        server.should_exit = True
        thread.join(20)


async def _drive(debugging: int, port: int, drive: Callable[[Page], Awaitable[None]]) -> None:
    websockets = pytest.importorskip("websockets")
    target = None
    while target is None:
        pages = json.loads(urllib.request.urlopen(f"http://127.0.0.1:{debugging}/json").read())
        target = next((p for p in pages if p["type"] == "page" and str(port) in p["url"]), None)
        await asyncio.sleep(0.2)
    async with websockets.connect(target["webSocketDebuggerUrl"], max_size=None) as socket:
        page = Page(socket)
        await page.until("document.readyState === 'complete'")
        await drive(page)
