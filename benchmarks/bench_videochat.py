"""Training VideoChat2's projection alone: Thawline beside a plain PyTorch loop on the same batches, in one run.

    python benchmarks/bench_videochat.py [--epochs 2] [--samples 32] [--width 256]

The plain loop is what one would write by hand: everything frozen and in eval mode but the projection, fused AdamW,
cosine rate, clipping. It reads the same batches through the same loader and seeds torch before each step as Thawline
does; then the losses must be equal to the last bit, and are checked to be. Thawline's time includes its checkpoints and
the proof that what is frozen did not change. The videos are made on the spot; the model (vision transformer, Q-Former,
Mistral) has random weights. What a checkpoint costs on the disk stands beside it. The result is written to
benchmarks/results/videochat.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from thawline.core.extras import need
from thawline.core.rng import derive
from thawline.data.loader import BatchRequest, Loader
from thawline.data.sampler import BatchPlan, Cursor
from thawline.tasks.runs import open_recipe, train
from thawline.train.monitor import SilentMonitor
from thawline.train.recipe import Recipe
from thawline.train.rundir import read_rows
from thawline.train.schedule import lr_factor
from thawline.train.seeding import seed_all
from thawline.train.task import Task

WORDS = "[INST] [/INST] <Video> </Video> what is it . a the dark light video contains 4 frames sampled at seconds The"
RECIPE = """\
task: videochat
model: {model}
{begin}data: {{train: it.json, batch: {{size: 4}}, conf: {{augment: false}}}}
plan: {{train: [mistral_proj]}}
optim: {{name: adamw, lr: 1e-3, schedule: {{name: cosine, warmup: 2 steps}}}}
run: {{epochs: {epochs}, seed: 7, workers: 0}}
options: {options}
"""


class Timed(SilentMonitor):
    """Notes when the first step began to be prepared."""

    begun = 0.0

    def begin(self, *, step: int, total_steps: int) -> None:
        self.begun = time.perf_counter()


def write_case(folder: Path, samples: int, width: int) -> None:
    """A language model's directory, a BERT vocabulary, two videos, and questions about them."""
    transformers = need("transformers", extra="hf")
    tokenizers = need("tokenizers", extra="hf")
    config = transformers.MistralConfig(
        vocab_size=64, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config.save_pretrained(folder / "llm")
    known = {word: n for n, word in enumerate(("<unk>", "<s>", "</s>", *dict.fromkeys(WORDS.split())))}
    spelling = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="<unk>"))
    spelling.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    spelling.add_special_tokens(["<unk>", "<s>", "</s>"])
    spelling.save(str(folder / "llm" / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    named = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "llm" / "tokenizer_config.json").write_text(json.dumps(named))
    (folder / "bert").mkdir()
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "look"]
    (folder / "bert" / "vocab.txt").write_text("\n".join(pieces) + "\n")
    sizes = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 384}
    sizes |= {"max_position_embeddings": 64, "vocab_size": len(pieces)}
    (folder / "bert" / "config.json").write_text(json.dumps(sizes))
    for shade, grey in (("dark", 10), ("light", 170)):
        write_video(folder / f"{shade}.mkv", grey)
    rows = [{"video": f"{s}.mkv", "QA": [{"q": "what is it", "a": f"the {s} video"}]} for s in ("dark", "light")]
    (folder / "it.json").write_text(json.dumps(rows * (samples // 2)))


def write_video(path: Path, grey: int) -> None:
    av = need("av", extra="video")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 96, 80, "yuv420p"
        for number in range(16):
            frame = av.VideoFrame.from_ndarray(np.full((80, 96, 3), grey + 4 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 8)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def section() -> dict[str, Any]:
    """Upstream's `model` section at a small size."""
    vision = {"img_size": 64, "patch_size": 16, "encoder_embed_dim": 192, "encoder_depth": 5, "encoder_num_heads": 4}
    vision |= {"num_frames": 4, "tubelet_size": 1, "return_index": -2, "vit_add_ln": True}
    return {"vision_encoder": vision, "num_query_token": 8, "extra_num_query_token": 8, "qformer_text_input": True,
            "max_txt_len": 64}  # fmt: skip


def plain_loop(recipe: Recipe, task: Task) -> tuple[list[float], float]:
    """The loss of every step and the seconds that all of them took, without Thawline's loop, plan or engine."""
    model: Any = task.build(recipe)
    samples = task.samples(recipe, model, "train")
    seed = recipe.run.seed
    plan = BatchPlan(len(samples), seed=seed, batching=recipe.data.batch, length=samples.length)
    per_epoch = plan.batches_in_epoch(0)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.eval()
    model.training = True  # the root alone; nothing frozen drops anything
    model.mistral_proj.requires_grad_(True).train()
    trained = list(model.mistral_proj.parameters())
    optimizer = torch.optim.AdamW(trained, lr=recipe.optim.lr, weight_decay=recipe.optim.weight_decay, fused=True)
    losses: list[float] = []
    begin = time.perf_counter()
    with Loader[Any, Any](samples, seed=seed) as loader:
        for epoch in range(recipe.run.epochs):
            requests = (BatchRequest(epoch=epoch, cursor=c, ids=ids) for c, ids in plan.batches(Cursor(epoch)))
            for loaded in loader.iterate(requests):
                batch, step = loaded.batch, len(losses)
                total = per_epoch * recipe.run.epochs
                factor = lr_factor(recipe.optim.schedule, step, total_steps=total, steps_per_epoch=per_epoch)
                optimizer.param_groups[0]["lr"] = recipe.optim.lr * factor
                seed_all(derive(seed, "step", step, 0))
                found = model(batch.clips, batch.prompts, batch.text_ids, batch.text_mask)
                loss = found.sum / batch.weights["tokens"]
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                losses.append(loss.item())
    return losses, time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_case(folder, given.samples, given.width)
        options = json.dumps({"bert": "bert", "config": section()})
        drawn = folder / "drawn.yaml"
        drawn.write_text(RECIPE.format(model="llm", begin="init: random\n", epochs=1, options=options))
        base = train(drawn, ["run.steps=1"], run=folder / "drawn").dir / "base"
        recipe_path = folder / "projection.yaml"
        recipe_path.write_text(RECIPE.format(model=base, begin="", epochs=given.epochs, options="{export: []}"))
        theirs_s = ours_s = float("inf")
        equal = True
        for turn in range(2):
            theirs, seconds = plain_loop(*open_recipe(recipe_path))
            theirs_s = min(theirs_s, seconds)
            clock = Timed()
            run = train(recipe_path, run=folder / f"run-{turn}", monitor=clock)
            ours_s = min(ours_s, time.perf_counter() - clock.begun)
            equal &= [row["loss"] for row in read_rows(run.dir / "metrics.jsonl") if "loss" in row] == theirs
        delta = sorted((run.dir / "checkpoints").glob("step-*"))[-1] / "delta.safetensors"
        whole = sum(file.stat().st_size for file in base.rglob("*.safetensors"))
        sizes = delta.stat().st_size, whole
    command = f"python benchmarks/bench_videochat.py --epochs {given.epochs} --samples {given.samples}"
    command += f" --width {given.width}"
    steps = len(theirs)
    text = f"""\
# Training VideoChat2's projection beside a plain loop

`{command}`, {platform.machine()}, {given.threads} thread(s), torch {torch.__version__}:
vision transformer, Q-Former and Mistral with random weights, on the CPU, batches of 4, the faster of two turns.

| plan | steps | plain loop, ms a step | Thawline, ms a step | ratio | losses equal, bitwise | delta, kB | model, kB |
|---|---|---|---|---|---|---|---|
| projection only | {steps} | {1000 * theirs_s / steps:.1f} | {1000 * ours_s / steps:.1f} | {ours_s / theirs_s:.2f} \
| {"yes" if equal else "NO"} | {sizes[0] / 1e3:.0f} | {sizes[1] / 1e3:.0f} |

Thawline's time includes its checkpoints, its audits and the export; the plain loop does none of them.
Building the model is counted for neither. On a shared machine, differences below a fifth say nothing.
"""
    target = Path(__file__).parent / "results" / "videochat.md"
    target.parent.mkdir(exist_ok=True)
    target.write_text(text)
    print(text)
    if not equal:
        raise SystemExit("the losses differ")


if __name__ == "__main__":
    main()
