"""Recognition over HTTP: a page, OpenAI's transcription call, and live speech over a WebSocket.

One model, one thread that computes, and a queue with an end: who finds it full is told so at once (503, Retry-After)
and is not left waiting. Needs the extra `serve`; this module is imported by the verb alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
from fastapi import FastAPI, Request, WebSocket, WebSocketDisconnect
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.datastructures import UploadFile

from thawline.errors import DataError, ThawlineError
from thawline.tasks.live_speech import LiveSpeech
from thawline.tasks.recognition import Recognizer
from thawline.tasks.serving_page import PAGE
from thawline.tasks.transcript import Transcript, subrip, webvtt

T = TypeVar("T")
Scope = MutableMapping[str, Any]
FORMATS = ("json", "text", "srt", "vtt", "verbose_json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one client may cost.

    upload_bytes: of one request;  seconds: of one recording or live stream;  waiting: requests queued or computing
    streams: live streams at once;  patience_s: how long a request may take;  idle_s: silence of a live client
    """

    upload_bytes: int = 25_000_000
    seconds: float = 600.0
    waiting: int = 8
    streams: int = 4
    patience_s: float = 300.0
    idle_s: float = 30.0


@dataclass(slots=True)
class Desk:
    """The one thread that computes, and how many wait for it. A request that ran out of patience keeps its place until
    its computation has ended: a thread cannot be stopped, and the queue must not pretend that it was."""

    limits: Limits
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="recogniser"))
    waiting: int = 0
    streams: int = 0

    async def run(self, work: Callable[[], T]) -> T:
        """The result of `work`, in turn. Raises Refused when the queue is full or patience has ended."""
        if self.waiting >= self.limits.waiting:
            raise Refused(503, f"{self.waiting} requests are waiting already; try again later", "server_busy")
        self.waiting += 1
        loop = asyncio.get_running_loop()
        job = self.pool.submit(work)
        job.add_done_callback(lambda _: loop.call_soon_threadsafe(self._leave))
        future = asyncio.wrap_future(job)
        done, _ = await asyncio.wait({future}, timeout=self.limits.patience_s)
        if not done:
            job.cancel()  # helps only if it has not begun; else its thread goes on, and so does its place
            future.add_done_callback(lambda f: f.cancelled() or f.exception())  # nobody waits for it any more
            raise Refused(504, f"not done after {self.limits.patience_s:g} s", "timeout")
        return future.result()

    def _leave(self) -> None:
        self.waiting -= 1


class Refused(Exception):
    """A request that is turned down; the message goes to the client."""

    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


