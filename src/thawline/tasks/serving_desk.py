"""What one client may cost a server: the queue before the one thread that computes, and the size of what comes in.

Who finds the queue full is told so at once (503, Retry-After) and is not left waiting. Needs the extra `serve`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi.responses import JSONResponse

T = TypeVar("T")
Scope = MutableMapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one client may cost.

    upload_bytes: of one request;  seconds: of one recording, video or live stream;  waiting: requests queued or
    computing;  streams: live streams at once;  patience_s: how long a request may take;  idle_s: silence of a live
    client;  talks: conversations about videos that are remembered;  questions: in one of them;  characters: of one
    """

    upload_bytes: int = 25_000_000
    seconds: float = 600.0
    waiting: int = 8
    streams: int = 4
    patience_s: float = 300.0
    idle_s: float = 30.0
    talks: int = 16
    questions: int = 32
    characters: int = 4000


@dataclass(slots=True)
class Desk:
    """The one thread that computes, and how many wait for it. A request that ran out of patience keeps its place until
    its computation has ended: a thread cannot be stopped, and the queue must not pretend that it was."""

    limits: Limits
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="model"))
    waiting: int = 0
    streams: int = 0

    def begin(self, work: Callable[[], T]) -> Future[T]:
        """`work` in the queue. Raises Refused when that is full."""
        if self.waiting >= self.limits.waiting:
            raise Refused(503, f"{self.waiting} requests are waiting already; try again later", "server_busy")
        self.waiting += 1
        loop = asyncio.get_running_loop()
        job = self.pool.submit(work)
        job.add_done_callback(lambda _: loop.call_soon_threadsafe(self._leave))
        return job

    async def run(self, work: Callable[[], T]) -> T:
        """The result of `work`, in turn. Raises Refused when the queue is full or patience has ended."""
        job = self.begin(work)
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


def error_json(message: str, code: str) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": code, "param": None, "code": code}}


class BoundedBody:
    """Turns down a body that is too large: at once where its length is announced, else as soon as it has become so."""

    def __init__(self, app: Callable[..., Awaitable[None]], limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Callable[[], Awaitable[Scope]], send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        too_large = JSONResponse(
            error_json(f"more than the {self.limit / 1e6:g} MB that are taken", "request_too_large"), 413
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
