"""Recognition over HTTP: OpenAI's transcription call, and live speech over a WebSocket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from functools import partial
from urllib.parse import urlsplit

import numpy as np
from fastapi import FastAPI, Request, WebSocket, WebSocketDisconnect
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.datastructures import UploadFile

from thawline.errors import DataError, ThawlineError
from thawline.tasks.live_speech import LiveSpeech
from thawline.tasks.recognition import Recognizer
from thawline.tasks.serving_desk import Desk, Refused
from thawline.tasks.transcript import Transcript, subrip, webvtt

FORMATS = ("json", "text", "srt", "vtt", "verbose_json")


def add_speech(app: FastAPI, recognizer: Recognizer, desk: Desk, *, name: str) -> None:
    """The calls of a recogniser."""

    @app.post("/v1/audio/transcriptions")
    async def transcriptions(request: Request) -> Response:
        return await _transcription(request, recognizer, desk, name)

    @app.websocket("/v1/audio/stream")
    async def stream(socket: WebSocket) -> None:
        await _stream(socket, recognizer, desk)


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
