"""The loader against the floor of its kernels, in one run. Writes results/loader.md.

    python benchmarks/bench_loader.py LIST... [--utterances 400] [--rounds 5] [--out benchmarks/results/loader.md]

The floor is the kernels and nothing else: libsndfile, soxr (rate and speed), kaldi-native-fbank, two masks of time and
of frequency by slices. Ours is the whole loader in one process: manifest row, checks for damage, keyed random numbers,
the same kernels, targets, padding into batches. CPU time of one worker; the least of all rounds, which go in turn.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Iterable
from datetime import date
from pathlib import Path

import kaldi_native_fbank as knf
import numpy as np
import soundfile
import soxr
import torch

from thawline.data.loader import BatchRequest, Loader
from thawline.data.manifest import read_manifest
from thawline.data.sampler import Batching, BatchPlan, Cursor
from thawline.data.speech import SpeechSamples
from thawline.data.speech_frontend import SpeechFrontend
from thawline.data.text import CharTokenizer, build_units
from thawline.data.utterance import Utterance

ROOT = Path(__file__).resolve().parent.parent


def bare(rows: Iterable[Utterance]) -> None:
    """The kernels over all rows."""
    options = knf.FbankOptions()
    options.frame_opts.dither = 0
    options.mel_opts.num_bins = 80
    options.energy_floor = 0
    rng = np.random.default_rng(0)
    for row in rows:
        samples, rate = soundfile.read(row.wav, dtype="float32")
        if rate != 16000:
            samples = soxr.resample(samples, rate, 16000)
        speed = (0.9, 1.0, 1.1)[rng.integers(3)]
        if speed != 1.0:
            samples = soxr.resample(samples, round(16000 * speed), 16000)
        bank = knf.OnlineFbank(options)
        bank.accept_waveform(16000, memoryview(samples * np.float32(32768)))
        bank.input_finished()
        feats = np.concatenate([bank.get_frame(i) for i in range(bank.num_frames_ready)]).reshape(-1, 80)
        for _ in range(2):
            at = rng.integers(len(feats))
            feats[at : at + rng.integers(1, 51)] = 0
            at = rng.integers(80)
            feats[:, at : at + rng.integers(1, 11)] = 0


def ours(samples: SpeechSamples, plan: BatchPlan) -> int:
    """One epoch through the loader; how many utterances came."""
    requests = (BatchRequest(epoch=0, cursor=cursor, ids=ids) for cursor, ids in plan.batches(Cursor()))
    with Loader(samples, seed=1) as loader:
        return sum(len(loaded.batch.keys) for loaded in loader.iterate(requests) if loaded.batch is not None)


def measure(path: Path, utterances: int, rounds: int) -> str:
    """One row of the table."""
    manifest = read_manifest(path)
    manifest = manifest.keep(range(0, len(manifest), max(1, len(manifest) // utterances)))
    tokenizer = CharTokenizer(build_units(row.txt for row in manifest))
    samples = SpeechSamples(manifest, SpeechFrontend(speed_perturb=True), tokenizer, training=True)
    plan = BatchPlan(len(samples), seed=1, batching=Batching(size=16), length=samples.length)
    floor, whole, count = [], [], 0
    for _ in range(rounds):
        began = time.process_time()
        bare(samples.manifest)
        floor.append(time.process_time() - began)
        began = time.process_time()
        count = ours(samples, plan)
        whole.append(time.process_time() - began)
    seconds = sum(row.duration_s or 0.0 for row in samples.manifest)
    kind = Path(samples.manifest[0].wav).suffix
    return (
        f"| {path.parent.name}/{path.name} ({kind}) | {count} x {seconds / count:.2f} s | {count / min(floor):.0f} | "
        f"{count / min(whole):.0f} | {min(floor) / min(whole):.2f} | {seconds / min(whole):.0f} |"
    )


SETS = ("fsdd/base.train.list", "an4/train.list", "cmn-words/train.list")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "lists", nargs="*", type=Path, help="WeNet lists; without any, the real sets beside the checkout"
    )
    parser.add_argument("--utterances", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "loader.md")
    settings = parser.parse_args()
    if not settings.lists:
        shared = Path(os.environ.get("THAWLINE_SHARED", ROOT.parent / "shared"))
        settings.lists = [p for p in (shared / "data" / name for name in SETS) if p.is_file()]
    if not settings.lists:
        print("no lists given, and no real sets beside the checkout: nothing measured")
        return
    torch.set_num_threads(1)
    lines = [
        "# Loader",
        "",
        f"`python benchmarks/bench_loader.py {' '.join(p.parent.name + '/' + p.name for p in settings.lists)}`",
        "",
        f"{date.today()}; {os.cpu_count()} cores ({platform.machine()}), {platform.system()}, one process;",
        f"Python {platform.python_version()}. Load average {os.getloadavg()[0]:.1f}.",
        f"At most {settings.utterances} utterances a set, the least of {settings.rounds} rounds.",
        "",
        "Decoding, resampling, speed perturbation, 80 filter banks and SpecAugment; utterances per CPU second of one",
        "worker. The floor is the same kernels called bare.",
        "",
        "| data | utterances | floor | ours | share of the floor | seconds of sound per second |",
        "|---|---|---|---|---|---|",
    ]
    for path in settings.lists:
        lines.append(measure(path, settings.utterances, settings.rounds))
        print(lines[-1], flush=True)
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    settings.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
