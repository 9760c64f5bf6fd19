"""The recogniser: encoder, CTC head, attention decoders; encode, losses, decoding. Names are WeNet's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from thawline.errors import RecipeError
from thawline.models.decode.attention_beam import attention_beam_search
from thawline.models.decode.context import ContextGraph
from thawline.models.decode.greedy import ctc_greedy_search
from thawline.models.decode.hypothesis import Hypothesis
from thawline.models.decode.options import DecodeOptions
from thawline.models.decode.prefix_beam import PrefixBeamSearch, ctc_prefix_beam_search
from thawline.models.decode.rescoring import candidates, rescore, token_scores
from thawline.models.wenet.cmvn import CmvnStatistics
from thawline.models.wenet.config import U2Config
from thawline.models.wenet.ctc import CTC
from thawline.models.wenet.decoder import BiTransformerDecoder, TransformerDecoder
from thawline.models.wenet.encoder import BaseEncoder, ConformerEncoder, TransformerEncoder
from thawline.models.wenet.loss import Losses, LossSums, Term, correct, smoothed_divergence_sum
from thawline.models.wenet.masks import valid_mask
from thawline.models.wenet.streaming import EncoderStream, check_chunks
from thawline.models.wenet.targets import (
    IGNORE,
    TeacherForcing,
    reversed_target,
    sos_prompt,
    teacher_forcing,
    whisper_prompt,
)


class U2Model(nn.Module):
    """A CTC/attention recogniser with WeNet's parameter and buffer names, built from its train.yaml."""

    encoder: BaseEncoder

    def __init__(self, config: U2Config, cmvn: CmvnStatistics | None = None) -> None:
        """Fresh weights from torch's global generator. See `build`."""
        super().__init__()
        self.config = config
        size = config.encoder.output_size
        encoder_class = ConformerEncoder if config.encoder.kind == "conformer" else TransformerEncoder
        self.encoder = encoder_class(config.encoder, cmvn, has_cmvn=bool(config.cmvn_file))
        self.decoder: TransformerDecoder | BiTransformerDecoder | None = None
        if config.decoder is not None:
            self.decoder = (
                BiTransformerDecoder(config.vocabulary, size, config.decoder)
                if config.decoder.kind == "bitransformer"
                else TransformerDecoder(config.vocabulary, size, config.decoder, config.decoder.num_blocks)
            )
        self.ctc = CTC(config.vocabulary, size, config.blank)

    @property
    def default_mode(self) -> str:
        """The decoding mode that suits this model best."""
        if self.decoder is None:
            return "ctc_prefix_beam_search"
        return "attention" if self.config.is_whisper else "attention_rescoring"

    # --- encoder and CTC ---------------------------------------------------------------------------------------------

    def encode(
        self, feats: Tensor, feats_lengths: Tensor, *, chunk_size: int = -1, left_chunks: int = -1
    ) -> tuple[Tensor, Tensor]:
        """feats (B, T, bins), feats_lengths (B,) -> (out (B, T', size), lengths (B,)).

        chunk_size: -1 full context; more than 0: a frame sees its chunk of so many encoder frames and `left_chunks`
        chunks before it (-1: all); 0: as in training, a random chunk where the model was trained so. Rows past a length
        mean nothing. Raises RecipeError for chunks that the model was not trained for.
        """
        check_chunks(self.config.encoder, chunk_size)
        out, valid = self.encoder(feats, feats_lengths, chunk_size=chunk_size, left_chunks=left_chunks)
        return out, valid.squeeze(1).sum(1)

    def stream(self, *, chunk_size: int, left_chunks: int = -1) -> EncoderStream:
        """A stream that takes features as they come and gives encoder frames chunk by chunk."""
        return EncoderStream(self.encoder, chunk_size=chunk_size, left_chunks=left_chunks)

    def live(
        self,
        *,
        chunk_size: int,
        left_chunks: int = -1,
        beam: int = 10,
        ctc_weight: float = 0.5,
        reverse_weight: float = 0.0,
        blank_penalty: float = 0.0,
        context: ContextGraph | None = None,
    ) -> LiveRecogniser:
        """A recogniser of one stream: partial results as features come, rescored at the end if there is a decoder."""
        return LiveRecogniser(
            self,
            self.stream(chunk_size=chunk_size, left_chunks=left_chunks),
            DecodeOptions(
                mode="ctc_prefix_beam_search" if self.decoder is None else "attention_rescoring",
                beam=beam,
                ctc_weight=ctc_weight,
                reverse_weight=reverse_weight,
                chunk_size=chunk_size,
                left_chunks=left_chunks,
                streaming=True,
                blank_penalty=blank_penalty,
            ),
            context,
        )

    def ctc_log_probs(self, out: Tensor, *, blank_penalty: float = 0.0) -> Tensor:
        """out (B, T', size) -> (B, T', vocabulary), natural logarithm."""
        return self.ctc.log_probs(out, blank_penalty=blank_penalty)

    # --- teacher forcing and losses ----------------------------------------------------------------------------------

    def prompt(
        self,
        batch: int,
        device: torch.device,
        languages: Sequence[str] | None = None,
        tasks: Sequence[str] | None = None,
    ) -> Tensor:
        """The tokens every transcript begins with: (B, 1) sos, or Whisper's (B, 4). Default: English, transcribe."""
        if not self.config.is_whisper:
            return sos_prompt(batch, self.config.sos, device)
        return whisper_prompt(
            self.config.special_tokens,
            languages if languages is not None else ["en"] * batch,
            tasks if tasks is not None else ["transcribe"] * batch,
            device,
        )

    def decoder_logits(self, out: Tensor, lengths: Tensor, read: TeacherForcing, *, reverse: bool = False) -> Tensor:
        """Logits of one decoder over `read.inputs` (B * n, L): out (B, T', size), lengths (B,) -> (B * n, L,
        vocabulary).

        reverse: the right-to-left decoder; `read` must be reversed then.
        """
        memory_mask = valid_mask(lengths, out.size(1)).unsqueeze(1)
        logits: Tensor = self._decoder(reverse=reverse)(out, memory_mask, read.inputs, read.lengths)
        return logits

    def loss_weights(self, target_lengths: Tensor) -> dict[str, float]:
        """What normalises this batch's losses, known before computing them: utterances, and tokens counted by
        attention.

        Sum these over all micro-batches of a step, and give the sums to `LossSums.total`.
        """
        count = int(target_lengths.numel())
        tokens = int(target_lengths.sum()) + count * self.config.target_extra
        return {"utterances": float(count), "tokens": float(tokens)}

    def loss_sums(
        self,
        feats: Tensor,
        feats_lengths: Tensor,
        target: Tensor,
        target_lengths: Tensor,
        *,
        languages: Sequence[str] | None = None,
        tasks: Sequence[str] | None = None,
        chunk_size: int | None = None,
    ) -> LossSums:
        """Un-normalised losses of one micro-batch; the arguments of `loss`."""
        config = self.config
        chunk = (0 if self.training else -1) if chunk_size is None else chunk_size
        out, lengths = self.encode(feats, feats_lengths, chunk_size=chunk)
        terms: dict[str, Term] = {}
        metrics: dict[str, tuple[Tensor, Tensor]] = {}
        if config.ctc_weight > 0.0:
            log_probs = self.ctc.log_probs(out)
            ctc = self.ctc.loss_sum(log_probs, lengths, target, target_lengths)
            terms["ctc"] = Term(sum=config.ctc_weight * ctc, per="utterances")
            count = torch.tensor(feats.size(0), device=out.device)
            metrics["ctc"] = (ctc.detach(), count)
            lost = self.ctc.unalignable(lengths, target, target_lengths)
            metrics["unalignable"] = (lost, count)
        if config.ctc_weight < 1.0:
            attention, metrics["accuracy"] = self._attention_sum(out, lengths, target, target_lengths, languages, tasks)
            per: Any = "tokens" if config.length_normalized_loss else "utterances"
            terms["attention"] = Term(sum=(1.0 - config.ctc_weight) * attention, per=per)
            weights = self.loss_weights(target_lengths)
            metrics["attention"] = (
                attention.detach(),
                torch.tensor(weights[per], device=out.device),
            )
        return LossSums(terms=terms, weights=self.loss_weights(target_lengths), metrics=metrics)

    def forward(self, *args: Any, **kwargs: Any) -> LossSums:
        """`loss_sums`: what a wrapper for distributed training calls."""
        return self.loss_sums(*args, **kwargs)

    def loss(
        self,
        feats: Tensor,
        feats_lengths: Tensor,
        target: Tensor,
        target_lengths: Tensor,
        *,
        languages: Sequence[str] | None = None,
        tasks: Sequence[str] | None = None,
        chunk_size: int | None = None,
    ) -> Losses:
        """The losses of one batch, as WeNet's model gives them: feats (B, T, bins), target (B, L) padded with -1.

        languages, tasks: per utterance, for the Whisper variant only. chunk_size: None draws a random chunk in
        training, where the model is trained so, and takes full context in evaluation (WeNet draws in both).
        """
        sums = self.loss_sums(
            feats,
            feats_lengths,
            target,
            target_lengths,
            languages=languages,
            tasks=tasks,
            chunk_size=chunk_size,
        )
        weight = self.config.ctc_weight
        parts = {k: t.sum / sums.weights[t.per] for k, t in sums.terms.items()}
        hits = sums.metrics.get("accuracy")
        return Losses(
            total=sums.total(),
            ctc=parts["ctc"] / weight if "ctc" in parts else None,
            attention=parts["attention"] / (1.0 - weight) if "attention" in parts else None,
            accuracy=None if hits is None else hits[0] / hits[1],
        )

    def _attention_sum(
        self,
        out: Tensor,
        lengths: Tensor,
        target: Tensor,
        target_lengths: Tensor,
        languages: Sequence[str] | None,
        tasks: Sequence[str] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        config = self.config
        prompt = self.prompt(out.size(0), out.device, languages, tasks)
        left = teacher_forcing(prompt, target, target_lengths, eos=config.eos)
        logits = self.decoder_logits(out, lengths, left)
        total = smoothed_divergence_sum(logits, left.outputs, config.lsm_weight)
        hits = correct(logits, left.outputs)
        if config.reverse_weight > 0.0:
            flipped = reversed_target(target, target_lengths)
            right = teacher_forcing(prompt, flipped, target_lengths, eos=config.eos)
            other = smoothed_divergence_sum(
                self.decoder_logits(out, lengths, right, reverse=True),
                right.outputs,
                config.lsm_weight,
            )
            total = total * (1.0 - config.reverse_weight) + other * config.reverse_weight
        return total, hits

    # --- decoding ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(
        self,
        feats: Tensor,
        feats_lengths: Tensor,
        *,
        languages: Sequence[str] | None = None,
        tasks: Sequence[str] | None = None,
        context: ContextGraph | None = None,
        **options: Any,
    ) -> list[Hypothesis]:
        """feats (B, T, bins) -> one hypothesis per utterance. Options: see `DecodeOptions` (mode, beam, ...).

        languages, tasks: Whisper variant. context: phrases to prefer, in the modes that search CTC prefixes. Raises
        RecipeError for an unknown mode or option, and for one that this model cannot serve.
        """
        chosen = DecodeOptions.of(**options)
        self._can_serve(chosen, context)
        out, lengths = self._encode_for(chosen, feats, feats_lengths)
        return self.decode_encoded(out, lengths, chosen, languages=languages, tasks=tasks, context=context)

    @torch.no_grad()
    def decode_encoded(
        self,
        out: Tensor,
        lengths: Tensor,
        options: DecodeOptions,
        *,
        languages: Sequence[str] | None = None,
        tasks: Sequence[str] | None = None,
        context: ContextGraph | None = None,
    ) -> list[Hypothesis]:
        """The same from encoder output (B, T', size), lengths (B,); the encoder options are not looked at."""
        config = self.config
        self._can_serve(options, context)
        prompt = self.prompt(out.size(0), out.device, languages, tasks)
        if options.mode == "attention":
            return attention_beam_search(
                self._decoder(),
                out,
                valid_mask(lengths, out.size(1)).unsqueeze(1),
                prompt,
                eos=config.eos,
                beam=options.beam,
                length_penalty=options.length_penalty,
                max_tokens=options.max_tokens,
            )
        log_probs = self.ctc.log_probs(out, blank_penalty=options.blank_penalty)
        if options.mode == "ctc_greedy_search":
            return ctc_greedy_search(log_probs, lengths, blank=config.blank)
        found = ctc_prefix_beam_search(log_probs, lengths, beam=options.beam, blank=config.blank, context=context)
        if options.mode == "ctc_prefix_beam_search":
            return found
        return self.rescore(
            found,
            out,
            lengths,
            prompt,
            ctc_weight=options.ctc_weight,
            reverse_weight=options.reverse_weight,
        )

    @torch.no_grad()
    def rescore(
        self,
        found: Sequence[Hypothesis],
        out: Tensor,
        lengths: Tensor,
        prompt: Tensor,
        *,
        ctc_weight: float,
        reverse_weight: float,
    ) -> list[Hypothesis]:
        """Order CTC's hypotheses by the decoders' scores: out (B, T', size), prompt (B, k)."""
        rows = candidates(found, out.device)
        wide = prompt.repeat_interleave(rows.width, 0)

        def scores(tokens: Tensor, *, reverse: bool) -> Tensor:
            read = teacher_forcing(wide, tokens, rows.lengths, eos=self.config.eos)
            logits = self.decoder_logits(out, lengths, read, reverse=reverse)
            return token_scores(logits, read.outputs, prompt=prompt.size(1), ignore=IGNORE)

        left = scores(rows.tokens, reverse=False)
        right = None
        if reverse_weight > 0.0:
            right = scores(reversed_target(rows.tokens, rows.lengths), reverse=True)
        return rescore(found, rows, left, right, ctc_weight=ctc_weight, reverse_weight=reverse_weight)

    def _encode_for(self, options: DecodeOptions, feats: Tensor, feats_lengths: Tensor) -> tuple[Tensor, Tensor]:
        if not options.streaming:
            return self.encode(feats, feats_lengths, chunk_size=options.chunk_size, left_chunks=options.left_chunks)
        rows: list[Tensor] = []
        for row, length in zip(feats, feats_lengths.tolist(), strict=True):
            stream = self.stream(chunk_size=options.chunk_size, left_chunks=options.left_chunks)
            parts = [stream.feed(row[None, :length]), stream.finish()]
            rows.append(torch.cat(parts, dim=1).squeeze(0))
        lengths = torch.tensor([r.size(0) for r in rows], device=feats.device)
        return nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths

    def _can_serve(self, options: DecodeOptions, context: ContextGraph | None) -> None:
        if options.mode.startswith("attention"):
            self._decoder()
        if options.reverse_weight > 0.0 and options.mode == "attention_rescoring":
            self._decoder(reverse=True)
        if context is not None and options.mode in ("attention", "ctc_greedy_search"):
            raise RecipeError(
                f"{options.mode} does not take a context",
                where="context",
                fix="use ctc_prefix_beam_search or attention_rescoring",
            )

    def _decoder(self, *, reverse: bool = False) -> TransformerDecoder:
        if self.decoder is None:
            raise RecipeError(
                "this model has no attention decoder",
                where="decoder",
                fix="use ctc_greedy_search or ctc_prefix_beam_search",
            )
        if isinstance(self.decoder, BiTransformerDecoder):
            return self.decoder.right_decoder if reverse else self.decoder.left_decoder
        if reverse:
            raise RecipeError("this model has no right-to-left decoder", where="reverse_weight", fix="set it to 0")
        return self.decoder


