"""Whisper as Hugging Face spells it, with the surface of this project's recognisers: encode, loss_sums, decode.

The network is transformers' own; parameter names are those of a Hugging Face directory (`model.encoder...`,
`proj_out`). `Whisper` is made when first asked for, so that importing this module needs no transformers, and yet models
can be copied and pickled by name.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from thawline.core.extras import need
from thawline.errors import DataError, RecipeError
from thawline.models.decode.hypothesis import Hypothesis
from thawline.models.decode.options import near
from thawline.models.wenet.loss import Losses, LossSums, Term, correct, smoothed_divergence_sum
from thawline.models.wenet.targets import IGNORE, TeacherForcing, teacher_forcing
from thawline.models.whisper_long import Fallback, keyed
from thawline.models.whisper_names import LANGUAGES
from thawline.models.whisper_nbest import EveryBeam, every_beam


class WhisperSurface:
    """What is added to transformers' WhisperForConditionalGeneration."""

    config: Any
    generation_config: Any
    model: Any
    proj_out: nn.Module
    generate: Any
    default_mode = "attention"
    label_smoothing: float = 0.0
    """Of the training loss; set it on the instance."""

    # --- encoder -----------------------------------------------------------------------------------------------------

    def encode(
        self, feats: Tensor, feats_lengths: Tensor, *, chunk_size: int = -1, left_chunks: int = -1
    ) -> tuple[Tensor, Tensor]:
        """feats (B, T, bins) log-mel, T up to 3000, feats_lengths (B,) -> (out (B, 1500, size), lengths (B,)).

        The encoder always sees 30 s and the decoder attends to all 1500 frames, as in training; lengths count the
        frames of the utterance itself. Raises DataError past 30 s.
        """
        if chunk_size != -1 or left_chunks != -1:
            raise RecipeError(
                f"a chunk size of {chunk_size} was asked for, but Whisper knows full context only",
                where="chunk_size",
                fix="leave it out",
            )
        out = self.model.encoder(self.window(feats, feats_lengths)).last_hidden_state
        return out, (feats_lengths + 1) // 2

    def window(self, feats: Tensor, feats_lengths: Tensor) -> Tensor:
        """(B, T, bins) -> (B, bins, 3000): frames past a length become the log-mel of silence."""
        window = 2 * int(self.config.max_source_positions)
        if feats.size(1) > window:
            if int(feats_lengths.max()) > window:
                raise DataError(
                    f"{int(feats_lengths.max())} frames, but Whisper's window is {window} (30 s)",
                    fix="cut the audio into windows of at most 30 s",
                )
            feats = feats[:, :window]
        valid = torch.arange(window, device=feats.device) < feats_lengths.unsqueeze(1)
        if feats.size(1) < window:
            feats = nn.functional.pad(feats, (0, 0, 0, window - feats.size(1)))
        if not bool(valid.all()):
            # Whisper's features are max(log10 power, peak - 8) / 4 + 1; silence is 1e-10 before that.
            peak = feats.masked_fill(~valid.unsqueeze(2), -torch.inf).amax((1, 2), keepdim=True)
            silence = (peak - 2.0).clamp(min=-1.5)
            feats = torch.where(valid.unsqueeze(2), feats, silence)
        return feats.transpose(1, 2).to(next(iter(self.model.encoder.parameters())).dtype)

    # --- teacher forcing and losses ----------------------------------------------------------------------------------

    @property
    def is_multilingual(self) -> bool:
        """English-only models have neither language nor task tokens."""
        return bool(getattr(self.generation_config, "is_multilingual", False))

    def prompt(
        self,
        batch: int,
        device: torch.device,
        languages: Sequence[str] | None = None,
        tasks: Sequence[str] | None = None,
    ) -> Tensor:
        """What every transcript without timestamps begins with: (B, 4), or (B, 2) for English-only models.

        Raises DataError for a language or task that this model does not know. Default: English, transcribe.
        """
        self._refuse_without_special_tokens()
        generation = self.generation_config
        start, plain = generation.decoder_start_token_id, generation.no_timestamps_token_id
        if not self.is_multilingual:
            return torch.tensor([[start, plain]], device=device).expand(batch, -1)
        rows = []
        for language, task in zip(
            languages if languages is not None else ["en"] * batch,
            tasks if tasks is not None else ["transcribe"] * batch,
            strict=True,
        ):
            token = f"<|{language}|>"
            if token not in generation.lang_to_id:
                raise DataError(f"unknown language {language!r}", fix=near(language, list(LANGUAGES)))
            if task not in generation.task_to_id:
                raise DataError(f"unknown task {task!r}", fix=near(task, list(generation.task_to_id)))
            rows.append([start, generation.lang_to_id[token], generation.task_to_id[task], plain])
        return torch.tensor(rows, dtype=torch.long, device=device)

    def _refuse_without_special_tokens(self) -> None:
        if getattr(self.generation_config, "no_timestamps_token_id", None) is None:
            raise RecipeError(
                f"the special tokens of this vocabulary of {self.config.vocab_size} are not known, so there is nothing "
                "to begin a transcript with",
                where="generation_config.json",
                fix="give the Hugging Face directory of this model, whose generation_config.json says them",
            )

    def teacher_forcing(
        self,
        target: Tensor,
        target_lengths: Tensor,
        languages: Sequence[str] | None = None,
        tasks: Sequence[str] | None = None,
    ) -> TeacherForcing:
        """target (B, L) text tokens -> prompt + text in, text + end out; the prompt itself is not scored."""
        prompt = self.prompt(target.size(0), target.device, languages, tasks)
        read = teacher_forcing(prompt, target, target_lengths, eos=int(self.generation_config.eos_token_id))
        outputs = read.outputs.clone()
        outputs[:, : prompt.size(1) - 1] = IGNORE
        if read.inputs.size(1) > self.config.max_target_positions:
            raise DataError(
                f"{read.inputs.size(1)} tokens with the prompt, but Whisper's decoder has "
                f"{self.config.max_target_positions} positions",
                fix="shorten the texts (token_max_length)",
            )
        return TeacherForcing(read.inputs, outputs, read.lengths)

    def loss_weights(self, target_lengths: Tensor) -> dict[str, float]:
        """What normalises this batch's loss, known before computing it; tokens include each end of text."""
        count = int(target_lengths.numel())
        return {"utterances": float(count), "tokens": float(int(target_lengths.sum()) + count)}

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
        """Un-normalised cross entropy of one micro-batch: target (B, L) text tokens padded with -1.

        SpecAugment inside the model follows config.json's `apply_spec_augment` (off by default) and draws from numpy's
        global generator.
        """
        if chunk_size is not None and chunk_size > 0:
            raise RecipeError("Whisper knows full context only", where="chunk_size", fix="leave it out")
        read = self.teacher_forcing(target, target_lengths, languages, tasks)
        hidden = self.model(
            self.window(feats, feats_lengths), decoder_input_ids=read.inputs, use_cache=False
        ).last_hidden_state
        logits = self.proj_out(hidden)
        total = smoothed_divergence_sum(logits, read.outputs, self.label_smoothing)
        weights = self.loss_weights(target_lengths)
        count = torch.tensor(weights["tokens"], device=logits.device)
        return LossSums(
            terms={"attention": Term(sum=total, per="tokens")},
            weights=weights,
            metrics={
                "attention": (total.detach(), count),
                "accuracy": correct(logits, read.outputs),
            },
        )

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
        """The mean cross entropy per token of one batch (and the same as `.attention`; there is no `.ctc`)."""
        sums = self.loss_sums(
            feats,
            feats_lengths,
            target,
            target_lengths,
            languages=languages,
            tasks=tasks,
            chunk_size=chunk_size,
        )
        total = sums.total()
        hits, count = sums.metrics["accuracy"]
        return Losses(total=total, ctc=None, attention=total, accuracy=hits / count)

    # --- decoding ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(
        self,
        feats: Tensor,
        feats_lengths: Tensor,
        *,
        mode: str = "attention",
        beam: int = 1,
        languages: Sequence[str] | None = None,
        tasks: Sequence[str] | None = None,
        prompt_tokens: Tensor | None = None,
        timestamps: bool = False,
        max_tokens: int | None = None,
        length_penalty: float = 1.0,
        fallback: Fallback | None = None,
        **unknown: Any,
    ) -> list[Hypothesis]:
        """feats (B, T, bins) of at most 30 s -> one hypothesis per utterance, through transformers' `generate`.

        beam 1 is greedy. languages None: each is detected; tasks: one for the whole batch. prompt_tokens: text that
        came before, as tokens. With timestamps the tokens contain Whisper's time tokens. score: ln probability of the
        tokens and the end under the model itself, before tokens are suppressed. Suppressed tokens are those of
        generation_config.json. fallback: see there; what is taken for silence then has no tokens.

        nbest: with a beam, all that the search kept, in its order; nbest_scores are then what it goes by, transformers'
        `sequences_scores`: ln probability / tokens ** length_penalty, the end counted. Without a beam, and with a
        fallback (whose answer may be drawn), the one hypothesis and its score.
        """
        known = [
            "mode", "beam", "languages", "tasks", "prompt_tokens", "timestamps", "max_tokens", "length_penalty",
            "fallback",
        ]  # fmt: skip
        for name in unknown:
            raise RecipeError(f"unknown decoding option {name!r}", where="decode", fix=near(name, known))
        if mode != "attention":
            raise RecipeError(
                f"Whisper is decoded by its decoder alone, not by {mode!r}", where="mode", fix="use attention"
            )
        settings = self.search_settings(beam, length_penalty) | {"return_timestamps": timestamps}
        if self.is_multilingual:
            self.prompt(feats.size(0), feats.device, languages, tasks)  # refuses unknown names
            kinds = set(tasks or ("transcribe",))
            if len(kinds) > 1:
                raise RecipeError(
                    f"one task per batch, not {', '.join(sorted(kinds))}", where="tasks", fix="split the batch"
                )
            settings |= {"task": kinds.pop(), "language": None if languages is None else list(languages)}
        if prompt_tokens is not None:
            settings["prompt_ids"] = prompt_tokens
        if max_tokens is not None:
            settings["max_new_tokens"] = max_tokens
        window = self.window(feats, feats_lengths)
        with self.generating():
            memory = self.model.encoder(window)
            if fallback is not None:
                return self._hypotheses(memory.last_hidden_state, self._decided(window, settings, fallback))
            mask = torch.ones(window.size(0), window.size(2), dtype=torch.long, device=window.device)
            search = partial(self.generate, attention_mask=mask, force_unique_generate_call=True, **settings)
            if beam == 1:
                return self._hypotheses(memory.last_hidden_state, search(encoder_outputs=memory))
            with every_beam(self) as beams:
                ids = search(encoder_outputs=memory)
            return self._with_runners_up(memory.last_hidden_state, ids, beams[0], length_penalty)

    def _with_runners_up(self, memory: Tensor, ids: Tensor, beams: Tensor, length_penalty: float) -> list[Hypothesis]:
        """ids of the best as transformers' Whisper gives them, beams (B, beams, prompt + text + padding) of its search,
        best first -> the best, with all of them."""
        # One rank at a time: the probabilities of all would need beams times the memory. What the decoder makes of the
        # sound is half the work of a pass, and the same for all.
        seen = need("transformers", extra="hf").DynamicCache()
        best = self._hypotheses(memory, ids, seen)
        ranks = [self._hypotheses(memory, beams[:, rank], seen) for rank in range(1, beams.size(1))]
        end = int(self.generation_config.eos_token_id)
        out: list[Hypothesis] = []
        for row, (first, *others) in enumerate(zip(best, *ranks, strict=True)):
            kept = (first, *others)
            ended = [(beams[row, rank, 1:] == end).any().item() for rank in range(len(kept))]
            lengths = [max(len(h.tokens) + int(over), 1) for h, over in zip(kept, ended, strict=True)]
            scores = tuple(h.score / n**length_penalty for h, n in zip(kept, lengths, strict=True))
            out.append(replace(first, nbest=tuple(h.tokens for h in kept), nbest_scores=scores))
        return out

    def _decided(self, window: Tensor, settings: dict[str, Any], fallback: Fallback) -> Tensor:
        """Prompt, tokens and end of each row of window (B, bins, 3000). One row at a time: what is drawn for one may
        not depend on the others."""
        languages = settings.pop("language", None)
        if self.is_multilingual and languages is None:
            frames = torch.full((window.size(0),), window.size(2), device=window.device)
            languages = self.language(window.transpose(1, 2), frames)
        before = settings.get("prompt_ids", torch.zeros(0, dtype=torch.long)).to(window.device)
        prompt = self.prompt(window.size(0), window.device, languages, [settings.get("task", "")] * window.size(0))
        end = torch.tensor([int(self.generation_config.eos_token_id)], device=window.device)
        rows: list[Tensor] = []
        for n in range(window.size(0)):
            named = {} if languages is None else {"language": languages[n]}
            with keyed(window.device):
                found = self.generate(
                    window[n : n + 1],
                    attention_mask=torch.ones_like(window[n : n + 1, 0], dtype=torch.long),
                    return_segments=True,  # a window of silence has none; a single call of `generate` would fail on it
                    **settings,
                    **named,
                    **fallback.settings(),
                )
            said = [segment["tokens"].to(window.device) for segment in found["segments"][0]]
            marks = prompt[n, :-1] if settings["return_timestamps"] else prompt[n]
            row = torch.cat([before, marks, *said, end])
            rows.append(row[: int(self.config.max_target_positions)])  # a text as long as that has not ended
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=int(end))

    def search_settings(self, beam: int, length_penalty: float) -> dict[str, Any]:
        """What transformers' `generate` is told of the search. Raises RecipeError for one that keeps nothing."""
        if beam < 1:
            raise RecipeError(f"a beam of {beam} keeps nothing", where="beam", fix="use 1 or more")
        self._refuse_without_special_tokens()
        if beam == 1:
            return {"num_beams": 1}
        # Stop once `beam` hypotheses have ended, as OpenAI does; the default goes on to 448 tokens for one that never
        # ends.
        return {"num_beams": beam, "length_penalty": length_penalty, "early_stopping": True}

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Eval mode, and without a warning that transformers' Whisper provokes in transformers' own `generate`."""
        network: Any = self
        was_training = bool(network.training)
        network.eval()
        logger = logging.getLogger("transformers.generation.utils")
        logger.addFilter(_not_about_itself)
        try:
            yield
        finally:
            logger.removeFilter(_not_about_itself)
            network.train(was_training)

    @torch.no_grad()
    def language(self, feats: Tensor, feats_lengths: Tensor) -> list[str]:
        """feats (B, T, bins) -> the language of each utterance's first 30 s by the model's own judgement."""
        self._refuse_without_special_tokens()
        if not self.is_multilingual:
            return ["en"] * feats.size(0)
        window = 2 * int(self.config.max_source_positions)
        with self.generating():
            memory = self.model.encoder(self.window(feats[:, :window], feats_lengths.clamp(max=window)))
            start = int(self.generation_config.decoder_start_token_id)
            hidden = self.model.decoder(
                input_ids=torch.full((feats.size(0), 1), start, device=feats.device),
                encoder_hidden_states=memory.last_hidden_state,
                use_cache=False,
            ).last_hidden_state
            known = {int(i): name.strip("<|>") for name, i in self.generation_config.lang_to_id.items()}
            ids = sorted(known)
            best = self.proj_out(hidden)[:, 0, ids].argmax(-1).tolist()
        return [known[ids[i]] for i in best]

    def _hypotheses(self, memory: Tensor, ids: Tensor, seen: Any = None) -> list[Hypothesis]:
        """memory (B, 1500, size) of the encoder, ids (B, prompt + text + padding) -> scored hypotheses.

        seen: a cache of transformers' for the decoder's keys and values of `memory`, filled by the first call with it
        """
        generation = self.generation_config
        end, start = int(generation.eos_token_id), int(generation.decoder_start_token_id)
        first_time = int(generation.no_timestamps_token_id) + 1
        hidden = self.model.decoder(
            input_ids=ids[:, :-1].clamp(max=self.config.vocab_size - 1),
            encoder_hidden_states=memory,
            use_cache=seen is not None,
            past_key_values=None if seen is None else _with_no_text(seen),
        ).last_hidden_state
        logp = self.proj_out(hidden).float().log_softmax(-1)
        chosen = logp.gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1).double().cpu()
        out: list[Hypothesis] = []
        for row, values in zip(ids.tolist(), chosen, strict=True):
            # Special tokens lie above the end of text, time tokens above "no timestamps". The last start opens the
            # prompt.
            begin = len(row) - 1 - row[::-1].index(start) if start in row else 0
            while begin < len(row) and end < row[begin] < first_time:
                begin += 1
            stop = row.index(end, begin) if end in row[begin:] else len(row)
            tokens = tuple(row[begin:stop])
            score = float(values[max(begin - 1, 0) : min(stop, len(row) - 1)].sum())
            out.append(
                Hypothesis(
                    tokens=tokens,
                    score=score,
                    nbest=(tokens,),
                    nbest_scores=(score,),
                    confidence=float(torch.tensor(score / (len(tokens) + 1)).exp()),
                    tokens_confidence=tuple(values[max(begin - 1, 0) : stop - 1].exp().tolist()),
                )
            )
        return out


def _with_no_text(seen: Any) -> Any:
    """A decoder's cache that holds, of what it has read, the sound alone."""
    transformers = need("transformers", extra="hf")
    return transformers.EncoderDecoderCache(transformers.DynamicCache(), seen)


