from __future__ import annotations

import io

from thawline.demo.stage import Stage


def test_a_check_that_holds_is_one_line_and_one_that_does_not_says_what_was_expected():
    out = io.StringIO()
    stage = Stage(out)
    stage.scene("A base model")
    assert stage.check(True, "WER 0.0 %", expected="at most 5 %")
    assert not stage.check(False, "WER 12.0 %", expected="at most 5 %")
    assert out.getvalue() == (
        "\n1  A base model\n   ok     WER 0.0 %\n   FAILED WER 12.0 %\n          expected: at most 5 %\n"
    )
    assert [check.text for check in stage.failed] == ["WER 12.0 %"]
    assert stage.failed[0].scene == "A base model"


def test_outside_a_terminal_there_are_no_escape_codes_no_frames_and_no_moving_line():
    out = io.StringIO()
    stage = Stage(out)
    with stage.working("training") as ticker:
        ticker.begin(step=0, total_steps=4)
        ticker.step({"step": 1, "loss": 2.0}, {})
        ticker.end()
    stage.table(("plan", "WER"), [("everything", "1.0 %"), ("[half]", "12.0 %")], right=frozenset({1}))
    stage.table(("file", "said"), [("a.flac", "one two"), ("b.flac", "one")], right=frozenset())
    assert out.getvalue() == (
        "\n"
        "          plan           WER\n"
        "          everything   1.0 %\n"
        "          [half]      12.0 %\n"
        "\n"
        "\n"
        "          file    said\n"
        "          a.flac  one two\n"
        "          b.flac  one\n"
        "\n"
    )  # fmt: skip


def test_long_lines_are_left_whole_so_that_paths_can_be_copied():
    out = io.StringIO()
    Stage(out).say("x" * 300)
    assert out.getvalue() == "x" * 300 + "\n"


def test_the_moving_line_on_a_terminal_shows_the_step():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    stage = Stage(out)
    with stage.working("training") as ticker:
        ticker.begin(step=0, total_steps=4)
        ticker.step({"step": 3, "loss": 2.0}, {})
        assert ticker.status is not None
        assert str(ticker.status.status) == "training   step 3 of 4, loss 2.00"
