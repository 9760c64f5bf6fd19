"""Instruction files become conversations in the words a language model was trained with, learnt on the answers only."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from thawline.core.extras import need
from thawline.data.conversation import Dialogue, Turn, read_dialogues, shuffled
from thawline.data.conversation_templates import TEMPLATES, times_message
from thawline.data.conversation_tokens import IGNORE, encode
from thawline.errors import DataError


class Words:
    """One token for each run of blanks and each word: independent of any tokenizer library."""

    pad_id = 0

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        return [
            self.known.setdefault(w, len(self.known) + 1) for w in re.findall(r"###|</s>|\S+?(?=###|</s>|\s|$)", text)
        ]

    def offsets(self, text: str) -> list[tuple[int, int]] | None:
        return [m.span() for m in re.finditer(r"###|</s>|\S+?(?=###|</s>|\s|$)", text)]

    def said(self, ids: Any) -> list[str]:
        names = {i: w for w, i in self.known.items()}
        return [names[i] for i in ids]


class Merging(Words):
    """Joins the end of an answer with the sign behind it, as some tokenizers do."""

    pattern = r"\S+ </s>|\S+"

    def encode(self, text: str) -> list[int]:
        return [self.known.setdefault(w, len(self.known) + 1) for w in re.findall(self.pattern, text)]

    def offsets(self, text: str) -> list[tuple[int, int]] | None:
        return [m.span() for m in re.finditer(self.pattern, text)]


class Borders(Merging):
    """Joins the last word of a question's close with the first of the answer; counting cannot work then."""

    pattern = r"\[/INST\] \w+|\S+"


DIALOGUE = Dialogue(
    key="a.json#0",
    kind="video",
    media=("/clip.mp4",),
    instruction="Watch it.",
    turns=(Turn(question="what ?", answer="a dog"), Turn(question="where ?", answer="outside")),
)


def learnt_text(family: str, dialogue: Dialogue = DIALOGUE, **options: Any) -> str:
    shown = TEMPLATES[family].render(dialogue, **options)
    return "".join(f"[{s.text}]" if s.learnt else s.text for s in shown.segments)


def test_mistral_puts_the_clip_in_a_turn_of_its_own() -> None:
    assert TEMPLATES["mistral"].render(DIALOGUE, times_s=[0.5, 1.54]).text == (
        "Watch it. [INST] <Video></Video> The video contains 2 frames sampled at 0.5, 1.5 seconds. [/INST] "
        "[INST] what ? [/INST] a dog </s> [INST] where ? [/INST] outside </s>"
    )


def test_vicuna_puts_signs_and_roles_around_everything() -> None:
    assert TEMPLATES["vicuna"].render(DIALOGUE).text == (
        "Watch it. ###Human: <Video></Video> ###Human: what ? ###Assistant: a dog ###Human: where ? "
        "###Assistant: outside ###"
    )


def test_phi_puts_the_clip_into_the_first_question() -> None:
    assert TEMPLATES["phi"].render(DIALOGUE).text == (
        "<|system|>\nWatch it.<|end|>\n<|user|>\n<Video></Video>\nwhat ?<|end|>\n<|assistant|>\na dog<|end|>\n"
        "<|user|>\nwhere ?<|end|>\n<|assistant|>\noutside<|end|>"
    )


def test_only_answers_and_the_sign_that_ends_each_are_learnt() -> None:
    assert learnt_text("mistral").endswith("[INST] what ? [/INST] [a dog </s> ][INST] where ? [/INST] [outside </s>]")
    assert learnt_text("vicuna") == (
        "</Video> ###Human: what ? ###Assistant: [a dog ][###]Human: where ? ###Assistant: [outside ][###]"
    )
    assert "[a dog<|end|>\n]<|user|>" in learnt_text("phi")


def test_upstream_also_learns_vicunas_role_names() -> None:
    assert learnt_text("vicuna", targets="upstream") == (
        "</Video> [###][Human:] what ? [###][Assistant: ][a dog ][###][Human:] where ? "
        "[###][Assistant: ][outside ][###]"
    )


def test_the_q_former_reads_the_first_question_too_for_vicuna_and_where_asked() -> None:
    assert TEMPLATES["mistral"].render(DIALOGUE).instruction == "Watch it."
    assert TEMPLATES["mistral"].render(DIALOGUE, question_to_qformer=True).instruction == "Watch it. what ?"
    assert TEMPLATES["vicuna"].render(DIALOGUE).instruction == "Watch it. what ?"


