"""Every golden case of WeNet: names, encoder, CTC, decoders, losses, gradients, streaming. Tolerances: the fixtures'
README."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from thawline.errors import DataError, RecipeError
from thawline.models.wenet.masks import valid_mask
from thawline.models.wenet.targets import reversed_target, teacher_forcing


def test_names_shapes_dtypes_and_order_are_wenets(case: Any) -> None:
    ours = {k: [list(v.shape), str(v.dtype).removeprefix("torch.")] for k, v in case.empty().state_dict().items()}
    theirs = case.json("meta.json")["state_dict"]
    assert ours == theirs
    assert list(ours) == list(theirs)


def test_wenets_file_loads_strictly_and_saves_the_same_tensors(case: Any) -> None:
    file = torch.load(case.folder / "final.pt", weights_only=True)
    ours = case.model().state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in file.items())


def test_positional_tables_and_cmvn_are_computed_bit_for_bit(case: Any) -> None:
    file = torch.load(case.folder / "final.pt", weights_only=True)
    fresh = dict(case.empty().named_buffers())
    assert all(torch.equal(fresh[n], file[n]) for n in fresh if n.endswith((".pe", "cmvn.mean", "cmvn.istd")))


def test_encoder_ctc_and_lengths(case: Any) -> None:
    io, model = case.io, case.model()
    with torch.no_grad():
        out, lengths = model.encode(io["feats"], io["feats_lengths"])
        logp = model.ctc_log_probs(out)
    valid = valid_mask(lengths, out.size(1))
    assert torch.equal(lengths, io["encoder_out_lens"])
    assert torch.equal(valid, io["encoder_mask"].squeeze(1).bool())
    torch.testing.assert_close(out[valid], io["encoder_out"][valid], atol=2e-5, rtol=0)
    torch.testing.assert_close(logp[valid], io["ctc_log_probs"][valid], atol=5e-5, rtol=0)


def test_teacher_forcing_and_decoder_logits(case: Any) -> None:
    io, model = case.io, case.model()
    target, target_lengths = io["target"], io["target_lengths"]
    prompt = model.prompt(target.size(0), target.device, **case.words)
    left = teacher_forcing(prompt, target, target_lengths, eos=case.config.eos)
    assert torch.equal(left.inputs, io["ys_in"])
    assert torch.equal(left.outputs, io["ys_out"])
    assert torch.equal(left.lengths, io["ys_in_lens"])
    out, lengths = io["encoder_out"], io["encoder_out_lens"]
    with torch.no_grad():
        logits = model.decoder_logits(out, lengths, left)
    torch.testing.assert_close(logits, io["decoder_logits"], atol=5e-5, rtol=0)


def test_right_to_left_decoder_logits(chunk_case: Any) -> None:
    io, model = chunk_case.io, chunk_case.model()
    flipped = reversed_target(io["target"], io["target_lengths"])
    prompt = model.prompt(flipped.size(0), flipped.device)
    right = teacher_forcing(prompt, flipped, io["target_lengths"], eos=chunk_case.config.eos)
    assert torch.equal(right.inputs, io["r_ys_in"])
    assert torch.equal(right.outputs, io["r_ys_out"])
    with torch.no_grad():
        logits = model.decoder_logits(io["encoder_out"], io["encoder_out_lens"], right, reverse=True)
    torch.testing.assert_close(logits, io["r_decoder_logits"], atol=5e-5, rtol=0)


def batch(io: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return io["feats"], io["feats_lengths"], io["target"], io["target_lengths"]


def test_losses_with_full_context(case: Any) -> None:
    io = case.io
    with torch.no_grad():
        loss = case.model().loss(*batch(io), **case.words)
    for ours, name in (
        (loss.total, "full_loss"),
        (loss.ctc, "full_loss_ctc"),
        (loss.attention, "full_loss_att"),
        (loss.accuracy, "full_acc"),
    ):
        torch.testing.assert_close(ours, io[name], atol=0, rtol=1e-5)


def test_the_random_chunk_of_training_is_the_one_wenet_draws(chunk_case: Any) -> None:
    io, model = chunk_case.io, chunk_case.model()
    torch.manual_seed(chunk_case.json("meta.json")["loss_rng_seed"])
    with torch.no_grad():
        loss = model.loss(*batch(io), chunk_size=0)
    torch.testing.assert_close(loss.total, io["loss"], atol=0, rtol=1e-5)
    torch.testing.assert_close(loss.ctc, io["loss_ctc"], atol=0, rtol=1e-5)
    torch.testing.assert_close(loss.attention, io["loss_att"], atol=0, rtol=1e-5)
    torch.testing.assert_close(loss.accuracy, io["acc"], atol=0, rtol=1e-5)


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def assert_gradients(model: nn.Module, golden: dict[str, Any]) -> None:
    named = dict(model.named_parameters(remove_duplicate=False))
    for name, norm in golden["grad_norm"].items():
        gradient = named[name].grad
        if norm is None:
            assert gradient is None, name
        else:
            assert gradient is not None, name
            expected = pytest.approx(norm, rel=1e-4, abs=1e-5 if norm < 1e-4 else 0)
            assert float(gradient.norm()) == expected, name


def test_gradients_and_batchnorm_statistics(gradient_case: Any) -> None:
    io, golden = gradient_case.io, gradient_case.json("grad.json")
    model = without_dropout(gradient_case.model())
    loss = model.loss(*batch(io), chunk_size=-1, **gradient_case.words)
    loss.total.backward()
    assert_gradients(model, golden)
    buffers = dict(model.named_buffers())
    for name, values in golden["buffers_after_one_forward"].items():
        expected = torch.tensor(values, dtype=buffers[name].dtype).reshape(buffers[name].shape)
        torch.testing.assert_close(buffers[name], expected, rtol=1e-5, atol=1e-6)


def test_gradients_are_the_same_when_activations_are_recomputed(gradient_case: Any) -> None:
    io, golden = gradient_case.io, gradient_case.json("grad.json")
    model = without_dropout(gradient_case.model())
    model.encoder.gradient_checkpointing = True
    loss = model.loss(*batch(io), chunk_size=-1, **gradient_case.words)
    loss.total.backward()
    assert_gradients(model, golden)
    buffers = dict(model.named_buffers())
    for name, values in golden["buffers_after_one_forward"].items():  # once, not twice
        expected = torch.tensor(values, dtype=buffers[name].dtype).reshape(buffers[name].shape)
        torch.testing.assert_close(buffers[name], expected, rtol=1e-5, atol=1e-6)


def test_gradients_with_the_encoder_frozen(gradient_case: Any) -> None:
    io, golden = gradient_case.io, gradient_case.json("grad.json")["encoder_frozen"]
    model = without_dropout(gradient_case.model())
    model.encoder.requires_grad_(False)
    model.loss(*batch(io), chunk_size=-1, **gradient_case.words).total.backward()
    assert_gradients(model, golden)


def chunk_settings(names: Any, suffix: str) -> list[tuple[int, int, str]]:
    found = (re.fullmatch(rf"chunk(\d+)_left(-?\d+)\.{suffix}", n) for n in names)
    return [(int(m[1]), int(m[2]), m[0]) for m in found if m]


def test_chunk_masks(chunk_case: Any) -> None:
    io, model = chunk_case.io, chunk_case.model()
    settings = chunk_settings(io, r"masked\.encoder_out")
    assert settings
    for chunk, left, name in settings:
        with torch.no_grad():
            out, lengths = model.encode(io["feats"], io["feats_lengths"], chunk_size=chunk, left_chunks=left)
        valid = valid_mask(lengths, out.size(1))
        torch.testing.assert_close(out[valid], io[name][valid], atol=2e-5, rtol=0)


def test_streaming_in_uneven_pieces_equals_wenets_chunk_by_chunk(chunk_case: Any) -> None:
    io, model = chunk_case.io, chunk_case.model()
    settings = chunk_settings([n.rsplit(".", 1)[0] for n in io if ".stream." in n], "stream")
    assert settings
    for chunk, left, name in sorted(set(settings)):
        for i, frames in enumerate(io["feats_lengths"].tolist()):
            stream = model.stream(chunk_size=chunk, left_chunks=left)
            pieces = io["feats"][i : i + 1, :frames].split(7, dim=1)
            out = torch.cat([*(stream.feed(p) for p in pieces), stream.finish()], dim=1)
            torch.testing.assert_close(out, io[f"{name}.utt{i}"], atol=2e-5, rtol=0)


def test_micro_batches_sum_to_the_loss_of_the_whole(case: Any) -> None:
    """Exact up to the rounding of sums, in float64, where the pieces keep the width of the padded batch.

    Pieces cut to their own longest utterance are exact, too, but for two kinds: WeNet's symmetrical convolutions see
    the bias of the layer before them in padding and zeros past it, and Whisper's see one frame past an utterance's end.
    """
    io, model = case.io, case.model().double()
    feats, frames, target, tokens = batch(io)
    feats = feats.double()
    encoder = case.config.encoder
    may_cut = encoder.causal or (encoder.kind == "transformer" and not case.config.is_whisper)
    whole = model.loss(feats, frames, target, tokens, **case.words)
    whole.total.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    pieces = [slice(0, 2), slice(2, 3)]
    weights = {"utterances": 0.0, "tokens": 0.0}
    for piece in pieces:
        for name, value in model.loss_weights(tokens[piece]).items():
            weights[name] += value
    total = 0.0
    for piece in pieces:
        words = {k: v[piece] for k, v in case.words.items()}
        longest = int(frames[piece].max()) if may_cut else feats.size(1)
        most = int(tokens[piece].max())
        sums = model.loss_sums(feats[piece, :longest], frames[piece], target[piece, :most], tokens[piece], **words)
        part = sums.total(weights)
        part.backward()
        total += part.item()
    assert total == pytest.approx(whole.total.item(), rel=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-9, atol=1e-12)


def test_copies_and_pickles_give_the_same_numbers_and_keep_weights_tied(case: Any) -> None:
    io, model = case.io, case.model()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            ours, _ = model.encode(io["feats"], io["feats_lengths"])
            theirs, _ = twin.encode(io["feats"], io["feats_lengths"])
        assert torch.equal(ours, theirs)
        assert len(list(twin.parameters())) == len(list(model.parameters()))


def test_chunks_are_refused_where_wenet_would_ignore_them(wenet_case: Any) -> None:
    case = wenet_case("u2_conformer")
    with pytest.raises(RecipeError, match="knows full context only"):
        case.model().encode(case.io["feats"], case.io["feats_lengths"], chunk_size=4)
    with pytest.raises(RecipeError, match="knows full context only"):
        case.model().stream(chunk_size=4)


def test_an_utterance_too_short_for_one_frame_is_named(wenet_case: Any) -> None:
    model = wenet_case("transformer").model()
    with pytest.raises(DataError, match="6 frames are too few: one encoder frame needs 7"):
        model.encode(torch.zeros(1, 6, 80), torch.tensor([6]))


def test_positions_go_on_past_the_stored_table(wenet_case: Any) -> None:
    model = wenet_case("transformer").model()
    table = model.encoder.embed.pos_enc
    past = table.rows(4990, 20)
    assert torch.equal(past[:, :10], table.pe[:, 4990:])
    assert bool(past.isfinite().all())
    assert not torch.equal(past[:, 9], past[:, 10])


def test_whisper_ends_with_its_table(wenet_case: Any) -> None:
    model = wenet_case("whisper").model()
    with pytest.raises(DataError, match="Whisper's positions end at 1500"):
        model.encode(torch.zeros(1, 3002, 80), torch.tensor([3002]))


@pytest.mark.parametrize("way", ["autocast", "weights"])
def test_bfloat16_stays_near_float32(case: Any, way: str) -> None:
    """Eight bits of mantissa over a few layers: losses within 3 percent."""
    io, model = case.io, case.model()
    feats = io["feats"]
    if way == "weights":
        model, feats = model.to(torch.bfloat16), feats.to(torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        loss = model.loss(feats, *batch(io)[1:], **case.words)
    assert loss.total.dtype == torch.float32
    assert float(loss.total) == pytest.approx(float(io["full_loss"]), rel=0.03)


def test_targets_that_ctc_cannot_align_are_counted(wenet_case: Any) -> None:
    case = wenet_case("transformer")
    model, feats, lengths = case.model(), torch.randn(3, 31, 80), torch.tensor([31, 31, 31])
    assert case.config.encoder_frames(31) == 7
    target = torch.tensor([[3, 4, 5, 6, 7, 8, 9], [3, 3, 4, 5, 6, 7, 8], [3, 3, 4, 5, 6, 7, -1]])
    counts = torch.tensor([7, 7, 6])
    lost, utterances = model.loss_sums(feats, lengths, target, counts).metrics["unalignable"]
    assert (int(lost), int(utterances)) == (1, 3)
    told = [case.config.can_align(31, row[:n].tolist()) for row, n in zip(target, counts.tolist(), strict=True)]
    assert told == [True, False, True]


def test_empty_targets_give_a_finite_loss_and_finite_gradients(wenet_case: Any) -> None:
    case = wenet_case("u2pp_conformer")
    io, model = case.io, case.model().train()
    empty = torch.full((3, 1), -1)
    loss = model(io["feats"], io["feats_lengths"], empty, torch.zeros(3, dtype=torch.long)).total()
    loss.backward()
    assert bool(loss.isfinite())
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