class LiveRecogniser:
    """One utterance as it is spoken: CTC prefixes after every chunk, the decoders' judgement at the end."""

    def __init__(
        self,
        model: U2Model,
        stream: EncoderStream,
        options: DecodeOptions,
        context: ContextGraph | None,
    ) -> None:
        model._can_serve(options, context)
        self.model, self.stream, self.options = model, stream, options
        self.search = PrefixBeamSearch(
            1,
            beam=options.beam,
            blank=model.config.blank,
            context=context,
            device=next(model.parameters()).device,
        )
        self.frames: list[Tensor] = []

    @torch.no_grad()
    def feed(self, feats: Tensor) -> Hypothesis | None:
        """feats (1, n, bins), n of any size -> the best prefix so far, or None where no chunk was completed."""
        return self._take(self.stream.feed(feats))

    @torch.no_grad()
    def finish(self) -> Hypothesis:
        """The rest of the utterance, and the final result."""
        self._take(self.stream.finish())
        found = self.search.result()
        if self.options.mode != "attention_rescoring" or not self.frames:
            return found[0]
        out = torch.cat(self.frames, dim=1)
        lengths = torch.tensor([out.size(1)], device=out.device)
        prompt = self.model.prompt(1, out.device)
        weights = {
            "ctc_weight": self.options.ctc_weight,
            "reverse_weight": self.options.reverse_weight,
        }
        return self.model.rescore(found, out, lengths, prompt, **weights)[0]

    def _take(self, out: Tensor) -> Hypothesis | None:
        if out.size(1) == 0:
            return None
        self.frames.append(out)
        log_probs = self.model.ctc_log_probs(out, blank_penalty=self.options.blank_penalty)
        self.search.advance(log_probs, torch.tensor([out.size(1)], device=out.device))
        return self.search.result()[0]


def build(config: U2Config, cmvn: CmvnStatistics | None = None) -> U2Model:
    """The network of `config` with fresh weights (torch's global generator; seed it to repeat them).

    cmvn: statistics for a model whose config names a CMVN file. Left out, those two buffers are NaN until a checkpoint,
    which holds them, is loaded.
    """
    return U2Model(config, cmvn)
