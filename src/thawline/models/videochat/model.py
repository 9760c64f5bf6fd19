"""VideoChat2 whole: frames through the vision transformer, the Q-Former and the projection into a language model.

Names of modules and tensors are upstream's (`video_chat2/models/videochat_*/videochat2_{pt,it,it_hd}_*.py`), which
differ by family: `mistral_model`, `llama_model`, `phi_model`, `mistral_proj`, ... The model computes; text becomes
numbers before it (`data.conversation_tokens`), and which parameters train is a plan's business (`switches`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from thawline.errors import DataError, RecipeError
from thawline.models.videochat.config import VideoChatConfig
from thawline.models.videochat.lora import unwrapped, with_lora
from thawline.models.videochat.qformer import INIT_STD, QFormer
from thawline.models.videochat.vit import VisionTransformer

IGNORE = -100
"""Label of a token that is not learnt."""
LAYERNORM_EPS = 1e-12


class PromptLike(Protocol):
    """One conversation as numbers; `Prompt`, or what the data room makes."""

    @property
    def pieces(self) -> Sequence[Sequence[int]]: ...
    @property
    def labels(self) -> Sequence[Sequence[int]]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One conversation as numbers: K + 1 pieces of text around K clips.

    pieces: token numbers, bos not among them
    labels: for each token of each piece its own number where it is to be learnt, else IGNORE
    """

    pieces: Sequence[Sequence[int]]
    labels: Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmInputs:
    """What the language model sees: embeds (B, S, D), mask (B, S) int64 with 0 for padding, labels (B, S) int64."""

    embeds: Tensor
    mask: Tensor
    labels: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatLoss:
    """Cross entropy of one micro-batch, not normalised.

    sum:     nats, over all learnt tokens
    tokens:  how many those are; sum / tokens is upstream's loss
    correct: how many of them teacher forcing gets right
    """

    sum: Tensor
    tokens: Tensor
    correct: Tensor


