"""The pages in headless Chromium: a recorded wav as the microphone, a video that is asked about. Only by `make storm`,
and where Chromium is."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.cli.browser import Page, visit
from tests.cli.speech_fixture import write_all, write_wav
from tests.tasks.videochat_corpus import write_parts, write_video

from thawline.models.videochat.chat import Sampling
from thawline.tasks.recognition import Recognizer

pytest.importorskip("fastapi")

pytestmark = pytest.mark.storm


def test_speaking_into_the_page_and_uploading_give_the_text_of_transcribe(tmp_path: Path) -> None:
    from thawline.tasks.serving import make_app

    write_all(tmp_path)
    write_wav(tmp_path / "speech.wav", 4.0, 440, rate_hz=48000)
    recognizer = Recognizer.open(tmp_path / "base", blank_penalty=20.0)

    async def drive(page: Page) -> None:
        await page.until("!!document.getElementById('speak').onclick")
        await page.run("document.getElementById('speak').click()")
        partial = await page.until(
            "(o => o.className === 'partial' && o.textContent.length > 1 && o.textContent)"
            "(document.getElementById('live'))"
        )
        assert partial
        await page.run("document.getElementById('stop').click()")
        final = await page.until("document.getElementById('live').className === 'final' && live.textContent")
        assert final != "(nothing heard)"
        await page.choose(tmp_path / "dev1.wav")
        await page.run("document.getElementById('send').click()")
        text = await page.until("!whole.className && whole.textContent")
        assert text == recognizer.transcribe([tmp_path / "dev1.wav"])[0]

    flags = ("--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream",
             f"--use-file-for-fake-audio-capture={tmp_path / 'speech.wav'}",
             "--autoplay-policy=no-user-gesture-required")  # fmt: skip
    visit(make_app(recognizer, name="tones"), tmp_path, drive, flags)


def test_a_video_is_shown_to_the_page_and_asked_about(tmp_path: Path) -> None:
    pytest.importorskip("av")
    pytest.importorskip("peft")
    from thawline.tasks.serving import make_app
    from thawline.tasks.videochat_asking import ChatModel

    model = ChatModel.open(write_parts(tmp_path / "parts"))
    video = write_video(tmp_path / "dark.mkv", 10)
    sampling = Sampling(max_new_tokens=6, temperature=8.0, seed=3)
    talk = model.talk(model.see(video), sampling=sampling)
    wanted = [talk.ask(question).text for question in ("what is it", "what now")]

    async def drive(page: Page) -> None:
        await page.until("!!document.getElementById('file').onchange")
        assert await page.run("document.getElementById('send').disabled")
        await page.choose(video)
        await page.until("document.getElementById('seen').textContent === '4 frames are seen.'")
        for number, question in enumerate(("what is it", "what now"), start=1):
            await page.run(f"question.value = '{question}'; document.getElementById('send').click()")
            await page.until(f"document.querySelectorAll('dd.final').length === {number}")
        told = await page.run("[...document.querySelectorAll('dd')].map(d => d.textContent)")
        assert [text or "(no words)" for text in wanted] == told
        await page.picture(tmp_path / "page.png")
        (tmp_path / "sound.txt").write_text("no video")
        await page.choose(tmp_path / "sound.txt")
        refused = await page.until("seen.className === 'error' && seen.textContent")
        assert "cannot be read" in refused
        assert await page.run("document.getElementById('send').disabled")

    visit(make_app(model, name="tiny", sampling=sampling), tmp_path, drive)
    assert (tmp_path / "page.png").stat().st_size > 1000
