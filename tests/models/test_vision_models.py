"""EfficientNet-lite beside the original package, and heads that are exchanged on purpose."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from thawline.errors import RecipeError
from thawline.models.vision import efficientnet_lite
from thawline.models.vision.architecture import Architecture, build, from_names, logits_of, named
from thawline.models.vision.head import find_head, head_layer, replace_head_, resize_head_

SMALL = efficientnet_lite.VARIANTS["efficientnet-lite0"]


@pytest.mark.parametrize("name", list(efficientnet_lite.VARIANTS))
def test_every_variant_has_the_tensors_of_the_original_package(name: str) -> None:
    original = pytest.importorskip("efficientnet_lite_pytorch")
    theirs = original.EfficientNet.from_name(name).state_dict()
    ours = efficientnet_lite.build(name).state_dict()
    assert {n: tuple(t.shape) for n, t in ours.items()} == {n: tuple(t.shape) for n, t in theirs.items()}


@pytest.mark.parametrize("size", [224, 65])
def test_outputs_and_gradients_are_those_of_the_original_package(size: int) -> None:
    original = pytest.importorskip("efficientnet_lite_pytorch")
    torch.manual_seed(0)
    theirs = original.EfficientNet.from_name("efficientnet-lite0", image_size=size).eval()
    ours = efficientnet_lite.build("efficientnet-lite0").eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, size, size)
    expected, made = theirs(images), ours(images)
    # The same sums; only the pooling may add up in another order.
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6)
    expected.square().sum().backward()
    made.square().sum().backward()
    torch.testing.assert_close(ours._conv_stem.weight.grad, theirs._conv_stem.weight.grad, rtol=1e-3, atol=1e-6)


def test_in_training_the_random_draws_are_those_of_the_original_package() -> None:
    original = pytest.importorskip("efficientnet_lite_pytorch")
    theirs = original.EfficientNet.from_name("efficientnet-lite0", image_size=32).train()
    ours = efficientnet_lite.build("efficientnet-lite0").train()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(4, 3, 32, 32)
    found = []
    for model in (theirs, ours):
        torch.manual_seed(3)
        found.append(model(images))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_pretrained_weights_know_animals_and_vehicles(shared: Path) -> None:
    """Upsampled CIFAR images against the ImageNet classes of the same kind.

    Guessing would give 0.1 with a standard error of 0.04; 32 pixels are few for a network of 224, so not much more than
    a third is right (0.35 of 120 images).
    """
    from thawline.data.image import read_pixels
    from thawline.data.image_transforms import seen
    from thawline.tasks.vision_home import VisionHome

    kinds = {
        "airplane": (404, 895),
        "automobile": (436, 468, 511, 609, 656, 751, 817),
        "bird": (*range(7, 25), *range(80, 101), *range(127, 147)),
        "cat": range(281, 286),
        "deer": (351, 352, 353),
        "dog": range(151, 269),
        "frog": (30, 31, 32),
        "horse": (339,),
        "ship": (484, 510, 554, 628, 814, 914),
        "truck": (555, 569, 675, 717, 864, 867),
    }
    home = VisionHome.of(shared / "models" / "efficientnet-lite0")
    model = home.load()
    right = count = 0
    for number, kind in enumerate(kinds):
        files = sorted((shared / "data" / "cifar10-subset" / "valid" / kind).glob("*.jpg"))[:6]
        with torch.no_grad():
            chances = logits_of(model, torch.stack([seen(read_pixels(f), home.input) for f in files])).softmax(-1)
        share = torch.stack([chances[:, list(ids)].sum(-1) for ids in kinds.values()], -1)
        right += int((share.argmax(-1) == number).sum())
        count += len(files)
    assert right / count >= 0.25


def test_a_weights_file_is_known_by_its_tensor_names() -> None:
    model = efficientnet_lite.build("efficientnet-lite2", classes=7)
    found = from_names({n: tuple(t.shape) for n, t in model.state_dict().items()})
    assert found is not None
    assert (found.kind, found.name) == ("efficientnet_lite", "efficientnet-lite2")
    assert from_names({"weight": (3, 3)}) is None


def test_the_shared_weights_are_those_of_lite0(shared: Path) -> None:
    weights = load_file(shared / "models" / "efficientnet-lite0" / "model.safetensors")
    found = from_names({n: tuple(t.shape) for n, t in weights.items()})
    assert found is not None
    assert found.name == "efficientnet-lite0"


def test_a_misspelt_variant_is_refused_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match="there is no 'efficientnet-lite9'") as caught:
        efficientnet_lite.build("efficientnet-lite9")
    assert "efficientnet-lite0" in caught.value.fix


@pytest.mark.parametrize(
    ("text", "kind", "name"),
    [
        ("timm:resnet18.a1_in1k", "timm", "resnet18.a1_in1k"),
        ("/some/where/torchvision:resnet18", "torchvision", "resnet18"),
        ("efficientnet-lite3", "efficientnet_lite", "efficientnet-lite3"),
        ("my.nets:make", "function", "my.nets:make"),
    ],
)
def test_names_are_told_from_paths(text: str, kind: str, name: str) -> None:
    made = named(text, {})
    assert made is not None
    assert (made.kind, made.name) == (kind, name)


@pytest.mark.parametrize("text", ["models/resnet", "weights.pt", "a:b:c", ":x"])
def test_paths_are_not_taken_for_names(text: str) -> None:
    assert named(text, {}) is None


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


def test_the_head_is_the_last_linear_layer_of_the_right_size() -> None:
    assert find_head(net()) == "2"
    assert find_head(net(), classes=5) == "0"
    assert find_head(net(), name="0") == "0"
    with pytest.raises(RecipeError, match="no linear layer gives 7 classes"):
        find_head(net(), classes=7)
    with pytest.raises(RecipeError, match="'1' is no linear layer"):
        find_head(net(), name="1")
    with pytest.raises(RecipeError, match="has no linear layer"):
        find_head(nn.Conv2d(1, 1, 1))


def test_shared_classes_keep_their_rows_and_the_others_get_their_spread() -> None:
    model = net()
    before = head_layer(model, "2").weight.detach().clone()
    change = replace_head_(model, "2", old=["a", "b", "c"], new=["d", "b", *map(str, range(200))], seed=1)
    weight = head_layer(model, "2").weight.detach()
    assert (change.kept, change.gone) == (("b",), 2)
    assert torch.equal(weight[1], before[1])
    spread = float(before[1].std())
    assert float(weight[2:].std()) == pytest.approx(spread, rel=0.1)  # 1000 draws: 2 % of standard error
    assert "1 rows kept (b)" in str(change)


def test_old_names_that_do_not_fit_the_head_keep_nothing() -> None:
    model = net()
    change = replace_head_(model, "2", old=[], new=["x", "y"], seed=1)
    assert change.kept == ()
    assert float(head_layer(model, "2").weight.detach().std()) < 0.03
    assert float(head_layer(model, "2").bias.detach().abs().max()) == 0


def test_the_same_seed_draws_the_same_head() -> None:
    one, other = net(), net()
    for model in (one, other):
        torch.rand(3)
        replace_head_(model, "2", old=[], new=["x", "y"], seed=9)
    assert torch.equal(head_layer(one, "2").weight, head_layer(other, "2").weight)


def test_a_head_of_the_right_size_is_left_alone() -> None:
    model = net()
    layer = head_layer(model, "2")
    resize_head_(model, "2", 3)
    assert head_layer(model, "2") is layer
    resize_head_(model, "2", 8)
    assert head_layer(model, "2").out_features == 8


def test_a_built_network_is_in_eval_mode() -> None:
    made = build(Architecture(kind="efficientnet_lite", name="efficientnet-lite0", args={"classes": 2}))
    assert not any(m.training for m in made.modules())
