"""The scenes of the demo, in order: each says what it does, does it as a user would, and asserts what came out."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from thawline.ckpt.load import newest_whole
from thawline.data.audio import read_audio
from thawline.data.features import FbankConf, fbank
from thawline.data.manifest import read_manifest
from thawline.demo import plans
from thawline.demo.evidence import (
    changed_names,
    ctc_of,
    differing,
    frozen_statistics,
    is_statistic,
    newest_digests,
    read_tensors,
)
from thawline.demo.plans import EVERYTHING, OUTPUT, PINNED, TRACKING, Variant
from thawline.demo.recogniser import write_recogniser
from thawline.demo.stage import Stage, Ticker
from thawline.demo.verbs import kill_at_step, object_of, said, thawline
from thawline.demo.voices import BASE, NEW, RATE_HZ, Corpus, damaged, make_corpus, sha256_of_tree
from thawline.freeze.inspect import index_of
from thawline.freeze.plan import FreezePlan
from thawline.freeze.resolve import resolve
from thawline.tasks.loading import load
from thawline.tasks.recognition import Recognizer
from thawline.tasks.runs import train
from thawline.tasks.scoring import score
from thawline.train.rundir import RunDirectory, read_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Word error rates, 0..1, on the test sets of the two groups of voices."""

    new: float
    old: float


