"""Memory that runs out: wherever in a step or an evaluation it does, nothing is lost and nothing depends on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli import speech_fixture
from tests.tasks import vision_cases
from tests.train.runs import checkpoint_sums, run, sums
from tests.train.toy import Net, ToyTask, write_recipe
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from thawline.data.conversation_tokens import Encoded
from thawline.data.videochat import ChatBatch
from thawline.errors import RecipeError, ThawlineError
from thawline.freeze import doctor
from thawline.freeze.plan import FreezePlan
from thawline.tasks.asr import SpeechTask
from thawline.tasks.runs import train
from thawline.tasks.vision import VisionTask
from thawline.train import engine, loop
from thawline.train.engine import Engine, Rate
from thawline.train.law import shape_
from thawline.train.loop import Run
from thawline.train.memory import is_out_of_memory
from thawline.train.recipe import OptimSettings, read_recipe
from thawline.train.rundir import read_rows

Patch = pytest.MonkeyPatch
OPEN = ["run.checkpoint.best=null", "options={n: 48}"]


class Crowd:
    """Memory is short in one step, as long as its micro-batches are whole."""

    def __init__(self, monkeypatch: Patch, step: int) -> None:
        self.short = False
        self.refusals = 0
        take = loop.train_step

        def watched(*args: Any, **options: Any) -> Any:
            self.short = options["step"] == step and options["split"] == 1
            return take(*args, **options)

        monkeypatch.setattr(loop, "train_step", watched)

    def refuse(self, *_: Any) -> None:
        if self.short:
            self.refusals += 1
            raise torch.OutOfMemoryError("no room")

    def before(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """`original`, for which there is no room."""

        def refused(*args: Any, **options: Any) -> Any:
            self.refuse()
            return original(*args, **options)

        return refused

    def after(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """`original`, after which there is no room."""

        def refused(*args: Any, **options: Any) -> Any:
            made = original(*args, **options)
            self.refuse()
            return made

        return refused


def train_split_from(folder: Path, name: str, step: int, monkeypatch: Patch, **options: Any) -> Run:
    """The run that cuts its micro-batches in two from `step` on by itself."""
    take = loop._take

    def cut(session: Any, *args: Any) -> Any:
        if session.state.step == step:
            session.state = replace(session.state, split=2)
        return take(session, *args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_take", cut)
        return run(folder, name, **options)


class Hooked(ToyTask):
    """The toy task with `hook` on one of the network's modules."""

    def __init__(self, path: str, put: Callable[[nn.Module], Any]) -> None:
        self.path, self.put = path, put

    def build(self, recipe: Any) -> nn.Module:
        model = super().build(recipe)
        self.put(model.get_submodule(self.path))
        return model


def in_forward(path: str) -> Callable[[Crowd, Patch], ToyTask]:
    return lambda crowd, _: Hooked(path, lambda module: module.register_forward_pre_hook(crowd.refuse))


def in_backward(path: str) -> Callable[[Crowd, Patch], ToyTask]:
    def watch_gradient(crowd: Crowd) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(crowd.refuse)

        return hook

    return lambda crowd, _: Hooked(path, lambda module: module.register_forward_hook(watch_gradient(crowd)))


def patched(
    owner: Any, name: str, how: Callable[[Crowd], Callable[..., Any]] = lambda c: c.before
) -> Callable[[Crowd, Patch], ToyTask]:
    def put(crowd: Crowd, monkeypatch: Patch) -> ToyTask:
        monkeypatch.setattr(owner, name, how(crowd)(getattr(owner, name)))
        return ToyTask()

    return put


def second_state(crowd: Crowd, monkeypatch: Patch) -> ToyTask:
    """The optimizer's state fits for one parameter and not for the next."""
    make = engine._state
    made: list[Any] = []

    def state(optim: Any, param: Tensor) -> Any:
        made.append(param)
        if len(made) % 2 == 0:
            crowd.refuse()
        return make(optim, param)

    monkeypatch.setattr(engine, "_state", state)
    return ToyTask()


