"""Resolution: every tensor with its decision, the rule behind it, and what is refused."""

from __future__ import annotations

import gc
import json
import time

import pytest
from torch import nn

from thawline.core.index import ModelIndex, ParamInfo
from thawline.errors import RecipeError, SelectorError
from thawline.freeze.inspect import index_of
from thawline.freeze.memory import estimate
from thawline.freeze.plan import FreezePlan
from thawline.freeze.resolve import DEFAULT_RULE, Resolution, diff, resolve, resolve_all


def conv_net() -> nn.Sequential:
    block = [
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
    ]
    return nn.Sequential(*block, nn.Linear(4, 2))


class Tied(nn.Module):
    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=bias)
        self.head.weight = self.embed.weight


CONV = index_of(conv_net())


def test_every_parameter_and_buffer_has_a_decision_and_its_rule():
    r = resolve(FreezePlan(train=["[1]", "!**.bias"]), CONV)
    assert len(r.decisions) == len(CONV)
    assert r.trainable_names == ("1.0.weight", "1.1.weight")
    assert r["1.0.bias"].rule == "train[1] !**.bias"
    assert r["1.0.bias"].overridden == ("train[0] [1]",)
    assert r["0.0.weight"].rule == DEFAULT_RULE
    assert r["1.1.running_mean"].trains
    assert not r["0.1.running_mean"].trains


def test_the_last_rule_wins_and_the_override_is_reported():
    r = resolve(FreezePlan(train=["**", "![0]", "[0][0].weight"]), CONV)
    assert "0.0.weight" in r.trainable_names
    assert "0.0.bias" not in r.trainable_names
    assert [(o.winner, o.loser, o.tensors) for o in r.overrides] == [
        ("train[1] ![0]", "train[0] **", 6),
        ("train[2] [0][0].weight", "train[1] ![0]", 1),
    ]


def test_wholly_frozen_modules_are_pinned_with_their_dropout_and_mixed_ones_are_not():
    assert resolve(FreezePlan(train="[2]"), CONV).pinned == ("0", "0.0", "0.1", "0.2", "1", "1.0", "1.1")
    assert resolve(FreezePlan(train=["[2]", "[0][0]"]), CONV).pinned == ("0.1", "1", "1.0", "1.1")


def test_a_norm_whose_scale_trains_but_whose_statistics_are_not_named_is_pinned():
    r = resolve(FreezePlan(train="@bias"), CONV)
    assert "0.1.bias" in r.trainable_names
    assert "0.1" in r.pinned
    assert r.moving_buffers == ()
    assert "no rule names the statistics" in r.notes[0]


def test_tracking_lets_statistics_of_frozen_norms_move_and_keeps_the_rest_in_eval():
    r = resolve(FreezePlan(train="[2]", norms={"[0]": "tracking"}), CONV)
    assert r.moving_buffers == ("0.1.running_mean", "0.1.running_var", "0.1.num_batches_tracked")
    assert r.norms == {"0.1": "tracking", "1.1": "pinned"}
    assert "0.1" not in r.pinned
    assert {"0", "0.2", "1.1"} <= set(r.pinned)


def test_a_policy_for_what_is_no_norm_is_refused():
    with pytest.raises(SelectorError, match=r"'\[2\]' holds no normalisation layer"):
        resolve(FreezePlan(train="[2]", norms={"[2]": "tracking"}), CONV)


def test_nothing_left_to_train_is_refused():
    with pytest.raises(RecipeError, match="no parameter is left to train in phase 0"):
        resolve(FreezePlan(train=["[2]", "!**"]), CONV)
    with pytest.raises(RecipeError, match="phase 1"):
        resolve_all(FreezePlan(train="[2]", thaw=[{"after": "1 epoch", "freeze": "**"}]), CONV)


def test_a_fault_in_a_later_phase_is_found_at_once():
    plan = FreezePlan(train="[2]", thaw=[{"after": "1 epoch", "train": "[7]"}])
    with pytest.raises(SelectorError, match="out of range"):
        resolve_all(plan, CONV)


@pytest.mark.parametrize(
    "train",
    [["head"], ["**", "!head"], ["**", "!embed"], ["embed"]],
    ids=["later name only", "one frozen by a rule", "the other frozen by a rule", "the other's bias stays frozen"],
)
def test_a_half_frozen_tie_is_refused_with_both_names(train: list[str]):
    with pytest.raises(SelectorError) as caught:
        resolve(FreezePlan(train=train), index_of(Tied(bias=True)))
    assert "embed.weight" in caught.value.what
    assert "head.weight" in caught.value.what
    assert caught.value.where
    assert caught.value.fix