class VideoChat(nn.Module):
    """A VideoChat2 model around a causal language model.

    llm: from `llm.load_llm`, without adapters; they are added here where `config.lora` says so
    bos_id, pad_id: the language model's; padding is embedded but masked
    """

    def __init__(self, config: VideoChatConfig, llm: nn.Module, *, bos_id: int, pad_id: int) -> None:
        super().__init__()
        self.config = config
        self.bos_id = bos_id
        self.pad_id = pad_id
        hidden = config.qformer.hidden_size
        width = _llm_width(llm)
        # Children in upstream's order: tensors keep the order of its checkpoints and of its optimizer groups.
        self.query_tokens = nn.Parameter(torch.empty(1, config.qformer.queries, hidden).normal_(std=INIT_STD))
        if config.qformer.extra_queries:
            self.extra_query_tokens = nn.Parameter(torch.zeros(1, config.qformer.extra_queries, hidden))
        self.vision_encoder = VisionTransformer(config.vision)
        self.vision_layernorm = (
            nn.LayerNorm(config.vision.width, eps=LAYERNORM_EPS) if config.vision.add_layernorm else nn.Identity()
        )
        self.qformer = QFormer(config.qformer, config.vision.width)
        for parameter in llm.parameters():
            parameter.requires_grad = False  # as upstream builds it; a plan decides afterwards
        if config.lora is not None:
            llm = with_lora(llm, config.lora, family=config.family)
        self.add_module(config.llm_name, llm)
        self.add_module(config.projection_name, nn.Linear(hidden, width))

    @property
    def llm(self) -> nn.Module:
        """The language model, in peft's wrapper where it has adapters."""
        return self.get_submodule(self.config.llm_name)

    @property
    def causal_lm(self) -> nn.Module:
        """The causal language model itself, adapters in its layers."""
        return unwrapped(self.llm)

    @property
    def projection(self) -> nn.Module:
        return self.get_submodule(self.config.projection_name)

    @property
    def device(self) -> torch.device:
        return self.query_tokens.device

    def queries(self, count: int) -> Tensor:
        """The query vectors for `count` clips: (count, queries + extra queries, H)."""
        parts: list[Tensor] = [self.query_tokens]
        if self.config.qformer.extra_queries:
            parts.append(self.extra_query_tokens)
        return torch.cat(parts, dim=1).expand(count, -1, -1)

    def encode_views(self, frames: Tensor, text_ids: Tensor | None = None, text_mask: Tensor | None = None) -> Tensor:
        """Clips of one size -> visual tokens for the language model.

        frames:    (N, T, 3, H, W) float, normalised; T = 1 is a still image, which has a position table of its own
        text_ids:  (N, words) int64 instruction of each clip, with its mask; None without text input
        returns    (N, queries + extra queries, D)
        Raises RecipeError where the model takes an instruction and none is given, or the other way round.
        """
        if self.config.qformer.text_input != (text_ids is not None):
            raise RecipeError(
                "this model's Q-Former takes an instruction, and none was given"
                if text_ids is None
                else "an instruction was given to a Q-Former without text input",
                fix="stage 2 (captions) has no instruction, stages 3 and later have one",
            )
        frames = frames.to(self.vision_encoder.encoder.patch_embed.proj.weight.dtype)
        seen = self.vision_encoder(frames.transpose(1, 2), frames.shape[1] == 1)  # (N, T, patches, W)
        seen = self.vision_layernorm(seen.flatten(1, 2))
        queries = self.queries(len(frames)).to(seen.dtype)
        out = self.qformer(queries, seen, text_ids, text_mask)
        return self.projection(out[:, : queries.shape[1]])  # type: ignore[no-any-return]

    def encode(
        self,
        clips: Sequence[Tensor],
        text_ids: Tensor | None = None,
        text_mask: Tensor | None = None,
        owners: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """Clips of any number of frames, and in the HD variant of any size -> the visual tokens of each.

        clips:  each (T, 3, H, W); text_ids (B, words): instructions of the samples
        owners: which sample each clip belongs to; one clip a sample, in order, where None
        returns one (tokens, D) for each clip: tiles row by row, then the global view
        """
        rows = list(range(len(clips))) if owners is None else list(owners)
        views = [self._views(clip) for clip in clips]
        groups: dict[tuple[int, ...], list[int]] = {}
        for number, view in enumerate(views):
            groups.setdefault(tuple(view.shape[1:]), []).append(number)
        out: dict[int, Tensor] = {}
        for members in groups.values():
            counts = [len(views[m]) for m in members]
            stacked = torch.cat([views[m] for m in members])
            text = None
            if text_ids is not None:
                text = torch.tensor(
                    [rows[m] for m, n in zip(members, counts, strict=True) for _ in range(n)], device=text_ids.device
                )
            tokens = self.encode_views(
                stacked,
                None if text is None or text_ids is None else text_ids[text],
                None if text is None or text_mask is None else text_mask[text],
            )
            for member, part in zip(members, torch.split(tokens, counts), strict=True):
                out[member] = part.flatten(0, 1)
        return [out[number] for number in range(len(clips))]

    def _views(self, clip: Tensor) -> Tensor:
        """(views, T, 3, h, w): the clip itself, or its tiles and its global view."""
        tiles = self.config.tiles
        if tiles is None:
            return clip[None]
        side = tiles.size
        frames, channels, height, width = clip.shape
        if height % side or width % side:
            raise DataError(
                f"a clip of {height} x {width} pixels cannot be cut into tiles of {side}",
                fix="resize it to whole tiles first (data.video.to_tiles)",
            )
        cut = clip.reshape(frames, channels, height // side, side, width // side, side)
        views = cut.permute(2, 4, 0, 1, 3, 5).reshape(-1, frames, channels, side, side)
        if tiles.global_view:
            whole = functional.interpolate(clip.float(), size=(side, side), mode="bicubic", align_corners=False)
            views = torch.cat([views, whole.to(clip.dtype)[None]])
        return views

    def assemble(
        self, prompts: Sequence[PromptLike], visual: Sequence[Tensor], *, bos: Literal["embedding", "id"] | None = None
    ) -> LlmInputs:
        """Text and visual tokens in one row each: bos, pieces and clips in turn, padded on the right.

        visual: the clips' tokens in the order of the samples, each (tokens, D)
        bos:    overrules `config.bos`
        Raises DataError where a sample's pieces do not leave one place for each of its clips.
        """
        places = [len(p.pieces) - 1 for p in prompts]
        if sum(places) != len(visual):
            raise DataError(f"the conversations leave places for {sum(places)} clips, and {len(visual)} are given")
        # One look-up for everything: bos, padding, then all pieces of all samples in order.
        spoken = [token for p in prompts for piece in p.pieces for token in piece]
        table = self._embed([self.bos_id, self.pad_id, *spoken])
        first, padding = table[:1], table[1:2]
        if (bos or self.config.bos) == "id":
            first = torch.full_like(first, float(self.bos_id))
        texts = iter(torch.split(table[2:], [len(piece) for p in prompts for piece in p.pieces]))
        clips = iter(visual)
        rows: list[Tensor] = []
        labels: list[Tensor] = []
        for prompt in prompts:
            parts, targets = [first], [IGNORE]
            for number in range(len(prompt.pieces)):
                if number:
                    clip = next(clips).to(first.dtype)
                    parts.append(clip)
                    targets += [IGNORE] * len(clip)
                parts.append(next(texts))
                targets += prompt.labels[number]
            rows.append(torch.cat(parts))
            labels.append(torch.tensor(targets, device=first.device))
        longest = max(len(row) for row in rows)
        return LlmInputs(
            embeds=torch.stack([torch.cat([r, padding.expand(longest - len(r), -1)]) for r in rows]),
            mask=torch.stack([functional.pad(torch.ones_like(t), (0, longest - len(t))) for t in labels]),
            labels=torch.stack([functional.pad(t, (0, longest - len(t)), value=IGNORE) for t in labels]),
        )

    def _embed(self, ids: Sequence[int]) -> Tensor:
        table = self.causal_lm.get_input_embeddings()  # type: ignore[operator]
        return table(torch.tensor(list(ids), dtype=torch.long, device=self.device))  # type: ignore[no-any-return]

    def logits(self, inputs: LlmInputs) -> Tensor:
        """(B, S, V). Rows of padding mean nothing."""
        return self.llm(inputs_embeds=inputs.embeds, attention_mask=inputs.mask, use_cache=False).logits  # type: ignore[no-any-return]

    def loss_of(self, inputs: LlmInputs) -> ChatLoss:
        """Cross entropy of the learnt tokens. The vocabulary is only looked at where there is one to learn."""
        model = self.causal_lm
        hidden = model.model(  # type: ignore[operator]
            inputs_embeds=inputs.embeds, attention_mask=inputs.mask, use_cache=False
        ).last_hidden_state
        labels = inputs.labels[:, 1:]
        learnt = labels != IGNORE
        logits = model.lm_head(hidden[:, :-1][learnt]).float()  # type: ignore[operator]  # (learnt tokens, V)
        targets = labels[learnt]
        return ChatLoss(
            sum=functional.cross_entropy(logits, targets, reduction="sum"),
            tokens=learnt.sum(),
            correct=(logits.detach().argmax(-1) == targets).sum(),
        )

    def forward(
        self,
        clips: Sequence[Tensor],
        prompts: Sequence[PromptLike],
        text_ids: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> ChatLoss:
        """The loss of one micro-batch, as a sum (see `ChatLoss`).

        clips: all clips of all samples in order; how many a sample has follows from its prompt's pieces
        """
        owners = [sample for sample, p in enumerate(prompts) for _ in range(len(p.pieces) - 1)]
        visual = self.encode(clips, text_ids, text_mask, owners) if clips else []
        return self.loss_of(self.assemble(prompts, visual))


def _llm_width(llm: nn.Module) -> int:
    table = llm.get_input_embeddings()  # type: ignore[operator]
    return int(table.weight.shape[1])
