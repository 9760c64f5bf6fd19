"""The page in headless Chromium, a recorded wav as its microphone. Only by `make storm`, and where Chromium is."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tests.cli.speech_fixture import write_all, write_wav

from thawline.tasks.recognition import Recognizer

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")
websockets = pytest.importorskip("websockets")

pytestmark = pytest.mark.storm

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


class Page:
    """One tab over the DevTools protocol."""

    def __init__(self, socket: Any) -> None:
        self.socket, self.number = socket, 0

    async def run(self, script: str) -> Any:
        self.number += 1
        values = {"expression": script, "awaitPromise": True, "returnByValue": True, "userGesture": True}
        await self.socket.send(json.dumps({"id": self.number, "method": "Runtime.evaluate", "params": values}))
        while True:
            answer = json.loads(await self.socket.recv())
            if answer.get("id") == self.number:
                return answer["result"]["result"].get("value")

    async def until(self, script: str, seconds: float = 60.0) -> Any:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            value = await self.run(script)
            if value:
                return value
            await asyncio.sleep(0.2)
        raise AssertionError(f"never true: {script}; live says {await self.run('document.body.innerText')!r}")


def test_speaking_into_the_page_and_uploading_give_the_text_of_transcribe(tmp_path: Path) -> None:
    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH")
    from thawline.tasks.serving import make_app

    write_all(tmp_path)
    write_wav(tmp_path / "speech.wav", 4.0, 440, rate_hz=48000)
    recognizer = Recognizer.open(tmp_path / "base", blank_penalty=20.0)
    server = uvicorn.Server(uvicorn.Config(make_app(recognizer, name="tones"), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    browser = subprocess.Popen(
        [
            CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0",
            f"--user-data-dir={tmp_path / 'profile'}", "--use-fake-ui-for-media-stream",
            "--use-fake-device-for-media-stream", f"--use-file-for-fake-audio-capture={tmp_path / 'speech.wav'}",
            "--autoplay-policy=no-user-gesture-required", f"http://127.0.0.1:{port}/",
        ],
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        assert browser.stderr is not None
        found = None
        while found is None:
            line = browser.stderr.readline()
            assert line, "chromium ended"
            found = re.search(r"ws://127\.0\.0\.1:(\d+)/", line)
        reader = threading.Thread(target=browser.stderr.read, daemon=True)
        reader.start()
        asyncio.run(_drive(int(found[1]), port, recognizer, tmp_path))
    finally:
        browser.terminate()
        browser.wait(20)
        assert browser.stderr is not None
        browser.stderr.close()
        server.should_exit = True
        thread.join(20)


async def _drive(debugging: int, port: int, recognizer: Recognizer, folder: Path) -> None:
    import urllib.request

    target = None
    while target is None:
        pages = json.loads(urllib.request.urlopen(f"http://127.0.0.1:{debugging}/json").read())
        target = next((p for p in pages if p["type"] == "page" and str(port) in p["url"]), None)
        await asyncio.sleep(0.2)
    async with websockets.connect(target["webSocketDebuggerUrl"], max_size=None) as socket:
        page = Page(socket)
        await page.until("document.readyState === 'complete' && !!document.getElementById('speak').onclick")
        await page.run("document.getElementById('speak').click()")
        partial = await page.until(
            "(o => o.className === 'partial' && o.textContent.length > 1 && o.textContent)"
            "(document.getElementById('live'))"
        )
        assert partial
        await page.run("document.getElementById('stop').click()")
        final = await page.until("document.getElementById('live').className === 'final' && live.textContent")
        assert final != "(nothing heard)"
        recording = (folder / "dev1.wav").read_bytes()
        await page.run(
            f"(() => {{ const list = new DataTransfer();"
            f"list.items.add(new File([new Uint8Array({list(recording)})], 'dev1.wav'));"
            "document.getElementById('file').files = list.files; document.getElementById('send').click(); })()"
        )
        text = await page.until("!whole.className && whole.textContent")
        assert text == recognizer.transcribe([folder / "dev1.wav"])[0]
