"""VideoChat2's stage 1: clips and captions are brought together before any language model sees a frame.

A Q-Former over a frozen vision transformer learns three things at once (BLIP-2's, Li et al. 2023, section 3.2): clips
and their captions lie close (contrastive), true pairs are told from false ones (matching), and the caption is written
word by word from the queries (captioning). Names of modules and tensors are those of
`video_chat2/models/videochat2_qformer.py`, the numbers too: losses and gradients are held against upstream's own class.

Two things are done otherwise. False partners come from the micro-batch alone, on any number of machines (upstream
gathers the contrastive loss over all GPUs), so that the world size is not in the mathematics. Captions of one clip are
true partners of each other (upstream numbers captions, and takes the others for false).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from thawline.errors import DataError
from thawline.models.videochat.alignment_config import AlignmentConfig
from thawline.models.videochat.config import QFormerConfig
from thawline.models.videochat.model import IGNORE, LAYERNORM_EPS
from thawline.models.videochat.qformer import INIT_STD, QFormer, additive, initialise
from thawline.models.videochat.vit import VisionTransformer

TEMPERATURES = (0.001, 0.5)
"""Between these the trained temperature is held."""
EASY = 1e-4
"""Added to the chance of every false partner, so that none is out of reach."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignmentLoss:
    """The losses of one micro-batch as sums, their weights not applied.

    contrastive: nats over `captions`; matched: captions whose own clip is the likeliest
    matching:    nats over `pairs`: every true one, and with each a false caption and a false clip, where there are any;
                 judged: pairs that were told rightly
    captioning:  nats over `words`; a loss whose weight is 0 is None
    clip_vectors, caption_vectors: what was compared, see `VideoAlignment.embed`
    """

    contrastive: Tensor
    matching: Tensor | None
    captioning: Tensor | None
    captions: int
    pairs: int
    words: Tensor
    matched: Tensor
    judged: Tensor
    clip_vectors: Tensor
    caption_vectors: Tensor


