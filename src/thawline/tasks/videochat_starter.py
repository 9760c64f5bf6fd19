"""A first recipe for video chat, with a comment on every key that people change."""

from __future__ import annotations

from pathlib import Path

from thawline.core.config import scalar_text
from thawline.tasks.videochat_recognition import home_at, is_llm, recognises

_TEMPLATE = """\
# thawline plan {name}     shows what this would train, tensor by tensor
# thawline train {name}    trains it; the same command goes on after a stop
# thawline chat runs/{stem} VIDEO
task: videochat
model: {model}             # VideoChat2's parts, a language model's directory (with options.parts), or a run
data:
  train: {train}           # [{{"video", "QA": [{{"i", "q", "a"}}]}}], LLaVA's conversations, or captions
  valid: {valid}
  batch: {{size: 2}}         # conversations a step (or of each of run.accumulate parts of it)
  conf:
    frames: {frames}              # a video; null: as the model's configuration says
    augment: true          # random crop and mirror image in training
    shuffle_turns: true    # another order of a clip's questions each time
    # media_root: videos   # what paths in the files above are relative to; else the file's own folder
plan:
  preset: switches         # what the freeze_* lines below mean
  # lr: {{vision_encoder: 0.1}}   # multiples of optim.lr
  # thaw:                  # what trains from later on
  #   - {{after: 1 epoch, train: ["vision_encoder.encoder.blocks[-4:]"], lr: 0.1}}
optim:
  name: adamw
  lr: 2.0e-5               # 1.0e-4 where only the projection trains
  weight_decay: 0.02       # biases and everything one-dimensional are kept from it
  clip: 1.0                # largest norm of the gradient; null leaves it alone, as upstream
  schedule: {{name: cosine, warmup: 20%, floor: 0.25}}
run:
  epochs: 3
  seed: 42
  precision: fp32          # bf16 on a GPU
  accumulate: 8            # micro-batches a step
  workers: 2               # loader processes; change nothing but speed
  checkpoint: {{every: 500 steps, keep: 2, best: valid/loss}}
options:
  freeze_vit: true         # the vision transformer
  freeze_qformer: true     # with its queries
  freeze_llm: true         # the language model's own weights
  freeze_lora: false       # the adapters on it
{begin}  compat: thawline         # upstream: its surprises too (docs/videochat.md has the list)
  export: [upstream, merged]   # beside our own result: Ask-Anything's file, and a plain language model (as large as it)
"""
_BEGIN = """\
  stage: 3                 # 2: captions, no text in the Q-Former, no adapters; hd: clips cut into tiles
  bert: bert-base-uncased  # the directory of the Q-Former's vocabulary
  parts:                   # the files of the stages, in the order of loading
    - umt_l16_qformer.pth
    - videochat2_mistral_7b_stage2.pth
  new: [lora]              # what begins from initial values, on purpose
  dtype: bfloat16          # of the language model, which is frozen
  config: config_7b_stage3.py   # upstream's script (read, not run), JSON, YAML, or the section itself
"""


def is_video_chat(model: Path) -> bool:
    """Whether VideoChat2's parts lie at `model`, or a language model that it is built on."""
    return recognises(model) or is_llm(model)


def videochat_recipe(model: Path, *, train: str, valid: str, name: str) -> str:
    """The text of a recipe for the model at `model`. Of a bare language model, the other parts are left to fill in."""
    whole = recognises(model)
    return _TEMPLATE.format(
        name=name,
        stem=Path(name).stem,
        model=scalar_text(model),
        train=train,
        valid=valid,
        frames=home_at(model).clips.frames if whole else 8,
        begin="" if whole else _BEGIN,
    )
