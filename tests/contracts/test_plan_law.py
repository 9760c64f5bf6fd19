"""The plan law: only what the plan names changes, on random modules and plans, and over long mixed runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from thawline.errors import RecipeError
from thawline.freeze.apply import is_pinned
from thawline.freeze.audit import audit, audit_average, snapshot
from thawline.freeze.inspect import all_buffers
from thawline.freeze.plan import FreezePlan


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # The tensors are tiny; threads would only wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------- any module, any plan, any sequence of phases

SIZE = 4
LEAVES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(SIZE, SIZE),
    "bare": lambda: nn.Linear(SIZE, SIZE, bias=False),
    "batchnorm": lambda: nn.BatchNorm1d(SIZE),
    "layernorm": lambda: nn.LayerNorm(SIZE),
    "dropout": lambda: nn.Dropout(0.5),
    "relu": nn.ReLU,
}
SHAPES = st.recursive(
    st.sampled_from(sorted(LEAVES)), lambda inner: st.lists(inner, min_size=1, max_size=3), max_leaves=8
)


def grow(shape: str | list[Any]) -> nn.Module:
    return LEAVES[shape]() if isinstance(shape, str) else nn.Sequential(*map(grow, shape))


class Model(nn.Module):
    """A random tree, with a bare parameter and a head that may be tied to the first matrix."""

    def __init__(self, shape: list[Any], *, tied: bool) -> None:
        super().__init__()
        self.body = grow(shape)
        self.scale = nn.Parameter(torch.ones(SIZE))
        self.head = nn.Linear(SIZE, SIZE)
        matrices = [m for m in self.body.modules() if isinstance(m, nn.Linear)]
        if tied and matrices:
            self.head.weight = matrices[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x) * self.scale)


@st.composite
def selectors(draw: st.DrawFn, paths: list[str]) -> str:
    path = draw(st.sampled_from(paths))
    parts = path.split(".")
    form = draw(st.integers(0, 5))
    if form == 1:
        parts[draw(st.integers(0, len(parts) - 1))] = "*"
    elif form == 2:
        parts = ["**", *parts[draw(st.integers(0, len(parts) - 1)) :]]
    elif form == 3:
        parts = [draw(st.sampled_from(["@bias", "@norm", "@linear", "**"]))]
    elif form == 4 and parts[-1].isdecimal():
        parts = [*parts[:-2], f"{parts[-2]}[{parts[-1]}]"]
    return draw(st.sampled_from(["", "", "!"])) + ".".join(parts)


@st.composite
def models_and_plans(draw: st.DrawFn) -> tuple[Model, dict[str, Any], list[int]]:
    shape = draw(st.lists(SHAPES, min_size=1, max_size=3))
    model = Model(shape, tied=draw(st.booleans()))
    paths = [n for n, _ in model.named_modules() if n] + [n for n, _ in model.named_parameters()]
    one = selectors(paths)
    thaw = [
        {"after": f"{i + 1} epochs", draw(st.sampled_from(["train", "freeze"])): [draw(one).removeprefix("!")]}
        for i in range(draw(st.integers(1, 3)))
    ]
    plan = {
        "train": draw(st.lists(one, min_size=1, max_size=3)),
        "thaw": thaw,
        "norms": draw(st.sampled_from(["pinned", "tracking"])),
        "no_decay": draw(st.sampled_from([[], ["@bias"]])),
    }
    return model, plan, draw(st.lists(st.integers(0, len(thaw)), max_size=5))


def update(model: Model, optimizer: torch.optim.Optimizer) -> None:
    """A step in which every parameter that can get a gradient does, whatever dropout and ReLU do."""
    optimizer.zero_grad()
    model.train()
    loss = model(torch.randn(3, SIZE)).square().mean()
    (loss + sum(p.sum() for p in model.parameters() if p.requires_grad)).backward()
    optimizer.step()


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(models_and_plans())
def test_what_has_gradients_what_is_optimised_and_what_moves_is_one_set_after_any_phases(case):
    model, written, route = case
    try:
        plan = FreezePlan(**written)
        frozen = plan.apply(model)
    except RecipeError:
        # Refused as a whole: a selector that names nothing here, a half-frozen tie, nothing left to train.
        assert all(p.requires_grad for p in model.parameters())
        assert not any(is_pinned(m) for m in model.modules())
        return
    optimizer = frozen.optimizer(torch.optim.AdamW, lr=0.1, weight_decay=0.1)
    for phase in [0, *route]:
        frozen.enter(phase)
        names = {id(p): n for n, p in model.named_parameters()}
        before = snapshot(model)
        update(model, optimizer)
        after = snapshot(model)
        planned = set(frozen.resolution.trainable_names)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == planned
        assert {names[id(p)] for g in optimizer.param_groups for p in g["params"]} == planned
        assert {n for n, d in before.parameters.items() if after.parameters[n] != d} == planned
        assert not audit(before, after, frozen.resolution).broken
    frozen.audit().raise_if_broken()


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(models_and_plans())
def test_frozen_modules_stay_in_eval_in_every_copy(case):
    model, written, _ = case
    try:
        frozen = FreezePlan(**written).apply(model, audit=False)
    except RecipeError:
        return
    twin = copy.deepcopy(model).train()
    pinned = set(frozen.resolution.pinned)
    assert {n for n, m in twin.named_modules() if not m.training} == pinned
    frozen.release()
    assert all(m.training for m in model.train().modules())


# ---------------------------------------------------------------- long mixed runs on real architectures


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.1))]
        self.layers = nn.Sequential(*blocks, copy.deepcopy(blocks[0]), copy.deepcopy(blocks[0]))
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean((2, 3)))


def conv_case() -> tuple[nn.Module, Callable[[nn.Module, int], Tensor], dict[str, Any]]:
    plan = {"train": "head", "thaw": _phases("layers[-1]", "head")}
    return ConvNet(), lambda m, i: m(torch.randn(4, 3, 6, 6) + i % 3).square().mean(), plan


def conformer_case() -> tuple[nn.Module, Callable[[nn.Module, int], Tensor], dict[str, Any]]:
    config = pytest.importorskip("thawline.models.wenet.config")
    build = pytest.importorskip("thawline.models.wenet.model").build
    model = build(
        config.U2Config(
            kind="asr_model",
            vocabulary=11,
            sos=10,
            eos=10,
            encoder=config.EncoderConfig(
                kind="conformer",
                input_size=8,
                output_size=8,
                attention_heads=2,
                linear_units=8,
                num_blocks=2,
                pos_enc_layer_type="rel_pos",
                selfattention_layer_type="rel_selfattn",
                cnn_module_kernel=3,
                cnn_module_norm="batch_norm",
            ),
            decoder=config.DecoderConfig(kind="transformer", attention_heads=2, linear_units=8, num_blocks=1),
        )
    )
    target, lengths = torch.tensor([[1, 2], [3, 4]]), torch.tensor([2, 2])

    def loss(m: nn.Module, i: int) -> Tensor:
        total: Tensor = m.loss(torch.randn(2, 24, 8) + i % 3, torch.tensor([24, 20]), target, lengths).total
        return total

    return model, loss, {"train": "ctc", "thaw": _phases("encoder.encoders[-1]", "ctc")}


def whisper_case() -> tuple[nn.Module, Callable[[nn.Module, int], Tensor], dict[str, Any]]:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.WhisperConfig(
        vocab_size=30, num_mel_bins=8, d_model=8, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, max_source_positions=10,
        max_target_positions=12, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
        suppress_tokens=[], begin_suppress_tokens=[], dropout=0.1,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config)

    def loss(m: nn.Module, i: int) -> Tensor:
        found: Tensor = m(input_features=torch.randn(2, 8, 20) + i % 3, labels=torch.randint(4, 30, (2, 5))).loss
        return found

    return model, loss, {"train": "model.decoder", "thaw": _phases("model.encoder.layers[-1]", "model.decoder.layers")}


def lora_case() -> tuple[nn.Module, Callable[[nn.Module, int], Tensor], dict[str, Any]]:
    pytest.importorskip("peft", reason="peft is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)

    def loss(m: nn.Module, i: int) -> Tensor:
        ids = torch.randint(1, 30, (2, 6))
        found: Tensor = m(input_ids=ids, labels=ids).loss
        return found

    lora = {"target": "model.layers.**.{q,v}_proj", "r": 2, "dropout": 0.1, "modules_to_save": ["lm_head"]}
    return model, loss, {"lora": lora, "thaw": _phases("model.layers[-1].mlp", "lm_head")}


def _phases(thawed: str, refrozen: str) -> list[dict[str, Any]]:
    return [{"after": "60 steps", "train": thawed, "lr": 0.3}, {"after": "140 steps", "freeze": refrozen}]


CASES = {"conv": conv_case, "conformer": conformer_case, "whisper": whisper_case, "lora": lora_case}


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "cls", "extra"),
    [
        ("conv", torch.optim.AdamW, {}),
        ("conv", torch.optim.SGD, {"momentum": 0.9}),
        ("conformer", torch.optim.AdamW, {}),
        ("whisper", torch.optim.SGD, {"momentum": 0.9}),
        ("lora", torch.optim.AdamW, {}),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_frozen_tensors_and_buffers_are_equal_bit_for_bit_after_200_mixed_steps(name: str, cls: Any, extra: Any):
    torch.manual_seed(3)
    model, loss, written = CASES[name]()
    frozen = FreezePlan(**written).apply(model)
    optimizer = frozen.optimizer(cls, lr=1e-2, weight_decay=0.1, **extra)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    start = {n: t.detach().clone() for n, t in [*model.named_parameters(), *all_buffers(model)]}
    ever: set[str] = set()
    phases = []
    for step in range(200):
        if frozen.advance(step=step):
            phases.append((step, frozen.phase))
        ever |= set(frozen.resolution.trainable_names) | set(frozen.resolution.moving_buffers)
        model.train()
        optimizer.zero_grad()
        for micro in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=step % 2 == 1):
                part = loss(model, 2 * step + micro)
            (part / 2).backward()
        nn.utils.clip_grad_norm_(frozen.trainable_parameters(), 1.0)
        optimizer.step()
        average.update_parameters(model)
    assert phases == [(60, 1), (140, 2)]
    frozen.audit().raise_if_broken()
    now = dict([*model.named_parameters(), *all_buffers(model)])
    never = [n for n in start if n not in ever]
    assert never
    assert all(torch.equal(now[n], start[n]) for n in never)
    # The average moves with what trained in an earlier phase; what never trained it must leave alone, bit for bit.
    assert set(audit_average(model, average, frozen.resolution)) <= ever


# ---------------------------------------------------------------- against the same schedule written by hand


@pytest.mark.parametrize(
    ("cls", "extra"), [(torch.optim.AdamW, {}), (torch.optim.SGD, {"momentum": 0.9})], ids=["AdamW", "SGD"]
)
def test_a_three_phase_thaw_equals_the_same_schedule_written_by_hand_bit_for_bit(cls: Any, extra: Any):
    torch.manual_seed(0)
    planned = ConvNet()
    by_hand = copy.deepcopy(planned)
    batches = [torch.randn(4, 3, 6, 6) for _ in range(12)]

    plan = FreezePlan(
        train="head",
        no_decay=["@bias"],
        thaw=[
            {"after": "4 steps", "train": "layers[-1]", "lr": 0.5},
            {"after": "8 steps", "train": "layers[1]", "lr": 0.2},
        ],
    )
    frozen = plan.apply(planned)
    optimizer = frozen.optimizer(cls, lr=0.05, weight_decay=0.1, **extra)
    for step, x in enumerate(batches):
        frozen.advance(step=step)
        torch.manual_seed(step)
        planned.train()
        optimizer.zero_grad()
        planned(x).square().mean().backward()
        optimizer.step()

    parts = [("head", by_hand.head, 1.0), ("2", by_hand.layers[2], 0.5), ("1", by_hand.layers[1], 0.2)]
    state: dict[Any, Any] = {}
    for phase in range(3):
        by_hand.requires_grad_(False)
        groups = []
        for _, part, rate in parts[: phase + 1]:
            part.requires_grad_(True)
            for decays in (True, False):
                own = [p for n, p in part.named_parameters() if n.endswith("bias") != decays]
                groups.append({"params": own, "lr": 0.05 * rate, "weight_decay": 0.1 if decays else 0.0})
        mine = cls(groups, lr=0.05, **extra)
        for param in (p for g in groups for p in g["params"]):
            if param in state:
                mine.state[param] = state[param]
        for step in range(4 * phase, 4 * phase + 4):
            torch.manual_seed(step)
            by_hand.train()
            for layer in by_hand.layers[: 3 - phase]:
                layer.eval()
            mine.zero_grad()
            by_hand(batches[step]).square().mean().backward()
            mine.step()
        state.update(mine.state)
    assert all(
        torch.equal(a, b) for a, b in zip(planned.state_dict().values(), by_hand.state_dict().values(), strict=True)
    )
