from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from thawline.data.audio import read_audio
from thawline.data.manifest import read_manifest
from thawline.data.text import read_units
from thawline.demo.voices import BASE, NEW, SUMS, WORDS, damaged, digit_strings, make_corpus
from thawline.errors import DataError

pytest.importorskip("espeakng_loader", reason="the extra `demo` is not installed")

GROUPS = (replace(BASE, train=5, test=4), replace(NEW, train=3, test=2))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "data"
    assert not make_corpus(folder, GROUPS).reused
    return folder


def test_the_lists_are_read_as_any_wenet_list_and_the_audio_is_there(made: Path):
    corpus = make_corpus(made, GROUPS)
    assert {name: len(read_manifest(path)) for name, path in corpus.lists.items()} == {
        "base/train": 5, "base/test": 4, "new/train": 3, "new/test": 2,
    }  # fmt: skip
    units = read_units(corpus.units)
    assert list(units) == ["<blank>", "<unk>", *WORDS, "<sos/eos>"]
    seconds = 0.0
    for path in corpus.lists.values():
        for row in read_manifest(path):
            assert set(row.txt.split()) <= set(WORDS)
            samples = read_audio(row.wav)
            assert 0.3 < len(samples) / 16000 < 4
            seconds += len(samples) / 16000
    assert corpus.seconds == pytest.approx(seconds)


def test_every_speaker_of_a_group_is_heard_in_training_and_in_the_test(made: Path):
    for group in GROUPS:
        for split in ("train", "test"):
            lines = (made / group.name / split / "data.list").read_text().splitlines()
            heard = {json.loads(line)["key"].split("_")[0] for line in lines}
            assert heard == {s.name for s in group.speakers[: len(lines)]}


def test_the_new_voices_hiss_and_the_base_voices_do_not(made: Path):
    corpus = make_corpus(made, GROUPS)

    def quietest(name: str) -> float:
        samples = read_audio(read_manifest(corpus.lists[name])[0].wav)
        return min(float(samples[i : i + 320].std()) for i in range(0, len(samples) - 320, 320))  # in 20 ms

    assert quietest("base/test") < 1e-3
    assert quietest("new/test") == pytest.approx(NEW.hiss, rel=0.25)


def test_texts_are_a_pure_function_of_the_seed():
    assert digit_strings(50, 7, "base", "train") == digit_strings(50, 7, "base", "train")
    assert digit_strings(50, 7, "base", "train") != digit_strings(50, 8, "base", "train")
    assert digit_strings(50, 7, "base", "train") != digit_strings(50, 7, "base", "test")
    assert {len(text.split()) for text in digit_strings(50, 7)} == {2, 3, 4}


def test_data_whose_digests_hold_are_used_again_also_after_a_move(made: Path, tmp_path: Path):
    before = make_corpus(made, GROUPS)
    assert before.reused
    shutil.copytree(made, tmp_path / "moved")
    moved = make_corpus(tmp_path / "moved", GROUPS)
    assert moved.reused
    assert moved.digest == before.digest
    assert len(read_manifest(moved.lists["new/test"])) == 2


def test_the_digests_are_those_that_sha256sum_computes(made: Path):
    program = shutil.which("sha256sum")
    if program is None:
        pytest.skip("there is no sha256sum here")
    done = subprocess.run([program, "--check", "--strict", "--quiet", SUMS], cwd=made, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("harm", ["altered", "missing", "without digests", "other voices"])
def test_data_that_do_not_hold_are_made_anew(made: Path, tmp_path: Path, harm: str):
    folder = tmp_path / "data"
    shutil.copytree(made, folder)
    clip = next(folder.rglob("*.flac"))
    groups = GROUPS
    if harm == "altered":
        clip.write_bytes(clip.read_bytes()[:-1] + b"x")
        assert damaged(folder) == (clip.relative_to(folder).as_posix(),)
    elif harm == "missing":
        clip.unlink()
        assert damaged(folder) == (clip.relative_to(folder).as_posix(),)
    elif harm == "without digests":
        (folder / SUMS).unlink()
        assert damaged(folder) == (SUMS,)
    else:
        groups = (replace(BASE, train=5, test=4), replace(NEW, train=4, test=2))
    corpus = make_corpus(folder, groups)
    assert not corpus.reused
    assert damaged(folder) == ()
    assert make_corpus(folder, groups).reused


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="something that is not the demo's"):
        make_corpus(tmp_path, GROUPS)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
