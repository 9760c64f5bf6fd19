"""Names on the hub lead into the local cache, and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from thawline.core import hub
from thawline.errors import CheckpointError
from thawline.tasks.vision_home import VisionHome

pytest.importorskip("transformers")

NAME = "someone/vit-tiny"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with one tiny model in it, as `hf download` leaves it."""
    transformers = pytest.importorskip("transformers")
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "models--someone--vit-tiny"
    snapshot = folder / "snapshots" / ("a" * 40)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    transformers.ViTForImageClassification(config).save_pretrained(snapshot)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    return snapshot


def test_a_name_leads_to_the_snapshot_in_the_cache(cache: Path, tmp_path: Path) -> None:
    assert hub.local(tmp_path / "recipes" / NAME) == cache
    home = VisionHome.of(tmp_path / "recipes" / NAME)
    assert home.path == cache
    assert home.load().config.num_labels == 2  # type: ignore[union-attr]


def test_what_lies_on_the_disk_is_never_taken_for_a_name(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "someone").mkdir()
    assert hub.local(tmp_path / NAME) == tmp_path / NAME  # a misspelt model in a folder that is there
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    assert hub.name_of(tmp_path / NAME) is None


def test_a_name_that_is_not_in_the_cache_is_one_sentence_with_the_command(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        VisionHome.of(tmp_path / "recipes" / "google" / "vit-base-patch16-224")
    assert caught.value.fix == (
        "if the hub's google/vit-base-patch16-224 is meant, it is not in the local cache: "
        "hf download google/vit-base-patch16-224"
    )


@pytest.mark.parametrize("path", ["/nowhere/..", "/no where/at all", "/nowhere/.hidden"])
def test_what_can_be_no_name_is_left_alone(path: str) -> None:
    assert hub.name_of(Path(path)) is None
    assert hub.remedy(Path(path)) == ""