def _not_about_itself(record: logging.LogRecord) -> bool:
    """Drops transformers' warning about arguments that its own Whisper passes on beside a generation config."""
    return "Passing `generation_config` together with" not in record.getMessage()


@functools.cache
def _whisper_class() -> type[nn.Module]:
    transformers = need("transformers", extra="hf")
    network = transformers.WhisperForConditionalGeneration
    search = type("EveryBeam", (EveryBeam, transformers.GenerationMixin), {})
    body = {
        "__module__": __name__,
        "__qualname__": "Whisper",
        "__doc__": "transformers' WhisperForConditionalGeneration with this project's surface.",
    }
    made: type[nn.Module] = type("Whisper", (WhisperSurface, network, search), body)
    return made


def __getattr__(name: str) -> Any:
    """`Whisper`, made on first use (PEP 562)."""
    if name == "Whisper":
        return _whisper_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def build(config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> nn.Module:
    """The network of a config.json (and generation_config.json) as plain data, with fresh weights; its class is
    `Whisper`.

    Raises RecipeError where the config is another model's.
    """
    if config.get("model_type") != "whisper":
        raise RecipeError(
            f"model_type {config.get('model_type')!r} is not whisper",
            where="config.json: model_type",
            fix="give a Whisper directory",
        )
    transformers = need("transformers", extra="hf")
    settings = transformers.WhisperConfig.from_dict(dict(config))
    network: Any = _whisper_class()(settings)
    if generation is not None:
        network.generation_config = transformers.GenerationConfig.from_dict(dict(generation))
    elif settings.vocab_size >= 51865:
        # transformers' default ends English-only texts; in the multilingual vocabulary the end is one further on.
        network.generation_config.begin_suppress_tokens = [220, 50257]
    made: nn.Module = network.eval()
    return made