def test_several_images_stand_one_behind_the_other() -> None:
    pair = Dialogue(key="k", kind="image", media=("/a.png", "/b.png"), turns=(Turn(question="same ?", answer="no"),))
    shown = TEMPLATES["mistral"].render(pair)
    assert shown.before == ("[INST] <Image>", "</Image><Image>")
    assert shown.text == "[INST] <Image></Image><Image></Image> [/INST] [INST] same ? [/INST] no </s>"


def test_text_alone_has_no_signs_for_clips() -> None:
    words = Dialogue(key="k", kind="text", turns=(Turn(question="hi", answer="ho"),))
    assert TEMPLATES["mistral"].render(words).text == "[INST] hi [/INST] ho </s>"
    assert TEMPLATES["vicuna"].render(words).text == "###Human: hi ###Assistant: ho ###"
    assert TEMPLATES["phi"].render(words).text == "<|user|>\nhi<|end|>\n<|assistant|>\nho<|end|>"


@pytest.mark.parametrize("family", ["mistral", "vicuna"])
def test_counting_and_characters_label_the_same_tokens(family: str) -> None:
    words = Words()
    template = TEMPLATES[family]
    made = encode(template.render(DIALOGUE), words, max_tokens=100, template=template)
    kept = [t for t, label in zip(made.pieces[-1], made.labels[-1], strict=True) if label != IGNORE]
    end = "</s>" if family == "mistral" else "###"
    assert words.said(kept) == ["a", "dog", end, "outside", end]
    assert all(label in (IGNORE, t) for t, label in zip(made.pieces[-1], made.labels[-1], strict=True))
    assert made.labels[0] == (IGNORE,) * len(made.pieces[0])


def test_a_tokenizer_that_joins_across_a_border_is_labelled_by_characters() -> None:
    words = Borders()
    template = TEMPLATES["mistral"]
    made = encode(template.render(DIALOGUE), words, max_tokens=100, template=template)
    kept = [t for t, label in zip(made.pieces[-1], made.labels[-1], strict=True) if label != IGNORE]
    assert words.said(kept) == ["[/INST] a", "dog", "</s>", "[/INST] outside", "</s>"]


def test_a_tokenizer_that_joins_and_knows_no_characters_is_refused() -> None:
    class Blind(Borders):
        def offsets(self, text: str) -> list[tuple[int, int]] | None:
            return None

    template = TEMPLATES["mistral"]
    with pytest.raises(DataError, match="joins text across the borders"):
        encode(template.render(DIALOGUE), Blind(), max_tokens=100, template=template, where="a.json#0")


def test_a_long_dialogue_loses_its_end_and_one_without_an_answer_left_is_refused() -> None:
    words, template = Words(), TEMPLATES["mistral"]
    whole = encode(template.render(DIALOGUE), words, max_tokens=100, template=template)
    total = sum(map(len, whole.pieces))
    cut = encode(template.render(DIALOGUE), words, max_tokens=total, template=template)
    assert sum(map(len, cut.pieces)) == total - 1  # bos takes one
    with pytest.raises(DataError, match="no token of an answer is left within 8 text tokens"):
        encode(template.render(DIALOGUE), words, max_tokens=8, template=template)


def test_the_prompt_of_a_chat_is_the_training_text_up_to_the_answer() -> None:
    for family, template in TEMPLATES.items():
        before, after = template.prompt("where ?", history=DIALOGUE.turns[:1], instruction="Watch it.")
        whole = template.render(DIALOGUE).text
        assert whole.startswith((before + after).rstrip()), family
        assert whole[len(before + after) :].lstrip().startswith("outside"), family
    assert TEMPLATES["mistral"].prompt("q", answer_prefix="Best option:(")[-1].endswith("[/INST] Best option:(")


