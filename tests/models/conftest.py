"""WeNet's golden cases, opened once per case."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tests.models.wenet_cases import CASES
from torch import Tensor

from thawline.models.wenet.cmvn import read_cmvn
from thawline.models.wenet.config import U2Config, read_config
from thawline.models.wenet.model import U2Model, build


@dataclass(frozen=True)
class Case:
    """One folder of golden files made by running WeNet itself."""

    folder: Path
    values: dict[str, Any]
    config: U2Config

    @property
    def io(self) -> dict[str, Tensor]:
        return load_file(self.folder / "io.safetensors")

    def json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def empty(self) -> U2Model:
        torch.manual_seed(0)
        cmvn = None
        if self.config.cmvn_file:
            cmvn = read_cmvn(self.folder / self.config.cmvn_file, is_json=self.config.cmvn_is_json)
        return build(self.config, cmvn)

    def model(self, file: str = "final.pt") -> U2Model:
        model = self.empty()
        model.load_state_dict(torch.load(self.folder / file, weights_only=True), strict=True)
        return model.eval()

    @property
    def words(self) -> dict[str, Any]:
        """Languages and tasks for the Whisper variant, nothing for the others."""
        if not self.config.is_whisper:
            return {}
        meta = self.json("meta.json")
        return {"languages": meta["langs"], "tasks": meta["tasks"]}


def open_case(shared: Path, name: str) -> Case:
    folder = shared / "parity" / "wenet" / name
    values = yaml.safe_load((folder / "train.yaml").read_text(encoding="utf-8"))
    return Case(folder=folder, values=values, config=read_config(values, where=f"{name}/train.yaml"))


WITH_GRADIENTS = ("u2_conformer", "u2pp_conformer", "u2pp_conformer_bn", "whisper")
WITH_CHUNKS = ("u2pp_conformer", "u2pp_conformer_bn")


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, shared: Path) -> Case:
    return open_case(shared, request.param)


@pytest.fixture(params=WITH_GRADIENTS)
def gradient_case(request: pytest.FixtureRequest, shared: Path) -> Case:
    return open_case(shared, request.param)


@pytest.fixture(params=WITH_CHUNKS)
def chunk_case(request: pytest.FixtureRequest, shared: Path) -> Case:
    return open_case(shared, request.param)


@pytest.fixture
def wenet_case(shared: Path) -> Any:
    """A case by its name."""
    return lambda name: open_case(shared, name)
