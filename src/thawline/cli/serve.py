"""`thawline serve`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from thawline.cli.decoding import decoding_options


@click.command()
@click.argument("model", type=click.Path())
@click.option("--base", type=click.Path(), help="The base that a delta belongs to.")
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0 lets other machines in.")
@click.option("--port", default=8300, show_default=True)
@click.option("--max-mb", default=25.0, show_default=True, help="Largest upload.")
@click.option("--max-seconds", default=600.0, show_default=True, help="Longest recording or live stream.")
@click.option("--max-waiting", default=8, show_default=True, help="Requests queued; more are turned away with 503.")
@click.option("--max-streams", default=4, show_default=True, help="Live streams at once.")
@click.option("--patience", default=300.0, show_default=True, help="Seconds that a request may take.")
@decoding_options
def serve(
    model: str,
    base: str | None,
    host: str,
    port: int,
    max_mb: float,
    max_seconds: float,
    max_waiting: int,
    max_streams: int,
    patience: float,
    **options: Any,
) -> None:
    """Serve MODEL: a web page, OpenAI's /v1/audio/transcriptions, and live speech over a WebSocket."""
    from thawline.core.extras import need

    for name in ("fastapi", "multipart", "websockets"):
        need(name, extra="serve")
    uvicorn: Any = need("uvicorn", extra="serve")
    from thawline.tasks.recognition import Recognizer
    from thawline.tasks.serving import Limits, make_app

    recognizer = Recognizer.open(model, base=base, **options)
    limits = Limits(
        upload_bytes=int(max_mb * 1e6),
        seconds=max_seconds,
        waiting=max_waiting,
        streams=max_streams,
        patience_s=patience,
    )
    app = make_app(recognizer, name=Path(model).absolute().name, limits=limits)
    print(f"http://{host}:{port}/  (Ctrl-C ends it)", file=sys.stderr, flush=True)
    uvicorn.run(app, host=host, port=port, log_level="warning", ws_max_size=1 << 20)
