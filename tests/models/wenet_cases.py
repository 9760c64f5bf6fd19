"""The names of the golden cases that WeNet itself made (`parity/wenet`)."""

CASES = (
    "u2_conformer",
    "u2pp_conformer",
    "u2pp_conformer_bn",
    "transformer",
    "u2_conformer_conv2d6",
    "u2_conformer_conv2d8",
    "u2_conformer_postnorm",
    "whisper",
)
