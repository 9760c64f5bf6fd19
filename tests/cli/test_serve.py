"""Recognition over HTTP and WebSocket: what it answers, and what it turns down."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.cli.speech_fixture import write_all, write_chunk_model, write_wav

from thawline.tasks.recognition import Recognizer

pytest.importorskip("fastapi")
pytest.importorskip("multipart")
from fastapi.testclient import TestClient

from thawline.tasks.live_speech import LiveSpeech, can_stream
from thawline.tasks.serving import make_app
from thawline.tasks.serving_desk import Limits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("serve")
    write_all(place)
    write_chunk_model(place / "chunked")
    return place


@pytest.fixture(scope="module")
def recognizer(folder: Path) -> Recognizer:
    return Recognizer.open(folder / "base", blank_penalty=20.0)  # so that an untrained model says something


@pytest.fixture
def client(recognizer: Recognizer) -> Iterator[TestClient]:
    with TestClient(make_app(recognizer, name="tones", limits=Limits(upload_bytes=200_000, seconds=5.0))) as made:
        yield made


def post(client: TestClient, wav: Path, **fields: str) -> Any:
    return client.post("/v1/audio/transcriptions", files={"file": (wav.name, wav.read_bytes())}, data=fields)


def samples_of(wav: Path) -> np.ndarray[Any, np.dtype[np.int16]]:
    return np.frombuffer(wav.read_bytes()[44:], "<i2")


@pytest.mark.parametrize("fields", [{}, {"model": "tones"}, {"model": "whisper-1", "temperature": "0"}])
def test_openais_call_gives_the_text_of_transcribe(
    client: TestClient, recognizer: Recognizer, folder: Path, fields: dict[str, str]
) -> None:
    answer = post(client, folder / "dev1.wav", **fields)
    assert answer.status_code == 200
    assert answer.json() == {"text": recognizer.transcribe([folder / "dev1.wav"])[0]}
    assert answer.json()["text"]


def test_every_response_format(client: TestClient, recognizer: Recognizer, folder: Path) -> None:
    text = recognizer.transcribe([folder / "dev1.wav"])[0]
    assert post(client, folder / "dev1.wav", response_format="text").text == text + "\n"
    assert " --> " in post(client, folder / "dev1.wav", response_format="srt").text
    assert post(client, folder / "dev1.wav", response_format="vtt").text.startswith("WEBVTT\n")
    full = post(client, folder / "dev1.wav", response_format="verbose_json").json()
    assert full["text"] == text
    assert full["duration"] == pytest.approx(0.65, abs=0.01)
    assert " ".join(word["word"] for word in full["words"]).split() == text.split()


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"response_format": "xml"}, 400, "response_format 'xml' is none of json, text"),
        ({"model": "large"}, 404, "the model 'large' is not here; this is 'tones'"),
        ({"temperature": "0.7"}, 400, "temperature must be 0"),
        ({"temperature": "warm"}, 400, "temperature 'warm' is not a number"),
        ({"prompt": "names"}, 400, "prompt is for Whisper alone"),
    ],
)
def test_what_cannot_be_meant_is_refused_as_openais_clients_read_it(
    client: TestClient, folder: Path, fields: dict[str, str], status: int, message: str
) -> None:
    answer = post(client, folder / "dev1.wav", **fields)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


def test_no_file_no_audio_and_no_form_are_refused(client: TestClient, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"not audio at all" * 20)
    answer = post(client, tmp_path / "a.wav")
    assert answer.status_code == 400
    assert "not audio in a known format" in answer.json()["error"]["message"]
    assert "/tmp" not in answer.json()["error"]["message"]
    empty = client.post("/v1/audio/transcriptions", data={"model": "tones"}, files={"other": b"x"})
    assert (empty.status_code, empty.json()["error"]["message"]) == (400, "the field 'file' is missing")
    assert client.post("/v1/audio/transcriptions", json={}).status_code == 415


def test_an_upload_over_the_limit_is_refused_whether_announced_or_not(client: TestClient) -> None:
    big = b"x" * 300_000
    answer = client.post("/v1/audio/transcriptions", files={"file": ("big.wav", big)})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    pieces = (big[i : i + 50_000] for i in range(0, len(big), 50_000))  # chunked: no Content-Length
    head = {"content-type": "multipart/form-data; boundary=b"}
    answer = client.post("/v1/audio/transcriptions", content=pieces, headers=head)
    assert answer.status_code == 413


def test_a_recording_over_the_limit_is_refused(client: TestClient, tmp_path: Path) -> None:
    write_wav(tmp_path / "long.wav", 6.0, 300)
    answer = post(client, tmp_path / "long.wav")
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "audio_too_long")


def test_a_full_queue_turns_clients_away_at_once_and_recovers(recognizer: Recognizer, folder: Path) -> None:
    app = make_app(recognizer, name="tones", limits=Limits(waiting=1))
    began, go_on = threading.Event(), threading.Event()
    real = Recognizer.transcripts

    def slow(self: Recognizer, *args: Any, **kwargs: Any) -> Any:
        began.set()
        assert go_on.wait(30)
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, TestClient(app) as client:
        patch.setattr(Recognizer, "transcripts", slow)
        first: list[Any] = []
        thread = threading.Thread(target=lambda: first.append(post(client, folder / "dev1.wav")))
        thread.start()
        assert began.wait(30)
        second = post(client, folder / "dev1.wav")
        assert (second.status_code, second.headers["retry-after"]) == (503, "5")
        assert second.json()["error"]["message"] == "1 requests are waiting already; try again later"
        go_on.set()
        thread.join(30)
        assert first[0].status_code == 200
        assert post(client, folder / "dev1.wav").status_code == 200
        assert client.get("/health").json()["waiting"] == 0


def test_a_request_without_an_end_is_given_up_and_keeps_its_place_until_it_ends(
    recognizer: Recognizer, folder: Path
) -> None:
    app = make_app(recognizer, name="tones", limits=Limits(waiting=1, patience_s=0.2))
    go_on = threading.Event()
    real = Recognizer.transcripts

    def slow(self: Recognizer, *args: Any, **kwargs: Any) -> Any:
        assert go_on.wait(30)
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, TestClient(app) as client:
        patch.setattr(Recognizer, "transcripts", slow)
        answer = post(client, folder / "dev1.wav")
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        assert post(client, folder / "dev1.wav").status_code == 503
        go_on.set()


# --- live ---


@pytest.mark.parametrize("rate", [8000, 48000])
def test_live_speech_to_a_whole_context_model_ends_in_the_text_of_the_recording(
    recognizer: Recognizer, folder: Path, tmp_path: Path, rate: int
) -> None:
    write_wav(tmp_path / "a.wav", 4.0, 330, rate_hz=rate)
    with (
        TestClient(make_app(recognizer, name="tones")) as client,
        client.websocket_connect(f"/v1/audio/stream?rate={rate}") as socket,
    ):
        samples = samples_of(tmp_path / "a.wav")
        for at in range(0, len(samples), rate // 4):
            socket.send_bytes(samples[at : at + rate // 4].tobytes())
        socket.send_text("end")
        heard = []
        while not heard or heard[-1]["type"] != "final":
            heard.append(json.loads(socket.receive_text()))
    assert [h["type"] for h in heard] == ["partial", "partial", "final"]
    assert heard[-1]["text"] == recognizer.transcribe([tmp_path / "a.wav"])[0]


@pytest.mark.parametrize("piece", [517, 8000])
def test_a_chunk_model_hears_as_it_does_with_chunk_masks_whatever_the_pieces(
    folder: Path, tmp_path: Path, piece: int
) -> None:
    recognizer = Recognizer.open(
        folder / "chunked", mode="attention_rescoring", beam=4, ctc_weight=0.5, chunk_size=4, blank_penalty=5.0
    )
    assert can_stream(recognizer)
    write_wav(tmp_path / "a.wav", 2.0, 330)
    samples = samples_of(tmp_path / "a.wav").astype(np.float32) / 32768
    live = LiveSpeech(recognizer, rate_hz=8000)
    partial = [live.feed(samples[at : at + piece]) for at in range(0, len(samples), piece)]
    whole = recognizer.transcribe([tmp_path / "a.wav"])[0]
    assert live.finish() == whole
    assert whole
    assert len([p for p in partial if p is not None]) >= 2


def test_a_whole_context_model_is_not_streamed_in_chunks(recognizer: Recognizer) -> None:
    assert not can_stream(recognizer)


@pytest.mark.parametrize(
    ("query", "sent", "message"),
    [
        ("rate=999", None, "999 Hz is no rate of a microphone"),
        ("rate=fast", None, "rate must be a whole number of Hz"),
        ("rate=8000", b"odd", "3 bytes are no whole 16-bit samples"),
        ("rate=8000", "stop", "send 16-bit samples in binary messages"),
        ("rate=8000", bytes(2 * 8000 * 6), "more than 5 s"),
    ],
)
def test_a_live_client_that_errs_is_told_and_let_go(
    client: TestClient, query: str, sent: bytes | str | None, message: str
) -> None:
    with client.websocket_connect(f"/v1/audio/stream?{query}") as socket:
        if isinstance(sent, bytes):
            socket.send_bytes(sent)
        elif sent is not None:
            socket.send_text(sent)
        told = json.loads(socket.receive_text())
    assert told["type"] == "error"
    assert message in told["message"]
    assert client.get("/health").json()["streams"] == 0


def test_one_stream_too_many_and_a_silent_one_are_told(recognizer: Recognizer) -> None:
    app = make_app(recognizer, name="tones", limits=Limits(streams=1, idle_s=0.3))
    with TestClient(app) as client, client.websocket_connect("/v1/audio/stream?rate=8000") as first:
        with client.websocket_connect("/v1/audio/stream?rate=8000") as second:
            assert "1 people are speaking already" in json.loads(second.receive_text())["message"]
        assert "nothing came for 0.3 s" in json.loads(first.receive_text())["message"]


def test_a_page_of_another_site_may_not_listen(client: TestClient) -> None:
    from starlette.websockets import WebSocketDisconnect

    with (
        pytest.raises(WebSocketDisconnect),
        client.websocket_connect("/v1/audio/stream?rate=8000", headers={"origin": "https://elsewhere.example"}),
    ):
        pass


def test_the_page_and_the_list_of_models(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert "getUserMedia" in page.text
    assert "http://" not in page.text  # nothing is fetched from elsewhere
    assert "https://" not in page.text
    assert client.get("/v1/models").json()["data"][0]["id"] == "tones"
