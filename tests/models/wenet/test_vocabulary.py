"""Other units: what is kept, what is new, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from thawline.errors import RecipeError
from thawline.models.wenet.config import read_config
from thawline.models.wenet.model import build
from thawline.models.wenet.vocabulary import resize_vocabulary_, resized_values

MAPPING = {0: 0, 1: 1, 2: 7, 10: 3, 11: 2, 40: 5}  # sos/eos moves from 2 to 7
TENSORS = {
    "ctc.ctc_lo.weight",
    "ctc.ctc_lo.bias",
    *(
        f"decoder.{side}_decoder.{part}"
        for side in ("left", "right")
        for part in ("embed.0.weight", "output_layer.weight", "output_layer.bias")
    ),
}


def test_shared_rows_are_kept_bit_for_bit_and_new_ones_are_named(wenet_case: Any) -> None:
    model = wenet_case("u2pp_conformer").model()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    change = resize_vocabulary_(model, MAPPING, 8, key=7)
    after = model.state_dict()
    assert set(change.tensors) == TENSORS
    assert change.new == (4, 6)
    assert change.kept == ((0, 0), (1, 1), (11, 2), (10, 3), (40, 5), (2, 7))
    assert len(change.dropped) == 50 - 6
    for name, tensor in before.items():
        if name in TENSORS:
            assert after[name].shape == (8, *tensor.shape[1:])
            assert all(torch.equal(after[name][new], tensor[old]) for old, new in MAPPING.items())
            assert bool(after[name].isfinite().all())
        else:
            assert torch.equal(after[name], tensor)
    assert (model.config.blank, model.config.sos, model.config.eos) == (0, 7, 7)


def test_new_rows_depend_on_key_tensor_and_id_alone(wenet_case: Any) -> None:
    case = wenet_case("u2pp_conformer")
    one, two, other, more = (case.model() for _ in range(4))
    torch.manual_seed(1)
    resize_vocabulary_(one, MAPPING, 8, key=7)
    torch.manual_seed(2)
    resize_vocabulary_(two, MAPPING, 8, key=7)
    resize_vocabulary_(other, MAPPING, 8, key=8)
    resize_vocabulary_(more, MAPPING, 12, key=7)
    for name in TENSORS:
        rows = one.state_dict()[name]
        assert torch.equal(rows, two.state_dict()[name])
        assert torch.equal(rows, more.state_dict()[name][:8])
        if rows.ndim == 2:
            assert not torch.equal(rows[4], other.state_dict()[name][4])
            assert not torch.equal(rows[4], rows[6])


def test_the_changed_model_trains_decodes_and_is_described_by_the_changed_values(wenet_case: Any) -> None:
    case = wenet_case("u2pp_conformer")
    model = case.model()
    change = resize_vocabulary_(model, MAPPING, 8, key=7)
    values = resized_values(case.values, change)
    again = build(read_config(values))
    again.load_state_dict(model.state_dict(), strict=True)
    assert again.config == model.config
    io = case.io
    target = io["target"] % 3
    target[io["target"] < 0] = -1
    loss = model.loss(io["feats"], io["feats_lengths"], target + (target == 0), io["target_lengths"])
    loss.total.backward()
    assert bool(loss.total.isfinite())
    found = model.decode(io["feats"], io["feats_lengths"], mode="attention_rescoring", beam=3, reverse_weight=0.3)
    assert all(t < 8 for h in found for t in h.tokens)


def test_tied_weights_stay_tied() -> None:
    values = {
        "input_dim": 80,
        "output_dim": 10,
        "encoder": "transformer",
        "encoder_conf": {"output_size": 8, "attention_heads": 2, "num_blocks": 1, "linear_units": 8},
        "decoder": "transformer",
        "decoder_conf": {"attention_heads": 2, "num_blocks": 1, "linear_units": 8, "tie_word_embedding": True},
    }
    model = build(read_config(values))
    change = resize_vocabulary_(model, {0: 0, 9: 4}, 5, key=1)
    assert model.decoder.output_layer.weight is model.decoder.embed[0].weight
    assert change.new == (1, 2, 3)
    assert resized_values(values, change)["tokenizer_conf"]["special_tokens"] == {"<sos>": 4, "<eos>": 4}


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({0: 0, 1: 1}, "no sos"),
        ({1: 1, 2: 2}, "no blank"),
        ({0: 0, 2: 2, 50: 3}, "old id 50 is outside the vocabulary of 50"),
        ({0: 0, 2: 8}, "new id 8 is outside the vocabulary of 8"),
        ({0: 0, 2: 2, 3: 2}, "old ids 2 and 3 both go to 2"),
    ],
)
def test_mappings_that_lose_or_confuse_tokens_are_refused(wenet_case: Any, mapping: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        resize_vocabulary_(wenet_case("u2pp_conformer").model(), mapping, 8, key=1)


def test_whispers_vocabulary_belongs_to_its_tokenizer(wenet_case: Any) -> None:
    with pytest.raises(RecipeError, match="Whisper's vocabulary cannot be changed"):
        resize_vocabulary_(wenet_case("whisper").model(), {0: 0}, 8, key=1)
