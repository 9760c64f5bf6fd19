"""`thawline chat`: questions about a video in the terminal, from every kind of model path."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from tests.tasks.videochat_corpus import write_corpus, write_parts

from thawline.cli.app import run
from thawline.errors import DataError, RecipeError
from thawline.models.videochat.chat import Sampling
from thawline.tasks.videochat_asking import ChatModel
from thawline.tasks.videochat_recognition import home_at

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("av")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("asking")
    write_parts(folder / "parts")
    write_corpus(folder / "corpus")
    return folder


def asked(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    code = run(["chat", *map(str, words)])
    return code, capsys.readouterr().out


def test_one_json_object_answers_each_question(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video = home / "corpus" / "dark.mkv"
    code, out = asked(
        capsys, home / "parts", video, "-q", "what is it", "-q", "what now", "--max-tokens", "5", "--json"
    )
    told = json.loads(out)
    assert code == 0
    assert [a["question"] for a in told["answers"]] == ["what is it", "what now"]
    assert told["answer"] == told["answers"][-1]["answer"]
    assert all(a["ended"] in ("eos", "stop", "limit") and a["tokens"] <= 5 for a in told["answers"])


def test_questions_come_line_by_line_where_none_is_given(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"what is it\n\nwhat now\n")))
    code, out = asked(capsys, home / "parts", home / "corpus" / "dark.mkv", "--max-tokens", "3")
    assert code == 0
    assert [line for line in out.splitlines() if line.startswith(">")] == ["> what is it", "> what now"]


def test_single_paths_give_the_model_that_the_folder_gives(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video, parts = home / "corpus" / "light.mkv", home / "parts"
    ending = ("-q", "what is it", "--max-tokens", "5", "--json", "--temperature", "5", "--seed", "3")
    whole = asked(capsys, parts, video, *ending)
    files = [f"--part={parts / name}" for name in ("base_vit_qformer.pth", "stage2_delta.pth", "stage3_delta.pth")]
    single = asked(
        capsys, parts / "llm", video, *files, "--bert", parts / "bert", "--config", parts / "config.json", *ending
    )
    assert whole == single
    assert whole[0] == 0


def test_half_precision_is_of_the_language_model_alone(home: Path) -> None:
    model = ChatModel.open(home / "parts", dtype="bfloat16", device="cpu").opened.model
    kinds = {str(p.dtype) for n, p in model.named_parameters() if n.startswith("mistral_model.") and ".lora_" not in n}
    assert kinds == {"torch.bfloat16"}
    assert str(model.query_tokens.dtype) == "torch.float32"


def test_what_was_said_is_part_of_the_next_prompt_and_the_video_is_looked_at_once(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ChatModel.open(home / "parts")
    looks: list[int] = []
    encode = type(model.opened.model).encode
    monkeypatch.setattr(
        type(model.opened.model), "encode", lambda self, *a, **k: looks.append(1) or encode(self, *a, **k)
    )
    seen = model.see(home / "corpus" / "dark.mkv")
    hot = Sampling(max_new_tokens=4, temperature=8.0, seed=1)
    talk = model.talk(seen, sampling=hot)
    first = talk.ask("what is it")
    second = talk.ask("what now")
    fresh = model.talk(seen, sampling=hot).ask("what now")
    assert [t.answer for t in talk.turns] == [first.text, second.text]
    assert second.tokens != fresh.tokens
    assert len(looks) == 2  # one a conversation


def test_images_and_other_numbers_of_frames_are_shown_too(home: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    image.fromarray(np.full((40, 30, 3), 90, np.uint8)).save(tmp_path / "i.png")
    model = ChatModel.open(home / "parts", frames=3)
    assert model.see(tmp_path / "i.png").clip.shape == (1, 3, 32, 32)
    seen = model.see(home / "corpus" / "dark.mkv")
    assert seen.clip.shape == (3, 3, 32, 32)
    assert seen.times_s is not None
    assert len(seen.times_s) == 3
    assert model.talk(seen, sampling=Sampling(max_new_tokens=2)).ask("what is it").tokens is not None


def test_a_score_on_an_instruction_file_has_a_row_a_sample(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = home / "rows.jsonl"
    assert run(["evaluate", str(home / "parts"), str(home / "corpus" / "it.json"), "--json", "--out", str(rows)]) == 0
    told = json.loads(capsys.readouterr().out)
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    assert (told["samples"], told["unreadable"], len(lines)) == (8, 0, 8)
    assert told["loss"] == pytest.approx(sum(r["loss"] * r["tokens"] for r in lines) / told["tokens"])
    batched = ChatModel.open(home / "parts").evaluate(home / "corpus" / "it.json", batch_size=4)
    # Rows padded to another length are summed in another order.
    assert batched.metrics["loss"] == pytest.approx(told["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "content", "what", "fix"),
    [
        ("nothing.mp4", None, "no such video or image", "check the path"),
        ("folder", None, "this is a folder, and one video or image is meant", "give one of its files: a.mp4"),
        ("empty.mp4", b"", "the video cannot be read: ", "ffmpeg -i FILE"),
        ("letter.mp4", b"Dear Sir or Madam", "the video cannot be read: ", "ffmpeg -i FILE"),
        ("letter.png", b"Dear Sir or Madam", "the image cannot be read: ", "ffmpeg -i FILE"),
        ("torn.mkv", 200, "", "ffmpeg -i FILE"),
    ],
)
def test_a_file_that_cannot_be_shown_is_refused_without_a_model(
    home: Path, tmp_path: Path, name: str, content: bytes | int | None, what: str, fix: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.mp4").write_bytes(b"")
    if isinstance(content, int):
        content = (home / "corpus" / "dark.mkv").read_bytes()[:content]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        ChatModel(cast(Any, None), home_at(home / "parts")).see(tmp_path / name)
    assert caught.value.where == str(tmp_path / name)
    assert caught.value.what.startswith(what)
    assert fix in caught.value.fix


def test_a_device_that_is_none_is_refused_before_the_model_is_looked_for() -> None:
    with pytest.raises(RecipeError, match="'gpu' is not a device"):
        ChatModel.open("no model here", device="gpu")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("parts", "corpus/drak.mkv", "-q", "who"), 3, "did you mean"),
        (("parts", "corpus/it.json", "-q", "who"), 3, "there is no video in the file"),
        (("nothing", "corpus/dark.mkv", "-q", "who"), 4, "no such file or directory"),
        (("part", "corpus/dark.mkv", "-q", "who"), 4, "did you mean"),
        (("corpus", "corpus/dark.mkv", "-q", "who"), 4, "no VideoChat2 model is described here"),
        (("parts", "corpus/dark.mkv", "--json"), 2, "--json needs --question"),
        (("parts", "corpus/dark.mkv", "-q", "who", "--bert", "parts/bert"), 2, "go with --part"),
        (("parts/llm", "corpus/dark.mkv", "-q", "who", "--part", "parts/stage2_delta.pth"), 2, "--part needs --config"),
        (("parts", "corpus/dark.mkv", "-q", "who", "--device", "gpu"), 2, "'gpu' is not a device"),
        (("parts/llm", "corpus/dark.mkv", "-q", "who"), 4, "this is a language model without VideoChat2's parts"),
    ],
)
def test_what_cannot_be_meant_is_said(
    home: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(home)
    assert run(["chat", *words]) == code
    assert message in capsys.readouterr().err