def test_ask_anything_json_is_read_with_its_parts_and_paths(tmp_path: Path) -> None:
    rows = [
        {"video": "v/1.mp4", "QA": [{"i": "Look.", "q": "what", "a": "dog"}], "start": 1, "end": 3.5},
        {"image": "i.png", "QA": [{"q": "", "a": "a cat"}]},
        {"QA": [{"q": "hi", "a": "ho"}]},
        {"video": "2.mp4", "caption": "a dog runs"},
    ]
    file = tmp_path / "it.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    found = read_dialogues(file)
    assert [d.kind for d in found] == ["video", "image", "text", "video"]
    assert found[0] == Dialogue(
        key="it.json#0",
        kind="video",
        media=(str(tmp_path / "v/1.mp4"),),
        turns=(Turn(question="what", answer="dog"),),
        instruction="Look.",
        start_s=1.0,
        end_s=3.5,
    )
    assert found[3].caption == "a dog runs"
    assert found.format == "ask-anything"
    assert len(found.fingerprint) == 32


def test_llava_json_is_read_and_its_placeholders_are_counted(tmp_path: Path) -> None:
    rows = [
        {
            "id": "7",
            "image": ["a.png", "b.png"],
            "conversations": [
                {"from": "human", "value": "<image>\n<image>\nSame?"},
                {"from": "gpt", "value": "No."},
                {"from": "human", "value": "Why?"},
                {"from": "gpt", "value": "Colour."},
            ],
        },
        {
            "image": "a.png",
            "conversations": [{"from": "human", "value": "<image><image> x"}, {"from": "gpt", "value": "y"}],
        },
    ]
    file = tmp_path / "llava.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    found = read_dialogues(file, media_root=Path("/data"))
    assert found.format == "llava"
    assert found[0].key == "7"
    assert found[0].media == ("/data/a.png", "/data/b.png")
    assert found[0].turns == (Turn(question="Same?", answer="No."), Turn(question="Why?", answer="Colour."))
    with pytest.raises(DataError, match="2 places for clips and names 1 files"):
        found[1]


def test_a_malformed_entry_costs_that_entry_and_names_it(tmp_path: Path) -> None:
    file = tmp_path / "it.json"
    file.write_text(json.dumps([{"QA": [{"q": "x", "a": "y"}]}, {"video": "v.mp4", "QA": []}, 5]), encoding="utf-8")
    found = read_dialogues(file)
    assert len(found) == 3
    assert [m.key for m in found.malformed] == ["it.json#1", "it.json#2"]
    with pytest.raises(DataError) as caught:
        found[1]
    assert str(caught.value) == (
        'it.json#1: "QA" must be a list of questions and answers that is not empty\n  fix: mend or remove the entry'
    )


@pytest.mark.parametrize(
    ("content", "sentence"),
    [("[]", "no samples"), ("{", "not JSON"), ('[{"audio": "x"}]', "none of its 1 entries is a sample; the first")],
)
def test_a_file_without_samples_is_refused(tmp_path: Path, content: str, sentence: str) -> None:
    file = tmp_path / "it.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=sentence):
        read_dialogues(file)
    with pytest.raises(DataError, match="cannot be read"):
        read_dialogues(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (5, "an entry must be an object, got int"),
        ({"video": "v.mp4"}, '"QA" must be a list of questions and answers that is not empty'),
        ({"video": "v.mp4", "QA": {"q": "x", "a": "y"}}, '"QA" must be a list of questions and answers'),
        ({"video": "v.mp4", "QA": [{"q": "x"}]}, """every item of "QA" needs an answer "a", got {'q': 'x'}"""),
        ({"video": "v.mp4", "QA": [{"q": None, "a": "y"}]}, "'q' must be text, got None"),
        ({"video": "v.mp4", "QA": [{"q": "x", "a": 5}]}, "'a' must be text, got 5"),
        ({"video": "v.mp4", "QA": [{"q": "x", "a": "\ud800"}]}, "'a' holds '\\ud800', which is half of a character"),
        ({"video": "\ud800.mp4", "QA": [{"a": "y"}]}, "'video' holds '\\ud800', which is half of a character"),
        ({"video": 5, "QA": [{"a": "y"}]}, "'video' must be a path or a list of paths, got 5"),
        ({"video": "v", "image": "i", "QA": [{"a": "y"}]}, "it names a video and an image; one of them is meant"),
        ({"video": "v.mp4", "caption": ["a", "b"]}, "'caption' must be text, got ['a', 'b']"),
        ({"video": "v.mp4", "caption": " "}, "the caption is empty"),
        ({"caption": "nothing to see"}, "a caption without a video or image"),
        ({"QA": [{"a": "y"}], "start": 3}, '"start" stands alone: a part has "start" and "end", in seconds'),
        ({"QA": [{"a": "y"}], "start": [1], "end": 2}, '"start" and "end" must be seconds, got [[1], 2]'),
        ({"QA": [{"a": "y"}], "start": "soon", "end": 2}, '"start" and "end" must be seconds, got [\'soon\', 2]'),
        ({"QA": [{"a": "y"}], "start": 1, "end": 10**400}, '"start" and "end" must be seconds'),
        ({"QA": [{"a": "y"}], "start": 2, "end": 2}, "the part from 2 to 2 seconds is empty"),
        ({"QA": [{"a": "y"}], "start": float("nan"), "end": 2}, "the part from nan to 2 seconds is empty"),
        ({"conversations": []}, '"conversations" must be a list that is not empty'),
        ({"conversations": [{"from": "human"}]}, 'every item of "conversations" needs "from" and "value"'),
        ({"conversations": [{"from": "human", "value": "hello?"}]}, "nobody answers in it"),
        ({"conversations": [{"from": "gtp", "value": "hi"}]}, "\"from\" is 'gtp'; known: human, gpt"),
    ],
)
def test_what_is_no_sample_is_said_in_a_sentence_and_the_others_stay(tmp_path: Path, entry: Any, reason: str) -> None:
    file = tmp_path / "it.json"
    file.write_text(json.dumps([{"QA": [{"a": "y"}]}, entry]), encoding="utf-8")
    found = read_dialogues(file)
    assert found[0].turns == (Turn(question="", answer="y"),)
    (bad,) = found.malformed
    assert bad.key == "it.json#1"
    assert bad.reason.startswith(reason)