PLACES: dict[str, Callable[[Crowd, Patch], ToyTask]] = {
    "copies of the statistics": patched(Engine, "buffers"),
    "weights of the loss": patched(ToyTask, "weights"),
    "forward, first layer": in_forward("body.0"),
    "forward, after the statistics moved": in_forward("body.2"),
    "forward, last layer": in_forward("head"),
    "loss": patched(ToyTask, "loss", lambda c: c.after),
    "backward, last layer": in_backward("head"),
    "backward, first layer": in_backward("body.1"),
    "gradients put together": patched(Engine, "put_gradients_"),
    "the doctor's look": patched(doctor, "after_first_step"),
    "clipping, before": patched(Engine, "clip_"),
    "clipping, after": patched(Engine, "clip_", lambda c: c.after),
    "optimizer state": second_state,
    "frozen rows": patched(engine, "keep_rows"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("step", [0, 6])  # the first step, and the first after a thaw
def test_a_step_that_runs_out_of_memory_anywhere_is_as_if_it_had_been_taken_in_halves(
    tmp_path: Path, place: str, step: int, monkeypatch: Patch
) -> None:
    write_recipe(tmp_path)
    plan = 'plan={train: ["**", "!body.0"], thaw: [{after: 1 epochs, train: ["body.0"]}]}'
    recipe = read_recipe(tmp_path / "toy.yaml", [*OPEN, plan])
    with monkeypatch.context() as patch:
        crowd = Crowd(patch, step)
        task = PLACES[place](crowd, patch)
        cramped = loop.train(recipe, task, tmp_path / "cramped")
    splits = [e for e in read_rows(cramped.dir / "events.jsonl") if e["event"] == "out of memory"]
    assert [(e["step"], e["during"], e["split"]) for e in splits] == [(step, "step", 2)]
    assert crowd.refusals == 1
    chosen = train_split_from(tmp_path, "chosen", step, monkeypatch, overrides=[*OPEN, plan])
    assert sums(cramped.dir / "model") == sums(chosen.dir / "model")
    assert checkpoint_sums(cramped.dir) == checkpoint_sums(chosen.dir)
    assert (cramped.dir / "metrics.jsonl").read_bytes() == (chosen.dir / "metrics.jsonl").read_bytes()


class Operations(TorchDispatchMode):
    """Names of the operations that ran, but for the profiler's marks."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "profiler":
            self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def ready_engine(name: str, **options: Any) -> Engine:
    """An engine over the toy net with gradients, before its first update."""
    torch.manual_seed(0)
    model = Net()
    made = Engine(
        model,
        shape_(model, FreezePlan(train=("**",)), seed=0)[0],
        OptimSettings(name=name, **options),  # type: ignore[arg-type]
        torch.device("cpu"),
        "fp32",
    )
    model(torch.randn(4, 6)).sum().backward()
    return made


@pytest.mark.parametrize(("name", "options"), [("adamw", {}), ("adam", {}), ("sgd", {}), ("sgd", {"momentum": 0.0})])
def test_an_update_makes_no_tensor_so_that_memory_cannot_run_out_half_way(name: str, options: dict[str, Any]) -> None:
    ready = ready_engine(name, **options)
    kept = ready.prepare_()
    with Operations() as seen:
        ready.update_(Rate(1.0), kept)
    assert seen.names
    assert all(operation.endswith("_") for operation in (n.split(".")[0] for n in seen.names)), seen.names


def test_the_negative_control_an_update_that_is_not_fused_makes_tensors() -> None:
    ready = ready_engine("adamw")
    ready.optimizer = torch.optim.AdamW(ready.trainables.values(), foreach=False)
    ready.prepare_()
    with Operations() as seen:
        ready.optimizer.step()
    assert "sqrt" in seen.names


@pytest.mark.parametrize(
    ("name", "cls"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)]
)
def test_state_made_before_the_update_is_what_the_optimizer_would_have_begun_with(name: str, cls: Any) -> None:
    ours, theirs = ready_engine(name), ready_engine(name)
    options: dict[str, Any] = {"momentum": 0.9} if name == "sgd" else {}
    optimizer = cls(
        theirs.trainables.values(), lr=ours.optim.lr, weight_decay=ours.optim.weight_decay, fused=True, **options
    )
    for _ in range(2):
        ours.update_(Rate(1.0), ours.prepare_())
        optimizer.step()
    assert all(torch.equal(p, theirs.trainables[n]) for n, p in ours.trainables.items())


class CrampedEvaluation(ToyTask):
    """Evaluates at most `most` points at a time, and notices only after a batch that did fit."""

    def __init__(self, most: int) -> None:
        self.most = most

    def evaluate(self, model: Any, samples: Any, batches: Iterator[Any]) -> Any:
        def fitting() -> Iterator[Any]:
            for number, batch in enumerate(batches):
                if number and len(batch.keys) > self.most:
                    raise torch.OutOfMemoryError("no room")
                yield batch

        return super().evaluate(model, samples, fitting())


def test_an_evaluation_that_does_not_fit_is_begun_anew_in_halves_and_training_is_not_cut(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    write_recipe(tmp_path)
    recipe = read_recipe(tmp_path / "toy.yaml")
    cramped = loop.train(recipe, CrampedEvaluation(2), tmp_path / "cramped")
    splits = [e for e in read_rows(cramped.dir / "events.jsonl") if e["event"] == "out of memory"]
    assert [(e["step"], e["during"], e["split"]) for e in splits] == [(7, "evaluation", 2)]
    begin = loop.open_session

    def cut(*args: Any) -> Any:
        session = begin(*args)
        session.state = replace(session.state, valid_split=2)
        return session

    monkeypatch.setattr(loop, "open_session", cut)
    chosen = loop.train(recipe, ToyTask(), tmp_path / "chosen")
    assert sums(cramped.dir / "model") == sums(chosen.dir / "model")
    assert (cramped.dir / "metrics.jsonl").read_bytes() == (chosen.dir / "metrics.jsonl").read_bytes()


def test_an_evaluation_that_never_fits_ends_the_run_with_advice(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    with pytest.raises(ThawlineError, match="the evaluation does not fit into memory, even one sample at a time"):
        loop.train(read_recipe(tmp_path / "toy.yaml"), CrampedEvaluation(0), tmp_path / "run")


def test_what_the_allocators_say_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_model_that_cannot_recompute_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    with pytest.raises(RecipeError, match="Net has no blocks that can recompute"):
        run(tmp_path, "run", ["run.recompute=true"])


# --- every task ---


@contextmanager
def short_of_memory_once(task: type, monkeypatch: Patch) -> Iterator[Crowd]:
    with monkeypatch.context() as patch:
        crowd = Crowd(patch, 0)
        patch.setattr(task, "loss", crowd.after(task.loss))
        yield crowd


def test_images_are_halved_and_give_what_a_run_in_halves_gives(tmp_path: Path, monkeypatch: Patch) -> None:
    vision_cases.write_case(tmp_path)
    options = ["run.epochs=1", "run.checkpoint.best=null", 'plan={train: ["**"]}']
    with short_of_memory_once(VisionTask, monkeypatch) as crowd:
        cramped = vision_cases.run_case(tmp_path, "cramped", options)
    assert crowd.refusals == 1
    chosen = vision_cases.run_case(tmp_path, "chosen", [*options, "run.micro_batch=4"])
    assert sums(cramped.dir / "model") == sums(chosen.dir / "model")


def test_utterances_are_halved_and_give_what_a_run_in_halves_gives(tmp_path: Path, monkeypatch: Patch) -> None:
    recipe = speech_fixture.write_all(tmp_path)
    options = ["run.epochs=1", "run.checkpoint.best=null"]
    with short_of_memory_once(SpeechTask, monkeypatch) as crowd:
        cramped = train(recipe, options, run=tmp_path / "cramped")
    assert crowd.refusals == 1
    chosen = train(recipe, [*options, "run.micro_batch=2"], run=tmp_path / "chosen")
    assert sums(cramped.dir / "model") == sums(chosen.dir / "model")


def test_a_run_that_recomputes_is_bitwise_the_one_that_does_not_and_the_doctor_agrees(tmp_path: Path) -> None:
    recipe = speech_fixture.write_all(tmp_path)
    options = ["run.epochs=1", "run.checkpoint.best=null"]
    plain = train(recipe, options, run=tmp_path / "plain")
    recomputed = train(recipe, [*options, "run.recompute=true"], run=tmp_path / "recomputed")
    assert sums(recomputed.dir / "model") == sums(plain.dir / "model")
    found = [[e for e in read_rows(r.dir / "events.jsonl") if e["event"] == "doctor"] for r in (plain, recomputed)]
    assert [f["code"] for f in found[1]] == [f["code"] for f in found[0]]


def test_a_part_of_a_chat_batch_has_the_clips_of_its_own_dialogues() -> None:
    def prompt(clips: int) -> Encoded:
        return Encoded(pieces=((5,),) * (clips + 1), labels=((-100,),) * clips + ((5,),))

    batch = ChatBatch(
        keys=("a", "b", "c"),
        clips=tuple(torch.full((1,), float(n)) for n in range(4)),
        prompts=(prompt(1), prompt(0), prompt(3)),
        text_ids=torch.arange(6).reshape(3, 2),
        text_mask=torch.ones(3, 2),
        weights={"utterances": 3.0, "tokens": 3.0},
    )
    whole, last = batch.rows(0, 2), batch.rows(2, 3)
    assert [float(c) for c in whole.clips] == [0.0]
    assert [float(c) for c in last.clips] == [1.0, 2.0, 3.0]
    assert (last.keys, last.text_ids.tolist(), last.weights) == (("c",), [[4, 5]], {"utterances": 1.0, "tokens": 1.0})  # type: ignore[union-attr]


def test_dialogues_are_halved_and_give_what_a_run_in_halves_gives(tmp_path: Path, monkeypatch: Patch) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("av")
    from tests.tasks import videochat_corpus

    from thawline.tasks.runs import train
    from thawline.tasks.videochat import VideoChatTask

    recipe = videochat_corpus.write_recipe(tmp_path)
    options = ["run.epochs=1", "run.checkpoint.best=null", "options.export=[]"]
    with short_of_memory_once(VideoChatTask, monkeypatch) as crowd:
        cramped = train(recipe, options, run=tmp_path / "cramped")
    assert crowd.refusals == 1
    chosen = train(recipe, [*options, "run.micro_batch=1"], run=tmp_path / "chosen")
    assert checkpoint_sums(cramped.dir) == checkpoint_sums(chosen.dir)