def make_app(recognizer: Recognizer, *, name: str, limits: Limits | None = None) -> FastAPI:
    """The application that serves `recognizer` under the model name `name`."""
    limits = limits or Limits()
    desk = Desk(limits)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        desk.pool.shutdown(wait=True, cancel_futures=True)

    app = FastAPI(title="thawline serve", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(_BoundedBody, limit=limits.upload_bytes)

    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return PAGE

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": name, "waiting": desk.waiting, "streams": desk.streams}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "thawline"}]}

    @app.post("/v1/audio/transcriptions")
    async def transcriptions(request: Request) -> Response:
        return await _transcription(request, recognizer, desk, name)

    @app.websocket("/v1/audio/stream")
    async def stream(socket: WebSocket) -> None:
        await _stream(socket, recognizer, desk)

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        headers = {"Retry-After": "5"} if error.status == 503 else None
        return JSONResponse(_error(error.message, error.code), error.status, headers)

    @app.exception_handler(ThawlineError)
    async def not_possible(_: Request, error: ThawlineError) -> JSONResponse:
        fix = f" ({error.fix})" if error.fix else ""
        return JSONResponse(_error(error.what + fix, "invalid_request_error"), 400)

    return app


def _error(message: str, code: str) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": code, "param": None, "code": code}}


# --- OpenAI's call ----------------------------------------------------------------------------------------------------


async def _transcription(request: Request, recognizer: Recognizer, desk: Desk, name: str) -> Response:
    """Form fields: file, and if wanted model, language, prompt, response_format, temperature (0 only)."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise Refused(415, "send multipart/form-data with a file", "invalid_request_error")
    async with request.form(max_files=1, max_fields=16) as form:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise Refused(400, "the field 'file' is missing", "invalid_request_error")
        fields = {key: value for key, value in form.items() if isinstance(value, str)}
        kind = fields.get("response_format", "json")
        if kind not in FORMATS:
            raise Refused(400, f"response_format {kind!r} is none of {', '.join(FORMATS)}", "invalid_request_error")
        if fields.get("model") not in (None, "", name, "whisper-1"):
            raise Refused(404, f"the model {fields['model']!r} is not here; this is {name!r}", "model_not_found")
        if float(_number(fields.get("temperature", "0"))) != 0.0:
            raise Refused(400, "decoding is deterministic here: temperature must be 0", "invalid_request_error")
        options = {key: fields[key] for key in ("language", "prompt") if fields.get(key)}
        chosen = recognizer.with_options(**options) if options else recognizer
        body = await file.read()
    times = kind in ("srt", "vtt", "verbose_json")
    found = await desk.run(lambda: _hear(chosen, body, times=times, limit_s=desk.limits.seconds))
    return _response(found, kind)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise Refused(400, f"temperature {text!r} is not a number", "invalid_request_error") from None


def _hear(recognizer: Recognizer, body: bytes, *, times: bool, limit_s: float) -> Transcript:
    """The upload becomes a file for a moment: decoders read files, and know their kind by looking at the bytes."""
    with tempfile.NamedTemporaryFile(prefix="thawline-upload-") as file:
        file.write(body)
        file.flush()
        try:
            return next(iter(recognizer.transcripts([file.name], times=times, limit_s=limit_s)))
        except DataError as error:
            if "more than the limit" in error.what:
                raise Refused(413, error.what, "audio_too_long") from error
            raise DataError(error.what.replace(file.name, "the upload")) from error


def _response(found: Transcript, kind: str) -> Response:
    if kind == "text":
        return PlainTextResponse(found.text + "\n")
    if kind in ("srt", "vtt"):
        return PlainTextResponse(subrip(found.cues()) if kind == "srt" else webvtt(found.cues()))
    if kind == "json":
        return JSONResponse({"text": found.text})
    segments = [{"id": n, **cue.to_json()} for n, cue in enumerate(found.cues())]
    words = [{"word": w.text, "start": round(w.start_s, 3), "end": round(w.end_s, 3)} for w in found.words]
    return JSONResponse(
        {
            "task": "transcribe",
            "language": found.language,
            "duration": round(found.seconds, 3),
            "text": found.text,
            "segments": segments,
            "words": words,
        }
    )


# --- live speech ------------------------------------------------------------------------------------------------------


async def _stream(socket: WebSocket, recognizer: Recognizer, desk: Desk) -> None:
    """16-bit little-endian mono samples in binary messages, at the rate that the query says (`?rate=48000`); a text
    message `end` asks for the result. Sent back: {"type": "partial" | "final" | "error", "text" | "message"}."""
    if not _same_site(socket):
        await socket.close(1008, "another site's page may not listen here")
        return
    await socket.accept()
    if desk.streams >= desk.limits.streams:
        await _give_up(socket, f"{desk.streams} people are speaking already; try again later", 1013)
        return
    desk.streams += 1
    try:
        rate = int(socket.query_params.get("rate", "16000"))
        live = LiveSpeech(recognizer, rate_hz=rate)
        await _listen(socket, live, desk)
    except ValueError:
        await _give_up(socket, "rate must be a whole number of Hz", 1003)
    except (Refused, ThawlineError) as error:
        message = error.message if isinstance(error, Refused) else error.what
        await _give_up(socket, message, 1013 if isinstance(error, Refused) else 1003)
    except WebSocketDisconnect:
        pass
    finally:
        desk.streams -= 1


async def _listen(socket: WebSocket, live: LiveSpeech, desk: Desk) -> None:
    while True:
        try:
            message = await asyncio.wait_for(socket.receive(), desk.limits.idle_s)
        except TimeoutError:
            raise Refused(408, f"nothing came for {desk.limits.idle_s:g} s", "timeout") from None
        if message["type"] == "websocket.disconnect":
            return
        data: bytes | None = message.get("bytes")
        if data is not None:
            if len(data) % 2:
                raise DataError(f"{len(data)} bytes are no whole 16-bit samples")
            samples = np.frombuffer(data, "<i2").astype(np.float32) / 32768.0
            if live.seconds + len(samples) / live.rate_hz > desk.limits.seconds:
                raise Refused(413, f"more than {desk.limits.seconds:g} s", "audio_too_long")
            await _send(socket, "partial", await desk.run(partial(live.feed, samples)))
        elif message.get("text", "").strip() == "end":
            await _send(socket, "final", await desk.run(live.finish))
            await socket.close(1000)
            return
        else:
            raise DataError("send 16-bit samples in binary messages, and the word end in a text message")


async def _send(socket: WebSocket, kind: str, text: str | None) -> None:
    if text is not None:
        await socket.send_text(json.dumps({"type": kind, "text": text}, ensure_ascii=False))


async def _give_up(socket: WebSocket, message: str, code: int) -> None:
    with contextlib.suppress(RuntimeError, WebSocketDisconnect):  # the client may have left meanwhile
        await socket.send_text(json.dumps({"type": "error", "message": message}, ensure_ascii=False))
        await socket.close(code, message[:120])


def _same_site(socket: WebSocket) -> bool:
    """Browsers let any page open a WebSocket to any host and say whose page it is; programs send no Origin."""
    origin = socket.headers.get("origin")
    return origin is None or urlsplit(origin).netloc == socket.headers.get("host")


# --- bodies -----------------------------------------------------------------------------------------------------------


class _BoundedBody:
    """Turns down a body that is too large: at once where its length is announced, else as soon as it has become so."""

    def __init__(self, app: Callable[..., Awaitable[None]], limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Callable[[], Awaitable[Scope]], send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        too_large = JSONResponse(
            _error(f"more than the {self.limit / 1e6:g} MB that are taken", "request_too_large"), 413
        )
        if announced.isdigit() and int(announced) > self.limit:
            await too_large(scope, receive, send)
            return
        seen = 0

        async def counted() -> Scope:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.limit:
                raise _TooLarge
            return message

        try:
            await self.app(scope, counted, send)
        except _TooLarge:
            await too_large(scope, receive, send)


class _TooLarge(Exception):
    """The body has outgrown the limit while it came in."""
