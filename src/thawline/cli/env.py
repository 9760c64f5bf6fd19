"""`thawline env`."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import click

from thawline.cli.app import json_option
from thawline.cli.output import give
from thawline.core.extras import need
from thawline.errors import MissingExtra

_PACKAGES = (
    ("torch", "core"),
    ("safetensors", "core"),
    ("soundfile", "speech"),
    ("soxr", "speech"),
    ("kaldi_native_fbank", "speech"),
    ("jiwer", "speech"),
    ("av", "video"),
    ("sentencepiece", "speech"),
    ("transformers", "hf"),
    ("tokenizers", "hf"),
    ("peft", "hf"),
    ("tensorboard", "tensorboard"),
    ("lightning", "lightning"),
    ("PIL", "vision"),
    ("kornia", "vision"),
    ("fastapi", "serve"),
    ("uvicorn", "serve"),
    ("espeakng_loader", "demo"),
)
_DISTRIBUTIONS = {"PIL": "pillow"}


@click.command()
@json_option
def env(as_json: bool) -> None:
    """What is installed and works here, and how to mend what does not."""
    rows: list[dict[str, Any]] = [{"name": "python", "extra": "core", "state": platform.python_version(), "fix": ""}]
    for module, extra in _PACKAGES:
        try:
            need(module, extra=extra)
        except MissingExtra as exc:
            rows.append({"name": module, "extra": extra, "state": exc.what, "fix": exc.fix})
        else:
            version = importlib.metadata.version(_DISTRIBUTIONS.get(module, module.replace("_", "-")))
            rows.append({"name": module, "extra": extra, "state": version, "fix": ""})
    text = "\n".join(
        f"{row['name']:<20} {row['extra']:<12} {row['state']}" + (f"  -> {row['fix']}" if row["fix"] else "")
        for row in rows
    )
    give({"packages": rows}, text, as_json=as_json)
