"""CTC prefix beam search over a batch of utterances at once, frame by frame, and resumable between chunks of frames.

The search is WeNet's (wenet/models/transformer/search.py): per frame the `beam` likeliest labels extend the `beam` best
prefixes; a prefix is scored by the sum of its alignments ending in blank and not in blank; times follow the single best
alignment. All utterances and beams move in a few tensor operations per frame. Prefixes are compared by 64-bit hashes,
so no token list is touched until the end, when tokens and times are read back along stored pointers. Scores are
float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thawline.models.decode.context import ContextGraph
from thawline.models.decode.hypothesis import Hypothesis

_NEVER = -torch.inf
_COPY, _APPEND, _REPLACE = 0, 1, 2


def ctc_prefix_beam_search(
    log_probs: Tensor,
    lengths: Tensor,
    *,
    beam: int,
    blank: int,
    context: ContextGraph | None = None,
) -> list[Hypothesis]:
    """log_probs (B, T, V), lengths (B,) -> the `beam` best prefixes of each utterance.

    score: ln of the summed probability of all alignments kept in the beam, plus the context bonus.
    """
    search = PrefixBeamSearch(log_probs.size(0), beam=beam, blank=blank, context=context, device=log_probs.device)
    search.advance(log_probs, lengths)
    return search.result()


class PrefixBeamSearch:
    """The state of a search; `advance` with frames as they come, `result` at any time."""

    def __init__(
        self,
        batch: int,
        *,
        beam: int,
        blank: int,
        context: ContextGraph | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.batch, self.beam, self.blank, self.context = batch, beam, blank, context
        shape = (batch, beam)
        dead = torch.full(shape, _NEVER, dtype=torch.float64, device=device)
        self._blank_score = dead.clone()  # prefixes whose alignments end in blank
        self._blank_score[:, 0] = 0.0  # the empty prefix
        self._label_score = dead.clone()  # ... and in their last label
        self._blank_best = self._blank_score.clone()  # the best single alignment of each kind
        self._label_best = self._blank_best.clone()  # WeNet starts both at 0
        self._label_best[:, 1:] = _NEVER
        self._last = torch.full(shape, -1, dtype=torch.long, device=device)
        self._hash = torch.full(shape, 0x2545F4914F6CDD1D, dtype=torch.long, device=device)
        self._parent = torch.zeros(shape, dtype=torch.long, device=device)
        self._bonus = torch.zeros(shape, dtype=torch.float64, device=device)
        self._node = torch.zeros(shape, dtype=torch.long, device=device)
        self._graph = None if context is None else context.to(device)
        # Per frame: which beam each beam comes from, the label it adds (-1: none), and how its two lists of times
        # arise.
        self._from: list[Tensor] = []
        self._added: list[Tensor] = []
        self._time_from: list[Tensor] = []
        self._time_how: list[Tensor] = []

    @torch.no_grad()
    def advance(self, log_probs: Tensor, lengths: Tensor) -> None:
        """Take log_probs (B, T, V), of which the first lengths (B,) frames count.

        Chunks of one stream are fed one after the other; an utterance that has ended gets length 0 from then on.
        """
        frames, labels = log_probs.size(1), log_probs.size(2)
        if frames == 0:
            return
        keep = min(self.beam, labels)
        value, label = log_probs.topk(keep, dim=2)
        value = value.double()
        # A frame past the end is a certain blank: it changes no score and no time.
        past = torch.arange(frames, device=value.device) >= lengths.unsqueeze(1)
        label = label.masked_fill(past.unsqueeze(2), self.blank)
        value = value.masked_fill(past.unsqueeze(2), _NEVER)
        value[:, :, 0] = value[:, :, 0].masked_fill(past, 0.0)
        is_blank = label == self.blank
        silence = value.masked_fill(~is_blank, _NEVER).amax(2, keepdim=True)  # (B, T, 1)
        voiced = value.masked_fill(is_blank, _NEVER)
        # Of the N prefixes that stay and the N * K that grow, one after the other: the beam and the label's number.
        number = torch.arange(self.beam, device=value.device)
        row = torch.cat([number, number.repeat_interleave(keep)])
        column = torch.cat([torch.zeros_like(number), torch.arange(keep, device=value.device).repeat(self.beam)])
        for frame in zip(voiced.unbind(1), label.unbind(1), silence.unbind(1), strict=True):
            self._step(*frame, number, row, column)

    def _step(
        self, voiced: Tensor, label: Tensor, silence: Tensor, number: Tensor, row: Tensor, column: Tensor
    ) -> None:
        """One frame: voiced (B, K) ln probabilities of labels (B, K), -inf for blank; silence (B, 1) that of blank.

        number: 0..N-1; row, column: (N + N * K,) of each candidate, those that stay before those that grow
        """
        beams = self.beam
        blank_score, label_score = self._blank_score, self._label_score
        blank_best, label_best = self._blank_best, self._label_best
        whole = torch.logaddexp(blank_score, label_score)
        from_blank = blank_best > label_best
        best = torch.maximum(blank_best, label_best)
        repeats = label.unsqueeze(1) == self._last.unsqueeze(2)  # (B, N, K)

        # Prefixes that stay: blank, or their last label once more.
        again, again_at = voiced.unsqueeze(1).masked_fill(~repeats, _NEVER).max(2)
        stay_blank = whole + silence
        stay_label = label_score + again
        stay_label_best = label_best + again

        # Prefixes that grow by a label; the same label again needs a blank between.
        grown = voiced.unsqueeze(1) + torch.where(repeats, blank_score.unsqueeze(2), whole.unsqueeze(2))
        grown_best = voiced.unsqueeze(1) + torch.where(repeats, blank_best.unsqueeze(2), best.unsqueeze(2))

        # A prefix that stays and a shorter one that grows into it are one: give the growth to the one that stays.
        alive = whole > _NEVER
        parent_of = (self._parent.unsqueeze(2) == self._hash.unsqueeze(1)) & alive.unsqueeze(1)
        parent_of &= (alive & (again > _NEVER)).unsqueeze(2)
        merged, parent = parent_of.max(2)
        place = parent * label.size(1) + again_at  # in the flattened (N, K)
        flat, flat_best = grown.flatten(1), grown_best.flatten(1)
        joins = flat.gather(1, place).masked_fill(~merged, _NEVER)
        joins_best = flat_best.gather(1, place).masked_fill(~merged, _NEVER)
        stay_label = torch.logaddexp(stay_label, joins)
        taken = torch.zeros_like(flat, dtype=torch.int8)
        taken.scatter_add_(1, place, merged.to(torch.int8))
        flat = flat.masked_fill(taken > 0, _NEVER)
        # WeNet keeps the times of whichever it meets first where the label's probability is equal, which it always is.
        by_join = torch.where(parent < number, joins_best > _NEVER, joins_best > stay_label_best)

        # Lists of times are numbered 0..N-1 (ending in blank) and N..2N-1 (ending in a label).
        current = torch.where(from_blank, number, number + beams)  # the list of each beam's better alignment
        grown_from = torch.where(repeats, number.view(1, -1, 1), current.unsqueeze(2)).flatten(1)
        stay_from = torch.where(by_join, grown_from.gather(1, place), number + beams)
        stay_how = torch.where(by_join, _APPEND, _REPLACE)

        total = torch.cat([torch.logaddexp(stay_blank, stay_label), flat], dim=1)
        if self._graph is not None:
            gain, node = self._graph.step(self._node, label)  # (B, N, K)
            bonus = torch.cat([self._bonus, (self._bonus.unsqueeze(2) + gain).flatten(1)], dim=1)
            nodes = torch.cat([self._node, node.flatten(1)], dim=1)
            chosen = (total + bonus).topk(beams, dim=1).indices
            self._bonus, self._node = bonus.gather(1, chosen), nodes.gather(1, chosen)
        else:
            chosen = total.topk(beams, dim=1).indices

        grew = chosen >= beams
        source = row[chosen]
        added = label.gather(1, column[chosen])
        self._blank_score = stay_blank.gather(1, source).masked_fill(grew, _NEVER)
        self._blank_best = (best + silence).gather(1, source).masked_fill(grew, _NEVER)
        self._label_score = torch.cat([stay_label, flat], dim=1).gather(1, chosen)
        self._label_best = torch.cat([torch.maximum(stay_label_best, joins_best), flat_best], dim=1).gather(1, chosen)
        old_hash = self._hash.gather(1, source)
        self._parent = torch.where(grew, old_hash, self._parent.gather(1, source))
        self._hash = torch.where(grew, _extend_hash(old_hash, added), old_hash)
        self._last = torch.where(grew, added, self._last.gather(1, source))

        self._from.append(source)
        self._added.append(added.masked_fill(~grew, -1))
        self._time_from.append(
            torch.cat(
                [
                    current.gather(1, source),
                    torch.cat([stay_from, grown_from], dim=1).gather(1, chosen),
                ],
                dim=1,
            )
        )
        self._time_how.append(torch.where(grew, _APPEND, stay_how.gather(1, source)).to(torch.int8))

    @torch.no_grad()
    def result(self) -> list[Hypothesis]:
        """The best prefixes so far, best first. The search may go on afterwards."""
        score = torch.logaddexp(self._blank_score, self._label_score)
        if self._graph is not None:  # phrases begun and not completed lose their bonus
            score = score + self._bonus + self._graph.final.to(score.device)[self._node]
        score, order = score.sort(dim=1, descending=True, stable=True)
        pointer = order
        from_blank = self._blank_best > self._label_best
        times = torch.where(from_blank, 0, self.beam) + torch.arange(self.beam, device=order.device)
        times = times.gather(1, order)
        emitted = torch.zeros_like(order, dtype=torch.bool)
        tokens_at: list[Tensor] = []
        times_at: list[Tensor] = []
        for t in range(len(self._from) - 1, -1, -1):
            tokens_at.append(self._added[t].gather(1, pointer))
            pointer = self._from[t].gather(1, pointer)
            how = torch.cat([torch.full_like(self._time_how[t], _COPY), self._time_how[t]], dim=1).gather(1, times)
            times_at.append((how != _COPY) & ~emitted)
            emitted = torch.where(how == _COPY, emitted, how == _REPLACE)
            times = self._time_from[t].gather(1, times)
        return _hypotheses(score, tokens_at[::-1], times_at[::-1])


def _hypotheses(score: Tensor, tokens_at: list[Tensor], times_at: list[Tensor]) -> list[Hypothesis]:
    """From frame-wise marks (T of (B, N)) to lists."""
    batch, beams = score.shape
    if tokens_at:
        tokens = torch.stack(tokens_at, dim=2).flatten(0, 1).cpu()  # (B * N, T)
        marks = torch.stack(times_at, dim=2).flatten(0, 1).cpu()
    else:
        tokens = torch.full((batch * beams, 0), -1)
        marks = torch.zeros(batch * beams, 0, dtype=torch.bool)
    spoken = tokens >= 0
    words = [tuple(w.tolist()) for w in torch.split(tokens[spoken], spoken.sum(1).tolist())]
    frames = [tuple(f.tolist()) for f in torch.split(marks.nonzero()[:, 1], marks.sum(1).tolist())]
    out: list[Hypothesis] = []
    for b, row in enumerate(score.tolist()):
        living = [n for n in range(beams) if row[n] > _NEVER]
        nbest = tuple(words[b * beams + n] for n in living)
        at = tuple(frames[b * beams + n] for n in living)
        out.append(
            Hypothesis(
                tokens=nbest[0],
                score=row[living[0]],
                times=at[0],
                nbest=nbest,
                nbest_scores=tuple(row[n] for n in living),
                nbest_times=at,
            )
        )
    return out


def _extend_hash(prefix: Tensor, label: Tensor) -> Tensor:
    """A new hash for prefix + label; splitmix64's mixing, in wrapping 64-bit arithmetic."""
    x = prefix * -7046029254386353131 + label + 1
    x = (x ^ (x >> 30)) * -4658895280553007687
    x = (x ^ (x >> 27)) * -7723592293110705685
    return x ^ (x >> 31)