@pytest.mark.parametrize("train", [["embed", "head"], ["body", "embed", "head.weight"], ["**"]])
def test_a_tie_named_under_both_names_trains_as_one_parameter(train: list[str]):
    r = resolve(FreezePlan(train=train), index_of(Tied(bias=True)))
    assert r["head.weight"] is r["embed.weight"]
    assert r["embed.weight"].also == ("head.weight",)
    assert r.trainable_names.count("embed.weight") == 1


def test_a_bare_output_head_trains_with_the_embedding_it_is_tied_to():
    r = resolve(FreezePlan(train="embed"), index_of(Tied(bias=False)))
    assert r.trainable_names == ("embed.weight",)
    assert r.notes == ("head.weight is the same tensor as embed.weight and trains with it",)


def test_whole_number_weights_cannot_be_trained():
    index = ModelIndex([ParamInfo(name="q.weight", shape=(4, 4), dtype="I8")])
    with pytest.raises(SelectorError, match=r"q.weight is of type I8"):
        resolve(FreezePlan(train="**"), index)


def test_rates_follow_the_last_match_and_phases_set_those_of_what_they_name():
    plan = FreezePlan(
        train=["[2]"], lr={"**": 0.5, "[2].bias": 2}, thaw=[{"after": "1 epoch", "train": "[1]", "lr": 0.1}]
    )
    first, second = resolve_all(plan, CONV)
    assert (first.lr_factor("2.weight"), first.lr_factor("2.bias")) == (0.5, 2)
    assert second.lr_factor("1.0.weight") == 0.1
    assert second.lr_factor("2.bias") == 2
    assert (second["1.0.weight"].since, second["2.bias"].since) == (1, 0)


def test_layer_decay_falls_from_the_top_and_counts_what_lies_below():
    names = ["embed.weight", *(f"layers.{i}.weight" for i in range(3)), "head.weight"]
    index = ModelIndex.from_header(ParamInfo(name=n, shape=(2, 2), dtype="F32") for n in names)
    r = resolve(FreezePlan(train="**", lr={"decay": 0.5, "over": "layers", "below": ["embed"]}), index)
    assert [r.lr_factor(n) for n in names] == [0.125, 0.25, 0.5, 1.0, 1.0]
    shifted = resolve(FreezePlan(train="**", lr={"decay": 0.5, "over": "layers", "start": 1}), index)
    assert shifted.lr_factor("layers.2.weight") == 0.5


def test_what_is_kept_from_decay_is_said_by_name():
    r = resolve(FreezePlan(train="**", no_decay=["@bias", "@norm"]), CONV)
    assert [d.name for d in r.decisions if d.decays] == ["0.0.weight", "1.0.weight", "2.weight"]


def test_rows_of_a_matrix_follow_the_last_rule_row_by_row():
    index = ModelIndex([ParamInfo(name="embed.weight", shape=(10, 2), dtype="F32")])
    assert resolve(FreezePlan(train="embed.weight[rows 7:]"), index).rows == {"embed.weight": ((7, 10),)}
    kept = resolve(FreezePlan(train=["embed", "!embed.weight[rows 2:9]"]), index)
    assert kept.rows == {"embed.weight": ((0, 2), (9, 10))}
    assert kept.trained_parameters == 6


def test_adapters_follow_lora_whatever_paths_take_away():
    names = ["enc.q.weight", "enc.q.bias", "head.weight"]
    index = ModelIndex.from_header(
        ParamInfo(name=n, shape=(4,) if n.endswith("bias") else (4, 4), dtype="F32") for n in names
    )
    plan = FreezePlan(train=["head", "!enc"], lora={"target": "enc.q", "r": 2})
    r = resolve(plan, index)
    assert r.trainable_names == ("enc.q.lora_A.default.weight", "enc.q.lora_B.default.weight", "head.weight")
    assert r["enc.q.lora_A.default.weight"].shape == (2, 4)
    assert "enc.q.base_layer" in r.pinned
    assert "enc.q" not in r.pinned
    gone = resolve(FreezePlan(train=["head", "!@lora"], lora={"target": "enc.q"}), index)
    assert gone.trainable_names == ("head.weight",)


def test_a_resolution_survives_json_and_its_hash_follows_its_meaning():
    plan = FreezePlan(train=["[2]"], thaw=[{"after": "1 epoch", "train": "[1]"}])
    a, b = resolve_all(plan, CONV)
    assert Resolution.from_dict(json.loads(a.to_json())) == a
    assert Resolution.from_dict(json.loads(b.to_json())).digest == b.digest
    assert a.digest != b.digest
    assert resolve(FreezePlan(train=["[2]"]), CONV).digest == a.digest


def test_the_difference_of_two_phases_names_tensors_and_modes():
    a, b = resolve_all(FreezePlan(train="[2]", thaw=[{"after": "1 epoch", "train": "[1][0]"}]), CONV)
    assert diff(a, b).changes == (
        ("1.0.weight", "trains", False, True),
        ("1.0.bias", "trains", False, True),
        ("1", "eval mode", True, False),
        ("1.0", "eval mode", True, False),
    )
    assert not diff(a, a)


