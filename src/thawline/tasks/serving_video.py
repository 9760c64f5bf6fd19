"""Questions about a video over HTTP: it is uploaded once, then asked about; the answer streams as it is made.

POST /v1/videos            form field `file` (a video or an image) -> {"id", "kind", "frames"}
POST /v1/videos/ID/ask     {"question": "..."} -> lines of JSON:
                           {"type": "partial", "text": a further stretch}, at the end {"type": "final", "text": the
                           whole answer, "ended"} or {"type": "error", "message"}

The last few conversations are remembered, by names that cannot be guessed.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import tempfile
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from starlette.datastructures import UploadFile

from thawline.core.config import Strict
from thawline.errors import DataError, ThawlineError
from thawline.models.videochat.chat import Answer, Sampling
from thawline.tasks.serving_desk import Desk, Refused
from thawline.tasks.videochat_asking import IMAGES, ChatModel, Seen, Talk


class Question(Strict):
    """What is asked, and the longest answer in tokens, where it is to be shorter than the server allows."""

    question: str
    max_tokens: int = 1 << 20


@dataclass(slots=True)
class Talks:
    """Conversations by name, the oldest of more than `most` forgotten."""

    most: int
    held: OrderedDict[str, Talk] = field(default_factory=OrderedDict)

    def add(self, talk: Talk) -> str:
        name = secrets.token_urlsafe(16)
        self.held[name] = talk
        while len(self.held) > self.most:
            self.held.popitem(last=False)
        return name

    def get(self, name: str) -> Talk:
        if name not in self.held:
            raise Refused(404, "this video is not here (any more); upload it again", "video_not_found")
        self.held.move_to_end(name)
        return self.held[name]


def add_video(app: FastAPI, model: ChatModel, desk: Desk, *, sampling: Sampling) -> None:
    """The calls of a model that is asked about videos."""
    talks = Talks(desk.limits.talks)

    @app.post("/v1/videos")
    async def upload(request: Request) -> dict[str, object]:
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise Refused(415, "send multipart/form-data with a file", "invalid_request_error")
        async with request.form(max_files=1, max_fields=4) as form:
            file = form.get("file")
            if not isinstance(file, UploadFile):
                raise Refused(400, "the field 'file' is missing", "invalid_request_error")
            body, called = await file.read(), Path(file.filename or "").suffix.lower()
        seen = await desk.run(lambda: _see(model, body, called, desk.limits.seconds))
        name = talks.add(model.talk(seen, sampling=sampling))
        return {"id": name, "kind": seen.kind, "frames": len(seen.clip)}

    @app.post("/v1/videos/{name}/ask")
    async def ask(name: str, asked: Question) -> StreamingResponse:
        limits, talk, question = desk.limits, talks.get(name), asked.question.strip()
        if not 0 < len(question) <= limits.characters:
            raise Refused(400, f"a question has 1 to {limits.characters} characters", "invalid_request_error")
        if len(talk.turns) >= limits.questions:
            raise Refused(409, f"{limits.questions} questions were asked; upload the video anew", "talk_too_long")
        sampling = replace(talk.sampling, max_new_tokens=max(1, min(asked.max_tokens, talk.sampling.max_new_tokens)))
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        stop = threading.Event()
        loop = asyncio.get_running_loop()

        def tell(piece: str) -> None:
            if stop.is_set():
                raise _Left
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        job = desk.begin(lambda: talk.ask(question, on_text=tell, sampling=sampling))
        job.add_done_callback(lambda _: loop.call_soon_threadsafe(pieces.put_nowait, None))
        lines = _lines(job, pieces, stop, limits.patience_s)
        return StreamingResponse(lines, media_type="application/x-ndjson")


async def _lines(
    job: Future[Answer], pieces: asyncio.Queue[str | None], stop: threading.Event, patience_s: float
) -> AsyncIterator[str]:
    """The answer as it comes. Who stops reading stops it, and so does the end of patience."""
    now = asyncio.get_running_loop().time
    deadline = now() + patience_s
    try:
        while (piece := await asyncio.wait_for(pieces.get(), deadline - now())) is not None:
            yield _line("partial", text=piece)
        answer = job.result()
        yield _line("final", text=answer.text, ended=answer.ended)
    except TimeoutError:
        yield _line("error", message=f"not done after {patience_s:g} s")
    except ThawlineError as error:
        yield _line("error", message=error.what)
    finally:
        stop.set()
        job.cancel()


def _line(kind: str, **values: str) -> str:
    return json.dumps({"type": kind, **values}, ensure_ascii=False) + "\n"


def _see(model: ChatModel, body: bytes, suffix: str, limit_s: float) -> Seen:
    """The upload becomes a file for a moment: decoders read files."""
    with tempfile.NamedTemporaryFile(prefix="thawline-upload-", suffix=suffix if suffix in IMAGES else "") as file:
        file.write(body)
        file.flush()
        try:
            return model.see(file.name, limit_s=limit_s)
        except DataError as error:
            if "more than the limit" in error.what:
                raise Refused(413, error.what, "video_too_long") from error
            raise DataError(error.what.replace(file.name, "the upload")) from error


class _Left(Exception):
    """Nobody reads the answer any more."""
