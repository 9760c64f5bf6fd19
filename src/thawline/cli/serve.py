"""`thawline serve`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from thawline.cli.asking import ASKING, asking_options, open_chat_model, sampling_of
from thawline.cli.decoding import decoding_options

if TYPE_CHECKING:
    from thawline.tasks.recognition import Recognizer
    from thawline.tasks.videochat_asking import ChatModel


@click.command()
@click.argument("model", type=click.Path())
@click.option("--base", type=click.Path(), help="The base that a delta belongs to.")
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0 lets other machines in.")
@click.option("--port", default=8300, show_default=True)
@click.option("--max-mb", default=25.0, show_default=True, help="Largest upload.")
@click.option("--max-seconds", default=600.0, show_default=True, help="Longest recording, video or live stream.")
@click.option("--max-waiting", default=8, show_default=True, help="Requests queued; more are turned away with 503.")
@click.option("--max-streams", default=4, show_default=True, help="Live streams at once.")
@click.option("--patience", default=300.0, show_default=True, help="Seconds that a request may take.")
@decoding_options
@asking_options
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
    """Serve MODEL: a web page, and behind it OpenAI's /v1/audio/transcriptions and live speech over a WebSocket, or for
    a video-chat model a video that is uploaded and asked about."""
    from thawline.core.extras import need

    for name in ("fastapi", "multipart", "websockets"):
        need(name, extra="serve")
    uvicorn: Any = need("uvicorn", extra="serve")
    from thawline.tasks.kinds import kind_of
    from thawline.tasks.serving import make_app
    from thawline.tasks.serving_desk import Limits

    asking = {name: options.pop(name) for name in ASKING}
    kind = "videochat" if asking["parts"] else kind_of(model, base)
    served = _opened(kind, model, base, asking, options)
    limits = Limits(
        upload_bytes=int(max_mb * 1e6),
        seconds=max_seconds,
        waiting=max_waiting,
        streams=max_streams,
        patience_s=patience,
    )
    sampling = sampling_of(asking) if kind == "videochat" else None
    app = make_app(served, name=Path(model).absolute().name, limits=limits, sampling=sampling)
    print(f"http://{host}:{port}/  (Ctrl-C ends it)", file=sys.stderr, flush=True)
    uvicorn.run(app, host=host, port=port, log_level="warning", ws_max_size=1 << 20)


def _opened(
    kind: str, model: str, base: str | None, asking: Mapping[str, Any], decoding: Mapping[str, Any]
) -> Recognizer | ChatModel:
    """The model, with the options of its kind. Raises click.UsageError where there is no page for it, or an option is
    of the other kind."""
    if kind not in ("speech", "videochat"):
        raise click.UsageError(f"there is no page for a {kind} model: speech and videochat are served")
    for name, value in (decoding if kind == "videochat" else asking).items():
        if value:
            raise click.UsageError(f"--{name.replace('_', '-')} means nothing to a {kind} model")
    if kind == "videochat":
        return open_chat_model(model, base, asking)
    from thawline.tasks.recognition import Recognizer

    return Recognizer.open(model, base=base, **decoding)
