"""A web server on loopback that serves ranges of bytes, and fails as it is told."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Served:
    """What is served and how.

    files:    path -> content
    failures: path -> status codes of the next answers; 0 closes the connection without one, -1 never answers
    ranges:   whether Range is honoured; a server that does not sends the whole file
    stamped:  whether answers say what changes with the content (ETag)
    asked:    (method, path, Range) of every request
    """

    files: dict[str, bytes] = field(default_factory=dict)
    failures: dict[str, list[int]] = field(default_factory=dict)
    ranges: bool = True
    stamped: bool = True
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    url: str = ""
    over: threading.Event = field(default_factory=threading.Event)

    @property
    def sent_bytes(self) -> int:
        """Bytes that were asked for by range."""
        spans = [re.match(r"bytes=(\d+)-(\d+)", asked) for _, _, asked in self.asked]
        return sum(int(s[2]) - int(s[1]) + 1 for s in spans if s)


@contextmanager
def serving(port: int = 0) -> Iterator[Served]:
    """A server that runs while the block does."""
    served = Served()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            asked = self.headers.get("Range", "")
            if served.over.is_set():  # on a connection that was kept
                self.close_connection = True
                return
            served.asked.append((self.command, self.path, asked))
            failures = served.failures.get(self.path)
            if failures:
                status = failures.pop(0)
                if status < 0:
                    served.over.wait(60)
                    return
                if not status:
                    self.close_connection = True
                    return
                self._send(status, b"", with_body)
                return
            body = served.files.get(self.path)
            if body is None:
                self._send(404, b"", with_body)
                return
            span = re.fullmatch(r"bytes=(\d+)-(\d*)", asked) if served.ranges else None
            if span is None:
                self._send(200, body, with_body)
                return
            begin, end = int(span[1]), int(span[2]) if span[2] else len(body) - 1
            if begin >= len(body):
                self._send(416, b"", with_body)
                return
            part = body[begin : end + 1]
            self._send(206, part, with_body, {"Content-Range": f"bytes {begin}-{begin + len(part) - 1}/{len(body)}"})

        def _send(self, status: int, body: bytes, with_body: bool, more: dict[str, str] | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            if served.ranges:
                self.send_header("Accept-Ranges", "bytes")
            if served.stamped and self.path in served.files:
                self.send_header("ETag", f'"{hash(served.files[self.path])}"')
            for name, value in (more or {}).items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    served.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        served.over.set()
        server.shutdown()
        server.server_close()
        thread.join()