def test_the_table_puts_equal_layers_into_one_row():
    layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))
    net = nn.ModuleDict({"layers": layers, "head": nn.Linear(4, 2)})
    r = resolve(FreezePlan(train=["layers[-2:]", "head"], lr={"layers": 0.1}), index_of(net))
    assert [(b.name, b.parameters, b.trained, b.lr) for b in r.blocks()] == [
        ("layers[0:4]", 80, 0, None),
        ("layers[4:6]", 40, 40, (0.1, 0.1)),
        ("head", 10, 10, (1.0, 1.0)),
    ]
    assert "layers[4:6]" in r.table()
    assert "38.5%" in r.table()


def test_memory_counts_gradients_and_moments_of_what_trains_only():
    cost = estimate(resolve(FreezePlan(train="[2]"), CONV))
    weights = sum(i.nbytes for i in CONV.tensors)
    assert (cost.weights_bytes, cost.gradients_bytes) == (weights, 10 * 4)
    assert cost.optimizer_bytes == 2 * 10 * 4 + 2 * 4


def test_memory_of_a_thaw_keeps_state_and_averages_of_what_trained_before():
    first, second = (resolve(FreezePlan(train=names), CONV) for names in ("[2]", "[0]"))
    before, now = estimate(first).gradients_bytes, estimate(second).gradients_bytes
    assert estimate(first, ema=True).averages_bytes == before
    later = estimate(second, ema=True, earlier=[first])
    assert later.gradients_bytes == now
    assert later.averages_bytes == before + now
    tensors = len(first.trainable_names) + len(second.trainable_names)
    assert later.optimizer_bytes == 2 * (before + now) + 4 * tensors
    assert later.total_bytes == later.weights_bytes + now + later.optimizer_bytes + later.averages_bytes
    assert later.saving_bytes == before + now + later.optimizer_bytes + later.averages_bytes
    assert estimate(second, earlier=[first]).averages_bytes == 0


def test_averages_of_half_precision_are_kept_in_fp32():
    half = ModelIndex.from_header([ParamInfo(name="w", shape=(3, 5), dtype="BF16")])
    cost = estimate(resolve(FreezePlan(train="w"), half), ema=True)
    assert (cost.weights_bytes, cost.averages_bytes) == (30, 60)


def test_ten_thousand_tensors_resolve_in_a_tenth_of_a_second():
    parts = [f"{m}.{t}" for m in ("q", "k", "v", "out", "w1", "w2") for t in ("weight", "bias")]
    parts += [f"norm{i}.{t}" for i in (1, 2) for t in ("weight", "bias")]
    names = [f"encoder.encoders.{i}.{p}" for i in range(625) for p in parts]
    index = ModelIndex.from_header(
        ParamInfo(name=n, shape=(8,) if "bias" in n or "norm" in n else (8, 8), dtype="F32") for n in names
    )
    plan = FreezePlan(train=["encoder.encoders[-2:]", "!**.norm*"], lr={"encoder.**": 0.1}, no_decay=["@bias", "@norm"])
    assert len(index) == 10_000
    taken = []
    gc.collect()
    for _ in range(5):
        start = time.process_time()
        resolve(plan, index)
        taken.append(time.process_time() - start)
    assert min(taken) < 0.1


@pytest.mark.parametrize(
    "train",
    [
        ["encoder.encoders[-1]", "ctc"],
        ["**", "!**.norm*"],
        ["@bias"],
        ["decoder", "!@embedding"],
        ["encoder.@norm"],
    ],
)
def test_a_header_resolves_as_the_live_model_does(train: list[str]):
    config = pytest.importorskip("thawline.models.wenet.config")
    build = pytest.importorskip("thawline.models.wenet.model").build
    encoder = config.EncoderConfig(
        kind="conformer", input_size=8, output_size=8, attention_heads=2, linear_units=8, num_blocks=2
    )
    decoder = config.DecoderConfig(kind="transformer", attention_heads=2, linear_units=8, num_blocks=1)
    model = build(config.U2Config(kind="asr_model", vocabulary=11, sos=10, eos=10, encoder=encoder, decoder=decoder))
    live = index_of(model)
    header = ModelIndex.from_header(
        ParamInfo(name=n, shape=tuple(t.shape), dtype=live[n].dtype) for n, t in model.state_dict().items()
    )
    plan = FreezePlan(train=train)
    a, b = resolve(plan, live), resolve(plan, header)
    assert a.trainable_names == b.trainable_names
    saved = {d.name for d in a.decisions if d.persistent}
    assert {n for n in a.moving_buffers if n in saved} == set(b.moving_buffers)
    assert set(b.pinned) <= set(a.pinned)
