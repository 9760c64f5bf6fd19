"""Phrases to be preferred: an automaton over tokens that gives a bonus per matched token of a phrase.

An Aho-Corasick automaton as in WeNet (wenet/utils/context_graph.py) laid out as two tables, so that a whole batch of
beams moves in one look-up. Unlike WeNet, a phrase that begins another one counts as complete, and completed bonuses are
kept when the utterance ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from thawline.errors import RecipeError


class ContextGraph:
    """Bonus `score` per token of each phrase (token ids); withdrawn when a phrase is begun and not completed."""

    def __init__(self, phrases: Sequence[Sequence[int]], *, score: float = 3.0) -> None:
        """Raises RecipeError for an empty list or an empty phrase."""
        if not phrases or not all(phrases):
            raise RecipeError(
                "a context needs at least one phrase, and no phrase may be empty",
                where="context",
                fix="leave out empty lines and phrases whose text is outside the vocabulary",
            )
        self.score = score
        children: list[dict[int, int]] = [{}]
        depth, complete = [0], [False]
        for phrase in phrases:
            node = 0
            for token in phrase:
                if token not in children[node]:
                    children[node][token] = len(children)
                    children.append({})
                    depth.append(depth[node] + 1)
                    complete.append(False)
                node = children[node][token]
            complete[node] = True
        alphabet = sorted({token for phrase in phrases for token in phrase})
        column = {token: i + 1 for i, token in enumerate(alphabet)}  # 0: every other token
        nodes = len(children)
        goto = [[0] * (len(alphabet) + 1) for _ in range(nodes)]
        fail = [0] * nodes
        # The bonus that is safe at a node: that of the longest completed phrase on the way to it.
        kept = [0.0] * nodes
        queue = deque([0])
        while queue:
            node = queue.popleft()
            for token in alphabet:
                c = column[token]
                if token in children[node]:
                    child = children[node][token]
                    fail[child] = goto[fail[node]][c] if node else 0
                    kept[child] = depth[child] * score if complete[child] else kept[node]
                    goto[node][c] = child
                    queue.append(child)
                elif node:
                    goto[node][c] = goto[fail[node]][c]
        gain = [[0.0] * (len(alphabet) + 1) for _ in range(nodes)]
        for node in range(nodes):
            for c in range(len(alphabet) + 1):
                target = goto[node][c]
                # Going deeper gains one token's bonus. Falling off keeps what was completed, gives back the rest, and
                # takes up the bonus of the phrase part that still matches.
                deeper = c and children[node].get(alphabet[c - 1]) == target
                gain[node][c] = score if deeper else kept[node] - depth[node] * score + depth[target] * score
        self.columns = torch.tensor([*alphabet], dtype=torch.long)
        self.goto = torch.tensor(goto, dtype=torch.long)
        self.gain = torch.tensor(gain, dtype=torch.float64)
        self.final = torch.tensor([kept[n] - depth[n] * score for n in range(nodes)], dtype=torch.float64)

    def to(self, device: torch.device | None) -> ContextGraph:
        """The same automaton with its tables on `device`."""
        other = object.__new__(ContextGraph)
        other.score = self.score
        for name in ("columns", "goto", "gain", "final"):
            setattr(other, name, getattr(self, name).to(device))
        return other

    def step(self, node: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """node (B, N), label (B, K) -> (bonus gained, next node), each (B, N, K)."""
        at = torch.searchsorted(self.columns, label).clamp(max=self.columns.numel() - 1)
        column = torch.where(self.columns[at] == label, at + 1, 0)  # (B, K)
        index = node.unsqueeze(2), column.unsqueeze(1)
        return self.gain[index], self.goto[index]