class Scenes:
    """The scenes, in order. Each leaves what later ones need in the folder, and figures in the returned values."""

    def __init__(self, out: Path, stage: Stage, *, variants: tuple[Variant, ...], epochs: int) -> None:
        self.out = out
        self.stage = stage
        self.variants = variants
        self.epochs = epochs
        self.base = out / "runs" / "base" / "model"

    def tell(self) -> dict[str, Rates]:
        corpus = self.speech()
        rates = {"base": self.learn_base(corpus)}
        rates |= self.fine_tune(corpus, rates["base"])
        self.kill_and_resume()
        self.audit()
        self.refuse_wrong_base(corpus)
        self.convert(corpus)
        self.listen(corpus)
        return rates

    def run(self, name: str) -> Path:
        return self.out / "runs" / name

    # --- 1 ------------------------------------------------------------------------------------------------------------

    def speech(self) -> Corpus:
        stage = self.stage
        stage.scene("Speech, made on the spot")
        start = time.monotonic()
        with stage.working("espeak-ng speaks"):
            corpus = make_corpus(self.out / "data")
        how = "there already" if corpus.reused else f"spoken by espeak-ng in {time.monotonic() - start:.0f} s"
        sizes = {name: len(read_manifest(path)) for name, path in corpus.lists.items()}
        stage.check(
            sizes == {"base/train": BASE.train, "base/test": BASE.test, "new/train": NEW.train, "new/test": NEW.test},
            f"{sum(sizes.values())} strings of digits, {corpus.seconds / 60:.0f} minutes, {how}",
            expected=f"{BASE.train + BASE.test + NEW.train + NEW.test} utterances in four lists",
        )
        bad = damaged(corpus.folder)
        stage.check(
            not bad,
            f"all {corpus.files} files are what SHA256SUMS says; its own digest is {corpus.digest[:16]}",
            expected=f"whole files; these are not: {', '.join(bad[:3])}",
        )
        for title, group in (("base voices", BASE), ("new voices", NEW)):
            voices = ", ".join(sorted({speaker.voice for speaker in group.speakers}))
            hiss = ", on a line that hisses" if group.hiss else ""
            stage.note(f"{title:<12} {voices}{hiss}: {group.train} to learn from, {group.test} to test with")
        return corpus

    # --- 2 ------------------------------------------------------------------------------------------------------------

    def learn_base(self, corpus: Corpus) -> Rates:
        stage = self.stage
        stage.scene("A base model, from random weights")
        recipe = self.out / "recipes" / "base.yaml"
        with stage.working("statistics of the features"):
            write_recogniser(self.out / "recogniser", units=corpus.units, train_list=corpus.lists["base/train"])
        plans.write_base_recipe(recipe, model=self.out / "recogniser", train=corpus.lists["base/train"])
        steps, seconds = self._train("base")
        model = load(self.base)
        size = sum(p.numel() for p in model.parameters())
        losses = [row["loss"] for row in read_rows(RunDirectory(self.run("base")).metrics)]
        stage.check(
            losses[-1] < losses[0] / 5,
            f"Conformer with CTC, {size / 1e6:.2f} M parameters: loss {losses[0]:.1f} -> {losses[-1]:.1f} "
            f"in {steps} steps, {seconds:.0f} s",
            expected="a fifth of the first loss, or less",
        )
        rates = self._rates(self.base, corpus)
        stage.check(rates.old <= 0.05, f"it understands the base voices: WER {_percent(rates.old)}", expected="<= 5 %")
        stage.check(
            rates.new >= 0.3, f"it does not understand the new ones: WER {_percent(rates.new)}", expected=">= 30 %"
        )
        return rates

    # --- 3 ------------------------------------------------------------------------------------------------------------

    def fine_tune(self, corpus: Corpus, base: Rates) -> dict[str, Rates]:
        stage = self.stage
        stage.scene(f"Fine-tuning for the new voices, {len(self.variants)} plan" + "s" * (len(self.variants) > 1))
        rates: dict[str, Rates] = {}
        rows = [("before", "", "", _percent(base.new), _percent(base.old))]
        before = load(self.base).state_dict()
        changed: dict[str, set[str]] = {}
        trained: dict[str, frozenset[str]] = {}
        for variant in self.variants:
            recipe = self.out / "recipes" / f"{variant.name}.yaml"
            plans.write_recipe(recipe, variant, model=self.base, train=corpus.lists["new/train"], epochs=self.epochs)
            self._train(variant.name)
            model = load(self.run(variant.name))
            index = index_of(model)
            resolution = resolve(FreezePlan(**variant.plan), index)
            trained[variant.name] = frozenset(resolution.trainable_names)
            changed[variant.name] = changed_names(before, model.state_dict())
            rates[variant.name] = self._rates(self.run(variant.name), corpus)
            share = resolution.trained_parameters / resolution.parameters
            figures = (_percent(rates[variant.name].new), _percent(rates[variant.name].old))
            frozen = frozen_statistics(before, trained[variant.name])
            moved = len(frozen & changed[variant.name])
            kept = f"{moved} of {len(frozen)} moved" if frozen else "none frozen"
            rows.append((variant.title, f"{100 * share:.1f} %", kept, *figures))
        columns = ("plan", "trains", "frozen statistics", "WER new voices", "WER old voices")
        stage.table(columns, rows, right=frozenset({1, 3, 4}))
        self._judge(base, rates)
        for variant in self.variants:
            statistics = frozen_statistics(before, trained[variant.name])
            frozen = {n for n in before if n not in trained[variant.name] and not is_statistic(n)} | statistics
            touched = frozen & changed[variant.name]
            if variant is TRACKING:
                stage.check(
                    bool(touched) and touched <= statistics,
                    f"{variant.name}: every frozen weight is bitwise the same; {len(touched)} statistics moved",
                    expected="statistics that moved, and nothing else",
                )
            elif variant is not EVERYTHING:
                stage.check(
                    not touched,
                    f"{variant.name}: all {len(frozen)} frozen tensors, statistics too, are bitwise the same",
                    expected=f"no change; changed: {', '.join(sorted(touched)[:3])}",
                )
        return rates

    def _judge(self, base: Rates, rates: Mapping[str, Rates]) -> None:
        """What freezing and the norm policy buy, as far as it holds on every machine."""
        stage = self.stage
        pinned = rates[PINNED.name]
        stage.check(
            pinned.new <= base.new / 2,
            f"pinned: WER on the new voices {_percent(base.new)} -> {_percent(pinned.new)}",
            expected="half of it, or less",
        )
        if EVERYTHING.name not in rates:
            return
        everything, tracking, output = (rates[v.name] for v in (EVERYTHING, TRACKING, OUTPUT))
        stage.check(
            everything.new <= 0.1 and everything.old > base.old,
            f"everything: learns the new voices ({_percent(everything.new)}) and forgets the old "
            f"({_percent(base.old)} -> {_percent(everything.old)})",
            expected="<= 10 % on the new voices, and a loss on the old ones",
        )
        stage.check(
            pinned.old < tracking.old,
            f"pinned keeps more of the old voices than tracking: {_percent(pinned.old)}, not {_percent(tracking.old)}",
            expected="fewer errors where the statistics stay",
        )
        stage.check(
            output.old <= 0.05 and pinned.new < output.new < base.new,
            f"output: forgets next to nothing ({_percent(output.old)}), learns least ({_percent(output.new)})",
            expected="<= 5 % on the old voices; on the new ones between pinned and the base",
        )

    # --- 4 ------------------------------------------------------------------------------------------------------------

    def kill_and_resume(self) -> None:
        stage = self.stage
        stage.scene("kill -9 in mid-epoch, and on")
        whole, killed = RunDirectory(self.run(PINNED.name)), RunDirectory(self.run("killed"))
        rows = read_rows(whole.metrics)
        total = int(rows[-1]["step"])
        per_epoch = total // self.epochs
        command = ("train", "recipes/pinned.yaml", "--run", "runs/killed")
        with stage.working("training, to be killed"):
            code = kill_at_step(self.out, command, killed, step=total // 2 + per_epoch // 2)
        last = max((int(row["step"]) for row in read_rows(killed.metrics)), default=0)
        stage.check(
            code == -signal.SIGKILL and last % per_epoch > 0 and last < total,
            f"its trainer was killed after step {last} of {total}, {last / per_epoch:.2f} epochs",
            expected="dead by SIGKILL inside an epoch, before the end",
        )
        found = newest_whole(killed.checkpoints, report=stage.note)
        with stage.working("going on"):
            done = thawline(self.out, "resume", "runs/killed")
        stage.check(
            done.returncode == 0,
            f"thawline resume went on from {found.name}",
            expected=f"exit code 0; it said: {said(done)}",
        )
        twin, resumed = sha256_of_tree(whole.model), sha256_of_tree(killed.model)
        stage.check(
            twin == resumed and len(twin) > 0,
            f"model/ has the same SHA-256 as the run that was never killed: {len(twin)} of {len(twin)} files",
            expected=f"the same bytes; these differ: {', '.join(differing(twin, resumed))}",
        )
        tensors, others = (newest_digests(files) for files in (whole, killed))
        stage.check(
            tensors == others and len(tensors) > 0,
            f"so has the newest checkpoint: {len(tensors)} tensors of weights and optimizer state",
            expected=f"the same tensors; these differ: {', '.join(differing(tensors, others)[:5])}",
        )
        stage.check(
            read_rows(killed.metrics) == rows,
            f"and the {len(rows)} losses along the way",
            expected="the same metrics.jsonl",
        )

    # --- 5 ------------------------------------------------------------------------------------------------------------

    def audit(self) -> None:
        stage = self.stage
        stage.scene("Proof that only what the plan names changed")
        done = thawline(self.out, "audit", "runs/killed", "--json")
        found = object_of(done)
        stage.check(
            done.returncode == 0 and found.get("broken") is False,
            f"thawline audit runs/killed: {found.get('frozen')} frozen and {found.get('trained')} trained tensors, "
            "none out of its place",
            expected=f"exit code 0; it said: {said(done)}",
        )
        # An audit that cannot fail proves nothing.
        name = self._tamper(self.run("killed"), self.run("tampered"))
        done = thawline(self.out, "audit", "runs/tampered")
        stage.check(
            done.returncode == 5 and name in done.stderr,
            f"one bit turned in a copy, in {name}: exit code 5",
            expected=f"exit code 5 and that name, it was {done.returncode}: {said(done)}",
        )

    def _tamper(self, run: Path, copy: Path) -> str:
        """Copy a run and turn the lowest bit of one frozen number of its model; the tensor's name."""
        shutil.copytree(run, copy)
        weights = torch.load(copy / "model" / "final.pt", map_location="cpu", weights_only=True)
        name = "encoder.encoders.0.feed_forward.w_1.weight"
        weights[name].view(torch.int32)[0, 0] ^= 1
        torch.save(weights, copy / "model" / "final.pt")
        return name

    # --- 6 ------------------------------------------------------------------------------------------------------------

    def refuse_wrong_base(self, corpus: Corpus) -> None:
        stage = self.stage
        stage.scene("A delta over the wrong base is refused")
        newest = newest_whole(RunDirectory(self.run(PINNED.name)).checkpoints, report=stage.note)
        clip = read_manifest(corpus.lists["new/test"])[0].wav
        checkpoint = str(newest)
        right = thawline(self.out, "transcribe", checkpoint, clip, "--base", str(self.base))
        stage.check(
            right.returncode == 0, "over its own base the checkpoint loads", expected=f"exit code 0; {said(right)}"
        )
        start = self.run("base") / "base"
        wrong = thawline(self.out, "transcribe", checkpoint, clip, "--base", str(start))
        stage.check(
            wrong.returncode == 4 and "Traceback" not in wrong.stderr,
            "over another it does not: exit code 4, and this message",
            expected=f"exit code 4, it was {wrong.returncode}",
        )
        stage.note(said(wrong, lines=6))

    # --- 7 ------------------------------------------------------------------------------------------------------------

    def convert(self, corpus: Corpus) -> None:
        stage = self.stage
        stage.scene("One file")
        folder = self.out / "converted"
        folder.mkdir()
        original = load(self.run(PINNED.name))
        weights = original.state_dict()
        for name, to in (("final.pt", "wenet"), ("model.safetensors", "safetensors")):
            done = thawline(self.out, "convert", "runs/pinned", f"converted/{name}", "--to", to)
            file = folder / name
            same = done.returncode == 0 and not changed_names(weights, read_tensors(file))
            size = file.stat().st_size / 1e6 if file.is_file() else 0.0
            stage.check(
                same,
                f"thawline convert --to {to}: {name}, {len(weights)} tensors, bitwise the same, {size:.1f} MB",
                expected=f"exit code 0 and the same tensors; it said: {said(done)}",
            )
        for sidecar in ("train.yaml", "units.txt", "global_cmvn"):
            shutil.copyfile(self.run(PINNED.name) / "model" / sidecar, folder / sidecar)
        (folder / "model.safetensors").unlink()  # one set of weights a directory
        samples = read_audio(read_manifest(corpus.lists["new/test"])[0].wav, rate_hz=RATE_HZ)
        feats = torch.from_numpy(fbank(samples, RATE_HZ, FbankConf())).unsqueeze(0)  # (1, frames, 80)
        with torch.no_grad():
            one, other = (ctc_of(model, feats) for model in (original, load(folder)))
        stage.check(
            torch.equal(one, other),
            "the file with train.yaml, units.txt and global_cmvn beside it loads, and computes the same bit for bit",
            expected="equal CTC outputs",
        )

    # --- 8 ------------------------------------------------------------------------------------------------------------

    def listen(self, corpus: Corpus) -> None:
        stage = self.stage
        stage.scene("Listen")
        clips = list(read_manifest(corpus.lists["new/test"])[:30])
        at_first = dict(zip(clips, Recognizer.open(self.base).transcribe([c.wav for c in clips]), strict=True))
        clips = sorted(clips, key=lambda clip: not at_first[clip])[:3]  # where the base heard anything, if it did
        done = thawline(self.out, "transcribe", "runs/killed", *(clip.wav for clip in clips), "--json")
        heard = [str(row.get("text")) for row in object_of(done).get("transcripts", [])]
        if len(heard) == len(clips):
            rows = [
                (Path(clip.wav).name, clip.txt, at_first[clip] or "(nothing)", now)
                for clip, now in zip(clips, heard, strict=True)
            ]
            stage.table(("file", "said", "the base heard", "the fine-tuned model heard"), rows, right=frozenset())
        wrong = score([clip.txt for clip in clips], heard)["wer"] if len(heard) == len(clips) else 1.0
        stage.check(
            done.returncode == 0 and wrong <= 0.4,
            f"thawline transcribe runs/killed AUDIO...: WER {_percent(wrong)} on these three",
            expected=f"exit code 0 and at most 40 %; it said: {said(done)}",
        )

    # --- the means ----------------------------------------------------------------------------------------------------

    def _train(self, name: str) -> tuple[int, float]:
        """Train recipes/NAME.yaml in runs/NAME; steps and seconds it took."""
        start = time.monotonic()
        with self.stage.working(f"thawline train recipes/{name}.yaml") as ticker:
            monitor: Ticker = ticker
            made = train(self.out / "recipes" / f"{name}.yaml", run=self.run(name), monitor=monitor)
        return made.step, time.monotonic() - start

    def _rates(self, model: Path, corpus: Corpus) -> Rates:
        with self.stage.working("listening to the test voices"):
            recognizer = Recognizer.open(model)
            new, old = (
                float(recognizer.evaluate(corpus.lists[name], batch_size=16).metrics["wer"])
                for name in ("new/test", "base/test")
            )
        return Rates(new=new, old=old)


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f} %"