def test_a_long_odd_value_is_quoted_in_part(tmp_path: Path) -> None:
    file = tmp_path / "it.json"
    file.write_text(json.dumps([{"QA": [{"a": "y"}]}, {"QA": [{"q": "x" * 10**6}]}]), encoding="utf-8")
    assert len(read_dialogues(file).malformed[0].reason) < 300


def test_seconds_may_be_written_as_text(tmp_path: Path) -> None:
    file = tmp_path / "it.json"
    file.write_text(json.dumps([{"QA": [{"a": "y"}], "start": "1.5", "end": "2"}]), encoding="utf-8")
    assert (read_dialogues(file)[0].start_s, read_dialogues(file)[0].end_s) == (1.5, 2.0)


def test_entries_that_share_an_id_are_told_apart_by_their_numbers(tmp_path: Path) -> None:
    rows = [{"id": i, "conversations": [{"from": "gpt", "value": "y"}]} for i in (7, 8, 7, None, "")]
    file = tmp_path / "it.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    assert [read_dialogues(file).key(n) for n in range(5)] == [
        "7 (it.json#0)",
        "8",
        "7 (it.json#2)",
        "it.json#3",
        "it.json#4",
    ]


@pytest.mark.parametrize(
    ("content", "sentence", "fix"),
    [
        ('{"a": 1}\n{"b": 2}\n', "not JSON: Extra data", "it has a sample a line"),
        ('{"samples": [1]}', "no samples", "write the list under 'samples' into a file of its own"),
        ("[" * 100_000, "not JSON: maximum recursion depth", "one JSON list"),
        ("[" + "1" * 5000 + "]", "not JSON: Exceeds the limit", "one JSON list"),
    ],
)
def test_a_file_of_another_shape_is_told_what_to_become(tmp_path: Path, content: str, sentence: str, fix: str) -> None:
    file = tmp_path / "it.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=sentence) as caught:
        read_dialogues(file)
    assert caught.value.where == str(file)
    assert fix in caught.value.fix


def test_a_name_nearly_right_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text("[]")
    with pytest.raises(DataError, match="No such file") as caught:
        read_dialogues(tmp_path / "tran.json")
    assert caught.value.fix == f"did you mean {tmp_path / 'train.json'}?"


def test_the_order_of_turns_follows_from_the_generator_alone() -> None:
    turns = [Turn(question=str(i), answer=str(i)) for i in range(6)]
    once = shuffled(turns, np.random.default_rng(3))
    assert once == shuffled(turns, np.random.default_rng(3))
    assert once != tuple(turns)
    assert sorted(once, key=lambda t: t.question) == turns


