from __future__ import annotations

from pathlib import Path

import pytest

from thawline.core.config import read_yaml
from thawline.demo.plans import PINNED, TRACKING, VARIANTS, Variant, write_base_recipe, write_recipe
from thawline.freeze.inspect import index_of
from thawline.freeze.resolve import resolve
from thawline.models.wenet.config import read_config
from thawline.models.wenet.model import U2Model, build
from thawline.train.recipe import read_recipe


@pytest.fixture(scope="module")
def model() -> U2Model:
    from thawline.demo.recogniser import _settings

    return build(read_config(_settings(13)))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_each_recipe_is_read_back_with_its_plan_and_the_plan_fits_the_model(
    variant: Variant, model: U2Model, tmp_path: Path
):
    path = tmp_path / f"{variant.name}.yaml"
    write_recipe(path, variant, model=tmp_path / "base", train=tmp_path / "data.list", epochs=3)
    recipe = read_recipe(path)
    assert recipe.plan.to_dict() == {k: v for k, v in variant.plan.items() if (k, v) != ("norms", "pinned")}
    assert recipe.path("data", "train") == tmp_path / "data.list"
    assert recipe.run.epochs == 3
    resolution = resolve(recipe.plan, index_of(model))
    share = resolution.trained_parameters / resolution.parameters
    expected = {"everything": (1.0, 1.0), "tracking": (0.2, 0.5), "pinned": (0.2, 0.5), "output": (0.001, 0.01)}
    low, high = expected[variant.name]
    assert low <= share <= high


def test_tracking_and_pinned_differ_in_the_statistics_of_the_frozen_blocks_and_in_nothing_else(model: U2Model):
    from thawline.freeze.plan import FreezePlan

    tracking, pinned = (resolve(FreezePlan(**v.plan), index_of(model)) for v in (TRACKING, PINNED))
    moving = set(tracking.moving_buffers) - set(pinned.moving_buffers)
    assert moving == {
        f"encoder.encoders.{block}.conv_module.norm.{name}"
        for block in (0, 1)
        for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    parameters = {name for name, _ in model.named_parameters()}
    assert parameters & set(tracking.trainable_names) == parameters & set(pinned.trainable_names)


def test_the_base_starts_from_random_weights(tmp_path: Path):
    write_base_recipe(tmp_path / "base.yaml", model=tmp_path / "recogniser", train=tmp_path / "data.list")
    assert read_yaml(tmp_path / "base.yaml").data["init"] == "random"
    assert read_recipe(tmp_path / "base.yaml").init == "random"