class VideoAlignment(nn.Module):
    """A stage-1 model.

    dec_id, pad_id: numbers of `[DEC]`, which a caption that is written begins with, and of padding
    """

    def __init__(self, config: AlignmentConfig, *, dec_id: int, pad_id: int) -> None:
        super().__init__()
        self.config = config
        self.dec_id = dec_id
        self.pad_id = pad_id
        hidden, width = config.qformer.hidden_size, config.vision.width
        # Children in upstream's order: tensors keep the order of its checkpoints and of its optimizer groups.
        self.vision_temp_embed = nn.Parameter(torch.empty(1, config.vision.num_frames, 1, width))
        self.temp = nn.Parameter(torch.tensor(config.temperature))
        self.query_tokens = nn.Parameter(torch.empty(1, config.qformer.queries, hidden))
        self.vision_encoder = VisionTransformer(config.vision)
        self.vision_layernorm = nn.LayerNorm(width, eps=LAYERNORM_EPS) if config.vision.add_layernorm else nn.Identity()
        self.qformer = SpeakingQFormer(config.qformer, width)
        self.vision_proj = nn.Linear(hidden, config.embed_dim)
        self.text_proj = nn.Linear(hidden, config.embed_dim)
        self.itm_head = nn.Linear(hidden * (2 if config.match_by == "cat" else 1), 2)
        for tensor in (self.vision_temp_embed, self.query_tokens):
            nn.init.trunc_normal_(tensor)  # of spread 1, as upstream
        for head in (self.vision_proj, self.text_proj, self.itm_head):
            nn.init.trunc_normal_(head.weight, std=INIT_STD)
            nn.init.zeros_(head.bias)

    def see(self, clips: Sequence[Tensor]) -> Tensor:
        """Clips, each (T, 3, H, W), -> their patches (B, frames * patches, W).

        A still image is shown once for each of the model's frames, as upstream's addition of the temporal embedding
        does by broadcasting. Raises DataError for any other number of frames.
        """
        frames = self.config.vision.num_frames
        groups: dict[int, list[int]] = {}
        for number, clip in enumerate(clips):
            if len(clip) not in (1, frames):
                raise DataError(f"a clip of {len(clip)} frames, and the temporal embedding has {frames}")
            groups.setdefault(len(clip), []).append(number)
        seen: dict[int, Tensor] = {}
        for length, members in groups.items():
            stacked = torch.stack([clips[m] for m in members]).transpose(1, 2)  # (n, 3, T, H, W)
            stacked = stacked.to(self.vision_encoder.encoder.patch_embed.proj.weight.dtype)
            patches = self.vision_encoder(stacked, length == 1) + self.vision_temp_embed
            seen.update(zip(members, self.vision_layernorm(patches.flatten(1, 2)), strict=True))
        return torch.stack([seen[number] for number in range(len(clips))])

    def embed(self, vision: Tensor, text_ids: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Clips (B, Q, embed_dim) and captions (B, embed_dim) as unit vectors, and the queries' states at each layer's
        door, which captions are written after."""
        out, states = self.qformer.look(self.query_tokens.expand(len(vision), -1, -1), vision)
        words = self.qformer.read(text_ids, text_mask)
        clips = functional.normalize(self.vision_proj(out), dim=-1)
        return clips, functional.normalize(self.text_proj(words[:, 0]), dim=-1), states

    def similarity(self, clips: Tensor, captions: Tensor) -> Tensor:
        """(clips, captions): how alike the unit vectors are, over the temperature."""
        each = torch.einsum("iqe,je->ijq", clips, captions) / self.temp
        return each.mean(-1) if self.config.aggregate == "mean" else each.amax(-1)

    def judge(self, vision: Tensor, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """(N, 2): logits of a false and of a true pair."""
        queries = self.query_tokens.expand(len(vision), -1, -1)
        out = self.qformer(queries, vision, text_ids, text_mask)
        pooled, first = out[:, : queries.shape[1]].mean(1), out[:, queries.shape[1]]
        if self.config.match_by == "add":
            pooled = pooled + first
        elif self.config.match_by == "cat":
            pooled = torch.cat((pooled, first), dim=1)
        return self.itm_head(pooled)  # type: ignore[no-any-return]

    def forward(self, clips: Sequence[Tensor], text_ids: Tensor, text_mask: Tensor, owners: Tensor) -> AlignmentLoss:
        """The losses of one micro-batch.

        clips: (T, 3, H, W) of each caption; text_ids, text_mask: (B, words) int64, padded on the right
        owners: (B,) number of the clip that each caption is of; captions of one clip are true partners of each other

        False partners are drawn from torch's global generator in training; else the likeliest ones are taken.
        """
        if self.training and self.temp.requires_grad:
            with torch.no_grad():
                self.temp.clamp_(*TEMPERATURES)
        c = self.config
        vision = self.see(clips)
        clip_vectors, text_vectors, states = self.embed(vision, text_ids, text_mask)
        alike = self.similarity(clip_vectors, text_vectors)
        same = owners[:, None] == owners[None, :]
        targets = same / same.sum(1, keepdim=True)
        contrastive = -((alike.log_softmax(1) + alike.T.log_softmax(1)) * targets).sum() / 2
        matching, judged, pairs = None, torch.zeros((), device=alike.device), 0
        if c.matching:
            logits, truth = self._pairs(vision, text_ids, text_mask, alike.detach(), same)
            matching = functional.cross_entropy(logits, truth, reduction="sum")
            judged, pairs = (logits.detach().argmax(-1) == truth).sum(), len(truth)
        return AlignmentLoss(
            contrastive=contrastive,
            matching=matching,
            captioning=self._written(states, text_ids, text_mask) if c.captioning else None,
            captions=len(owners),
            pairs=pairs,
            words=text_mask[:, 1:].sum(),
            matched=same.gather(0, alike.detach().argmax(0, keepdim=True)).sum(),
            judged=judged,
            clip_vectors=clip_vectors.detach(),
            caption_vectors=text_vectors.detach(),
        )

    def _pairs(
        self, vision: Tensor, text_ids: Tensor, text_mask: Tensor, alike: Tensor, same: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits of the true pairs, then of captions with false clips, then of clips with false captions; the truth."""
        if bool(same.all()):  # nobody is false
            return self.judge(vision, text_ids, text_mask), torch.ones_like(text_ids[:, 0])
        clips, captions = self._false(alike.T, same), self._false(alike, same)
        logits = self.judge(
            torch.cat((vision, vision[clips], vision)),
            torch.cat((text_ids, text_ids, text_ids[captions])),
            torch.cat((text_mask, text_mask, text_mask[captions])),
        )
        truth = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        truth[: len(vision)] = 1
        return logits, truth

    def _false(self, alike: Tensor, same: Tensor) -> Tensor:
        """(B,): for each row a column that is no partner of it."""
        chances = alike.softmax(1) + EASY if self.config.hard_negatives else torch.ones_like(alike)
        chances = chances.masked_fill(same, 0.0)
        return torch.multinomial(chances, 1)[:, 0] if self.training else chances.argmax(1)

    def _written(self, states: Sequence[Tensor], text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Nats of the captions' words, each from the queries and the words before it."""
        begun = text_ids.clone()
        begun[:, 0] = self.dec_id
        hidden = self.qformer.write(begun, text_mask, states)
        labels = begun.masked_fill(begun == self.pad_id, IGNORE)[:, 1:]
        learnt = labels != IGNORE
        logits = self.qformer.cls(hidden[:, :-1][learnt])
        return functional.cross_entropy(
            logits.float(), labels[learnt], reduction="sum", label_smoothing=self.config.label_smoothing
        )


class SpeakingQFormer(QFormer):
    """The Q-Former with `cls`, BERT's head over the vocabulary, whose matrix is the word embedding."""

    def __init__(self, config: QFormerConfig, vision_width: int) -> None:
        super().__init__(config, vision_width)
        self.cls = LanguageHead(config)
        self.cls.apply(initialise)
        words = self.bert.embeddings.word_embeddings
        assert words is not None, "stage 1 reads captions"
        self.cls.predictions.decoder.weight = words.weight

    def look(self, queries: Tensor, vision: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The queries after seeing the frames (B, Q, H), and what they were at the door of each layer."""
        x = self.bert.embeddings(queries, None, None)
        states: list[Tensor] = []
        for layer in self.bert.encoder.layer:
            states.append(x)
            x = layer(x, None, vision, queries.shape[1])
        return x, tuple(states)

    def read(self, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """(B, words, H): words that see each other and no clip."""
        x = self.bert.embeddings(None, text_ids, text_mask)
        mask = additive(text_mask[:, None, None, :], x.dtype)
        for layer in self.bert.encoder.layer:
            x = layer(x, mask, None, 0)
        return x  # type: ignore[no-any-return]

    def write(self, text_ids: Tensor, text_mask: Tensor, states: Sequence[Tensor]) -> Tensor:
        """(B, words, H): words that see the queries (by their `states` from `look`) and the words before them."""
        x = self.bert.embeddings(None, text_ids, text_mask)
        count = text_ids.shape[1]
        seen = torch.ones(count, count, device=x.device).tril() * text_mask[:, None, :]
        mask = additive(functional.pad(seen, (states[0].shape[1], 0), value=1.0)[:, None], x.dtype)
        for layer, before in zip(self.bert.encoder.layer, states, strict=True):
            x = layer(x, mask, None, 0, before)
        return x  # type: ignore[no-any-return]


class LanguageHead(nn.Module):
    """`qformer.cls`: (..., H) -> logits over the vocabulary."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.predictions = Predictions(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.predictions(x)  # type: ignore[no-any-return]


class Predictions(nn.Module):
    """`cls.predictions`. Upstream's files hold its bias under two names."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.transform = Transform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.decoder.bias = self.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.transform(x))  # type: ignore[no-any-return]


class Transform(nn.Module):
    """`cls.predictions.transform`."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(functional.gelu(self.dense(x)))  # type: ignore[no-any-return]
