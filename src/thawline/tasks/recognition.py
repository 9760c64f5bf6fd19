"""A recogniser ready to use: audio in, text out, and its score on a data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from thawline.core.config import near_names
from thawline.data.loader import BatchRequest, Loader
from thawline.data.manifest import Manifest, Utterance, read_manifest
from thawline.data.sampler import Batching, BatchPlan, Cursor
from thawline.data.speech import SpeechFrontend, SpeechSamples
from thawline.data.text import Tokenizer
from thawline.errors import DataError
from thawline.tasks.asr import SpeechOptions, decode, evaluate
from thawline.tasks.loading import load_located, locate
from thawline.tasks.speech_home import SpeechHome
from thawline.train.recipe import read_recipe
from thawline.train.task import Evaluation


@dataclass(frozen=True, slots=True)
class Recognizer:
    """A model with its features and its tokenizer."""

    model: nn.Module
    frontend: SpeechFrontend
    tokenizer: Tokenizer
    options: SpeechOptions

    @classmethod
    def open(cls, model: Path | str, *, base: Path | str | None = None, **options: Any) -> Recognizer:
        """Load a model directory, a run, a checkpoint, or a delta with `base`. Options as in `SpeechOptions`; a run's
        own options hold where none are given."""
        place = locate(model, base)
        owner = place.run or (Path(model).absolute() if (Path(model) / "recipe.yaml").is_file() else None)
        conf: dict[str, Any] = {}
        chosen = {key: value for key, value in options.items() if value not in ("", None)}
        if owner is not None:
            recipe = read_recipe(owner / "recipe.yaml")
            conf = dict(recipe.data.conf)
            chosen = {**recipe.options, **chosen}
        home = SpeechHome.of(place.home)
        return cls(load_located(place), home.frontend(conf), home.tokenizer(), SpeechOptions(**chosen))

    def transcribe(self, files: Sequence[Path | str], *, batch_size: int = 8) -> list[str]:
        """The text of each audio file, in order. Raises DataError naming the first that cannot be read."""
        rows = [Utterance(key=str(file), wav=str(_existing(Path(file))), txt="") for file in files]
        samples = SpeechSamples(Manifest(rows, path=Path(), format="files"), self.frontend, None, training=False)
        texts: list[str] = []
        with torch.inference_mode():
            for start in range(0, len(rows), batch_size):
                batch = samples.collate([samples.read(i, 0) for i in range(start, min(start + batch_size, len(rows)))])
                texts += [self.tokenizer.decode(t).strip() for t in decode(self.model, batch, self.options)]
        return texts

    def evaluate(
        self, data: Path | str, *, batch_size: int = 8, workers: int = 0, limit: int | None = None
    ) -> Evaluation:
        """Error rates on a data set, and a row an utterance. What cannot be read is counted as `unreadable`."""
        manifest = read_manifest(Path(data))
        if limit is not None:
            manifest = manifest.keep(range(min(limit, len(manifest))))
        samples = SpeechSamples(manifest, self.frontend, self.tokenizer, training=False)
        plan = BatchPlan(len(samples), seed=0, batching=Batching(size=batch_size), length=samples.length, shuffle=False)
        unreadable = 0

        def batches() -> Iterator[Any]:
            nonlocal unreadable
            requests = (BatchRequest(epoch=0, cursor=c, ids=ids) for c, ids in plan.batches(Cursor()))
            with Loader(samples, seed=0, workers=workers) as loader:
                for loaded in loader.iterate(requests):
                    unreadable += len(loaded.bad)
                    if loaded.batch is not None:
                        yield loaded.batch

        with torch.inference_mode():
            result = evaluate(self.model, self.tokenizer, batches(), self.options)
        return Evaluation({**result.metrics, "unreadable": float(unreadable)}, result.rows)


def _existing(path: Path) -> Path:
    if not path.is_file():
        near = near_names(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else []
        raise DataError(
            "no such audio file",
            where=str(path),
            fix=f"did you mean {path.parent / near[0]}?" if near else "check the path",
        )
    return path.absolute()