def test_no_message_about_times_where_there_are_none() -> None:
    assert times_message(None) == ""


def test_torch_is_not_imported() -> None:
    code = "import sys, thawline.data.conversation_tokens; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class HuggingFace:
    """A directory's tokenizer, used directly."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = need("transformers", extra="hf").AutoTokenizer.from_pretrained(folder)
        self.pad_id = self.tokenizer.eos_token_id

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def offsets(self, text: str) -> list[tuple[int, int]] | None:
        return list(self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping)


# The conversations of the fixtures, as samples. `config.json` holds their text, numbers and labels from upstream.
GOLDEN = {
    "mistral_a": [
        Dialogue(
            key="0",
            kind="video",
            media=("v",),
            instruction="watch the video and answer the question .",
            turns=(
                Turn(question="what is the man doing .", answer="he is hitting a baseball ."),
                Turn(question="where .", answer="on the green grass"),
            ),
        ),
        Dialogue(
            key="1",
            kind="video",
            media=("v",),
            turns=(Turn(question="describe the video .", answer="a woman is doing yoga on a blue mat ."),),
        ),
    ],
    "vicuna_a": [
        Dialogue(
            key="0",
            kind="video",
            media=("v",),
            instruction="watch the video and answer the question.",
            turns=(
                Turn(question="what is the man doing", answer="he is running on the grass."),
                Turn(question="where", answer="on the grass."),
            ),
        ),
        Dialogue(
            key="1",
            kind="video",
            media=("v",),
            turns=(Turn(question="describe the video", answer="a woman is doing yoga."),),
        ),
    ],
}


@pytest.mark.parametrize("name", list(GOLDEN))
def test_tokens_and_labels_are_those_of_the_original(shared: Path, name: str) -> None:
    folder = shared / "parity" / "videochat2" / name
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    golden = load_file(folder / "io.safetensors")["stage3/llm_labels"]
    tokenizer, template = HuggingFace(folder / "llm"), TEMPLATES[config["family"]]
    visual = config["dims"]["nq"] + config["dims"]["nx"]
    limit = config["model"]["max_txt_len"]
    for number, dialogue in enumerate(GOLDEN[name]):
        shown = template.render(dialogue, targets="upstream")
        # The fixtures' words about the frames differ between the cases, so they are put in by hand.
        said = config["conversations"][number]
        between = said[said.index("</Video>") + len("</Video>") :]
        message = between[: between.index(" [/INST]" if name == "mistral_a" else " ###")]
        first = shown.segments[0]
        segments = (
            type(first)("</Video>" + message + first.text[len("</Video>") :], first.learnt, first.ends),
            *shown.segments[1:],
        )
        shown = type(shown)(before=shown.before, segments=segments, instruction=shown.instruction)
        assert shown.text == said
        made = encode(shown, tokenizer, max_tokens=limit, template=template, targets="upstream")
        ids = config["token_ids"][number]
        assert list(made.pieces[0]) == ids["before_ids"]
        assert list(made.pieces[1]) == ids["after_ids"][: limit - 1 - len(ids["before_ids"])]
        start = 1 + len(made.pieces[0]) + visual
        assert list(made.labels[1]) == golden[number, start : start + len(made.pieces[1])].tolist()


def test_a_caption_is_learnt_after_its_order_and_upstream_leaves_a_padding_like_end_out(shared: Path) -> None:
    folder = shared / "parity" / "videochat2" / "mistral_a"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    golden = load_file(folder / "io.safetensors")["stage2/llm_labels"]
    tokenizer, template = HuggingFace(folder / "llm"), TEMPLATES["mistral"]
    for number, caption in enumerate(config["captions"]):
        shown = template.caption(Dialogue(key="c", kind="video", media=("v",), caption=caption), "describe the video")
        made = encode(shown, tokenizer, max_tokens=32, template=template, targets="upstream")
        learnt = [t for t in made.labels[-1] if t != IGNORE]
        assert learnt == [t for t in golden[number].tolist() if t != IGNORE]
        whole = encode(shown, tokenizer, max_tokens=32, template=template)
        assert whole.labels[-1][-1] == tokenizer.pad_id  # the end sign, learnt by default
        assert (
            list(whole.pieces[-1][-len(config["stage2_caption_ids"][number]) :]) == config["stage2_caption_ids"][number]
        )
