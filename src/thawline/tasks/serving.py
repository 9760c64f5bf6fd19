"""A model over HTTP: a page, and the calls behind it, for recognisers (OpenAI's) and for models that see videos.

One model, one thread that computes, and a queue with an end (`serving_desk`). Needs the extra `serve`; this module is
imported by the verb alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse

from thawline.errors import ThawlineError
from thawline.models.videochat.chat import Sampling
from thawline.tasks.recognition import Recognizer
from thawline.tasks.serving_desk import BoundedBody, Desk, Limits, Refused, error_json
from thawline.tasks.serving_page import SPEECH_PAGE, VIDEO_PAGE
from thawline.tasks.serving_speech import add_speech
from thawline.tasks.serving_video import add_video
from thawline.tasks.videochat_asking import ChatModel


def make_app(
    model: Recognizer | ChatModel, *, name: str, limits: Limits | None = None, sampling: Sampling | None = None
) -> FastAPI:
    """The application that serves `model` under the model name `name`. sampling: how a video-chat model answers."""
    limits = limits or Limits()
    desk = Desk(limits)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        desk.pool.shutdown(wait=True, cancel_futures=True)

    app = FastAPI(title="thawline serve", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(BoundedBody, limit=limits.upload_bytes)

    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return SPEECH_PAGE if isinstance(model, Recognizer) else VIDEO_PAGE

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": name, "waiting": desk.waiting, "streams": desk.streams}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "thawline"}]}

    if isinstance(model, Recognizer):
        add_speech(app, model, desk, name=name)
    else:
        add_video(app, model, desk, sampling=sampling or Sampling())

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        headers = {"Retry-After": "5"} if error.status == 503 else None
        return JSONResponse(error_json(error.message, error.code), error.status, headers)

    @app.exception_handler(ThawlineError)
    async def not_possible(_: Request, error: ThawlineError) -> JSONResponse:
        fix = f" ({error.fix})" if error.fix else ""
        return JSONResponse(error_json(error.what + fix, "invalid_request_error"), 400)

    @app.exception_handler(RequestValidationError)
    async def not_understood(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return JSONResponse(error_json(f"{where}: {first['msg']}".lstrip(": "), "invalid_request_error"), 400)

    return app
