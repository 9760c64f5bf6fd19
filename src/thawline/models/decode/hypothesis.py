"""What decoding one utterance gives."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Hypothesis:
    """The best token sequence of one utterance, and the runners-up.

    tokens:            ids without blank, sos and eos
    score:             natural-log score of the mode that made it (see the mode's function for what it sums)
    times:             encoder frame of each token; None where the mode does not align
    nbest:             all hypotheses, best first; nbest[0] is `tokens`
    nbest_scores:      the score of each; of a Whisper with a beam, what its search goes by (see its `decode`)
    nbest_times:       the times of each; None where the mode does not align
    confidence:        0..1, per-token geometric mean of the probabilities; None where the mode has none
    tokens_confidence: 0..1 for each token; None where the mode has none
    """

    tokens: tuple[int, ...]
    score: float
    times: tuple[int, ...] | None = None
    nbest: tuple[tuple[int, ...], ...] = ()
    nbest_scores: tuple[float, ...] = ()
    nbest_times: tuple[tuple[int, ...], ...] | None = None
    confidence: float | None = None
    tokens_confidence: tuple[float, ...] | None = None
