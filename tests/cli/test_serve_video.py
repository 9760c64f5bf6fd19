"""A video that is uploaded and asked about over HTTP: what is answered, and what is turned down."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.tasks.videochat_corpus import write_parts, write_video

from thawline.cli.app import run as cli
from thawline.models.videochat.chat import Sampling
from thawline.tasks.videochat_asking import ChatModel, Talk

pytest.importorskip("fastapi")
pytest.importorskip("multipart")
pytest.importorskip("av")
pytest.importorskip("peft")
from fastapi.testclient import TestClient

from thawline.tasks.serving import make_app
from thawline.tasks.serving_desk import Limits

HOT = Sampling(max_new_tokens=6, temperature=8.0, seed=3)  # so that an untrained model says something


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("serve_video")
    write_parts(place / "parts")
    write_video(place / "dark.mkv", 10)
    return place


@pytest.fixture(scope="module")
def model(folder: Path) -> ChatModel:
    return ChatModel.open(folder / "parts")


@pytest.fixture
def client(model: ChatModel) -> Iterator[TestClient]:
    limits = Limits(upload_bytes=200_000, seconds=5.0, talks=2, questions=2, characters=40)
    with TestClient(make_app(model, name="tiny", limits=limits, sampling=HOT)) as made:
        yield made


def upload(client: TestClient, file: Path) -> Any:
    return client.post("/v1/videos", files={"file": (file.name, file.read_bytes())})


def ask(client: TestClient, name: str, question: str = "what is it", **more: Any) -> Any:
    return client.post(f"/v1/videos/{name}/ask", json={"question": question, **more})


def told(answer: Any) -> list[dict[str, str]]:
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


def test_a_conversation_is_the_one_that_chat_has(client: TestClient, model: ChatModel, folder: Path) -> None:
    shown = upload(client, folder / "dark.mkv").json()
    assert (shown["kind"], shown["frames"]) == ("video", 4)
    talk = model.talk(model.see(folder / "dark.mkv"), sampling=HOT)
    for question in ("what is it", "what now"):
        wanted = talk.ask(question)
        lines = told(ask(client, shown["id"], question))
        assert lines[-1] == {"type": "final", "text": wanted.text, "ended": wanted.ended}
        assert "".join(line["text"] for line in lines[:-1]).strip() == wanted.text
        assert {line["type"] for line in lines[:-1]} <= {"partial"}


def test_an_answer_may_be_asked_to_be_shorter_and_never_longer(client: TestClient, folder: Path) -> None:
    name = upload(client, folder / "dark.mkv").json()["id"]
    assert len(told(ask(client, name, max_tokens=1))) <= 2
    assert told(ask(client, name, max_tokens=10_000))[-1]["ended"] in ("limit", "eos", "stop")


def test_an_image_is_shown_too(client: TestClient, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (30, 40), (10, 90, 10)).save(tmp_path / "i.PNG")
    assert upload(client, tmp_path / "i.PNG").json()["kind"] == "image"


def test_what_is_no_video_is_refused_without_the_servers_paths(client: TestClient, tmp_path: Path) -> None:
    for name, content in (("a.mp4", b"no video at all" * 20), ("b.mp4", b""), ("c.png", b"\x89PNG")):
        (tmp_path / name).write_bytes(content)
        answer = upload(client, tmp_path / name)
        assert answer.status_code == 400
        assert "cannot be read" in answer.json()["error"]["message"]
        assert "/tmp" not in answer.text
    assert client.post("/v1/videos", json={}).status_code == 415
    assert client.post("/v1/videos", files={"other": b"x"}).json()["error"]["message"] == "the field 'file' is missing"


def test_what_is_too_large_or_too_long_is_refused(client: TestClient, folder: Path, tmp_path: Path) -> None:
    answer = client.post("/v1/videos", files={"file": ("big.mp4", b"x" * 300_000)})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    answer = upload(client, write_video(tmp_path / "long.mkv", 0, frames=60))
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "video_too_long")
    assert answer.json()["error"]["message"] == "the video lasts 7.4 s, more than the limit of 5 s"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"question": "  "}, "a question has 1 to 40 characters"),
        ({"question": "x" * 41}, "a question has 1 to 40 characters"),
        ({"question": 3}, "question: Input should be a valid string"),
        ({"asked": "what"}, "Field required"),
        ({"question": "what", "frames": 3}, "frames: Extra inputs are not permitted"),
    ],
)
def test_what_is_no_question_is_refused(client: TestClient, folder: Path, body: Any, message: str) -> None:
    name = upload(client, folder / "dark.mkv").json()["id"]
    answer = client.post(f"/v1/videos/{name}/ask", json=body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_conversations_end_and_are_forgotten(client: TestClient, folder: Path) -> None:
    first, second = (upload(client, folder / "dark.mkv").json()["id"] for _ in range(2))
    assert [told(ask(client, first))[-1]["type"] for _ in range(2)] == ["final", "final"]
    assert ask(client, first).json()["error"]["code"] == "talk_too_long"
    third = upload(client, folder / "dark.mkv").json()["id"]  # two are remembered: the one asked last stays
    assert ask(client, second).status_code == 404
    assert told(ask(client, third))[-1]["type"] == "final"
    assert ask(client, "guessed").json()["error"]["code"] == "video_not_found"


def test_a_full_queue_turns_askers_away_and_the_end_of_patience_stops_the_answer(
    model: ChatModel, folder: Path
) -> None:
    began, go_on = threading.Event(), threading.Event()
    real = Talk.ask

    def slow(self: Talk, question: str, **options: Any) -> Any:
        began.set()
        assert go_on.wait(30)
        return real(self, question, **options)

    app = make_app(model, name="tiny", limits=Limits(waiting=1, patience_s=0.5), sampling=HOT)
    with pytest.MonkeyPatch.context() as patch, TestClient(app) as client:
        name = upload(client, folder / "dark.mkv").json()["id"]
        patch.setattr(Talk, "ask", slow)
        first: list[Any] = []
        thread = threading.Thread(target=lambda: first.append(ask(client, name)))
        thread.start()
        assert began.wait(30)
        busy = ask(client, name)
        assert (busy.status_code, busy.headers["retry-after"]) == (503, "5")
        thread.join(30)
        assert told(first[0]) == [{"type": "error", "message": "not done after 0.5 s"}]
        go_on.set()
        patch.undo()
        while client.get("/health").json()["waiting"]:
            pass
        assert told(ask(client, name))[-1]["type"] == "final"


def test_the_page_asks_and_has_no_microphone_nor_anything_from_elsewhere(client: TestClient) -> None:
    page = client.get("/").text
    assert "Ask about a video" in page
    assert "getUserMedia" not in page
    assert "http://" not in page
    assert "https://" not in page
    assert client.post("/v1/audio/transcriptions").status_code == 404


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--beam", "4"), "--beam means nothing to a videochat model"),
        (("--bert", "parts/bert"), "--bert and --config go with --part"),
        (("--temperature", "-1"), "not meant"),
        (("--temperature", "nan"), "not meant"),
        (("--frames", "0"), "0 is not in the range x>=1"),
    ],
)
def test_options_that_cannot_be_meant_are_refused_before_anything_is_served(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: Any, message: str
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("uvicorn.run", lambda *a, **k: pytest.fail("it was served"))
    assert cli(["serve", "parts", *words]) == 2
    assert message in capsys.readouterr().err
