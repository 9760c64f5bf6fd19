"""A stage-1 model ready to be asked: how often a caption finds its clip."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from thawline.data.conversation import read_dialogues
from thawline.data.videochat_captions import CaptionSamples
from thawline.models.videochat.alignment import VideoAlignment
from thawline.tasks.evaluating import evaluate_samples
from thawline.tasks.videochat_alignment import evaluate
from thawline.tasks.videochat_alignment_home import AlignmentHome
from thawline.tasks.videochat_loading import open_alignment
from thawline.train.engine import pick_device
from thawline.train.task import Evaluation


@dataclass(frozen=True, slots=True)
class CaptionFinder:
    """A stage-1 model with its vocabulary."""

    model: VideoAlignment
    home: AlignmentHome

    @classmethod
    def open(cls, model: Path | str, *, base: Path | str | None = None) -> CaptionFinder:
        """Load a model as `videochat_loading.open_alignment`, onto the GPU where there is one."""
        opened, home = open_alignment(Path(model).expanduser().absolute(), None if base is None else Path(base))
        opened.to(pick_device("auto"))
        return cls(opened, home)

    def evaluate(
        self, data: Path | str, *, batch_size: int = 8, workers: int = 0, limit: int | None = None
    ) -> Evaluation:
        """Recall and losses on a caption file; a row a caption. Unreadable samples are counted as `unreadable`."""
        samples = CaptionSamples(
            read_dialogues(Path(data)),
            tokenizer=self.home.tokenizer(),
            settings=self.home.clips,
            training=False,
            seed=0,
        )
        return evaluate_samples(
            samples,
            lambda batches: evaluate(self.model, batches),
            batch_size=batch_size,
            workers=workers,
            limit=limit,
            device=self.model.temp.device,
        )
