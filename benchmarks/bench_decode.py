"""Prefix beam search against a plain per-frame search, and streaming latency. Writes results/decode.md.

    python benchmarks/bench_decode.py [--utterances 100] [--seconds 10] [--out benchmarks/results/decode.md]

The plain search is that of tests/models/decode/plain_search.py: one utterance after another, a Python loop over frames,
labels and prefixes, as WeNet's own. Both get the same log probabilities and must give the same n-best lists and times.
CPU time is compared, which other work on the machine disturbs less than wall time.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thawline.models.decode.prefix_beam import ctc_prefix_beam_search
from thawline.models.wenet.config import read_config
from thawline.models.wenet.model import U2Model, build

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "models" / "decode"))

FRAMES_PER_SECOND = 25  # after subsampling by 4


def log_probs(utterances: int, seconds: float, vocabulary: int = 1000) -> Tensor:
    """(utterances, frames, vocabulary): noise with a blank that is usually likeliest, as of a trained model."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(utterances, round(seconds * FRAMES_PER_SECOND), vocabulary, generator=generator) * 2
    logits[:, :, 0] += 5
    return logits.log_softmax(-1)


def wenets_labels(logp: Tensor, beam: int) -> tuple[list[float], list[int]]:
    """The labels of one frame as WeNet takes them (search.py: topk, then .item() for each label and probability)."""
    labels = [u.item() for u in logp.topk(beam).indices]
    return [logp[u].item() for u in labels], [int(u) for u in labels]


def compare(scores: Tensor, beam: int) -> tuple[float, float, bool]:
    """CPU seconds of ours and of the plain search over the batch, and whether they agree."""
    import plain_search  # type: ignore[import-not-found]  # from the tests

    lengths = torch.full((scores.size(0),), scores.size(1))
    ctc_prefix_beam_search(scores[:2], lengths[:2], beam=beam, blank=0)
    began = time.process_time()
    found = ctc_prefix_beam_search(scores, lengths, beam=beam, blank=0)
    ours = time.process_time() - began
    began = time.process_time()
    equal = True
    for row, hypothesis in zip(scores, found, strict=True):
        frames = [wenets_labels(logp, beam) for logp in row]
        plain = plain_search.search(frames, beam=beam, blank=0)
        equal &= [p[0] for p in plain] == list(hypothesis.nbest)
        equal &= [p[2] for p in plain] == list(hypothesis.nbest_times or ())
    return ours, time.process_time() - began, equal


def streaming_model() -> U2Model:
    """A U2++ conformer of WeNet's usual size (12 layers of 256), fresh weights."""
    torch.manual_seed(0)
    values: dict[str, Any] = {
        "encoder": "conformer",
        "encoder_conf": {
            "output_size": 256, "attention_heads": 4, "linear_units": 2048, "num_blocks": 12, "causal": True,
            "use_dynamic_chunk": True, "cnn_module_kernel": 8, "cnn_module_norm": "layer_norm",
        },
        "decoder": "bitransformer",
        "decoder_conf": {"attention_heads": 4, "linear_units": 2048, "num_blocks": 3, "r_num_blocks": 3},
        "model_conf": {"ctc_weight": 0.3, "reverse_weight": 0.3},
        "input_dim": 80,
        "output_dim": 1000,
    }  # fmt: skip
    return build(read_config(values)).eval()


def latency(model: U2Model, chunk: int, left: int, seconds: float = 20.0) -> tuple[float, float, float]:
    """Milliseconds of CPU per chunk: median and worst of a stream, and of the final rescoring."""
    live = model.live(chunk_size=chunk, left_chunks=left, beam=10, ctc_weight=0.5, reverse_weight=0.3)
    feats = torch.randn(1, round(seconds * 100), 80, generator=torch.Generator().manual_seed(1))
    spent = []
    for piece in feats.split(4 * chunk, dim=1):
        began = time.process_time()
        if live.feed(piece) is not None:
            spent.append(1000 * (time.process_time() - began))
    began = time.process_time()
    live.finish()
    return statistics.median(spent), max(spent), 1000 * (time.process_time() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--utterances", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "decode.md")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    scores = log_probs(settings.utterances, settings.seconds)
    lines = [
        "# Decoding",
        "",
        f"`python benchmarks/bench_decode.py --utterances {settings.utterances} --seconds {settings.seconds:g}`",
        "",
        f"{date.today()}; {os.cpu_count()} cores ({platform.machine()}), {platform.system()}, one thread used;",
        f"Python {platform.python_version()}, torch {torch.__version__}. Load average {os.getloadavg()[0]:.1f}.",
        "",
        f"CTC prefix beam search, {settings.utterances} utterances of {settings.seconds:g} s, 1000 labels.",
        f"{scores.size(1)} encoder frames each; CPU seconds in all:",
        "",
        "| beam | ours, one batch | plain Python search | times faster | equal n-best and times |",
        "|---|---|---|---|---|",
    ]
    for beam in (5, 10):
        ours, plain, equal = compare(scores, beam)
        lines.append(f"| {beam} | {ours:.2f} | {plain:.2f} | {plain / ours:.1f} | {'yes' if equal else 'NO'} |")
        print(lines[-1], flush=True)
    lines += [
        "",
        "Streaming, U2++ conformer of 12 layers of 256, encoder with caches, prefix beam of 10,",
        "a partial result after each chunk; 20 s of features, CPU milliseconds:",
        "",
        "| chunk (frames, s of sound) | left chunks | median per chunk | worst | rescoring at the end |",
        "|---|---|---|---|---|",
    ]
    model = streaming_model()
    for chunk, left in ((8, 8), (16, 4), (16, -1)):
        median, worst, final = latency(model, chunk, left)
        history = str(left) if left >= 0 else "all"
        lines.append(f"| {chunk}, {chunk * 0.04:.2f} s | {history} | {median:.0f} | {worst:.0f} | {final:.0f} |")
        print(lines[-1], flush=True)
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    settings.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
