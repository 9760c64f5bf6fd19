"""Upstream's Python configurations are read as data and never run."""

from __future__ import annotations

import pytest

from thawline.errors import RecipeError
from thawline.models.videochat.config import from_upstream
from thawline.models.videochat.script import read_script

SCRIPT = """
from configs.instruction_data import *
train_file = "${available_corpus[${train_corpus}]}"
num_frames = 8
max_txt_l = 512
model = dict(
    model_cls="VideoChat2_it_mistral",
    mistral_model_path="somewhere",
    freeze_vit=False,
    max_txt_len="${max_txt_l}",
    vision_encoder=dict(
        name="vit_l14", img_size=224, drop_path_rate=0., num_frames="${num_frames}", use_checkpoint=True,
        checkpoint_num=18, return_index=-2, ckpt_num_frame=4,
    ),
    num_query_token=32, extra_num_query_token=64, qformer_text_input=True, use_lora=True, lora_r=16,
)
optimizer = dict(lr=2e-5, opt_betas=[0.9, 0.999])
"""


def test_a_script_of_upstreams_gives_its_model_section() -> None:
    section = read_script(SCRIPT, name="model")
    assert section["vision_encoder"]["num_frames"] == 8
    assert section["vision_encoder"]["return_index"] == -2
    config = from_upstream(section, family="mistral")
    assert (config.max_text_tokens, config.vision.checkpoint_blocks, config.qformer.extra_queries) == (512, 18, 64)
    assert config.lora is not None
    assert read_script(SCRIPT, name="optimizer") == {"lr": 2e-5, "opt_betas": [0.9, 0.999]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = dict(a=open('/etc/passwd').read())", "is not a constant, and scripts are not run"),
        ("model = dict(a=undefined)", "'undefined' is not a constant"),
        ("model = dict(**other)\nother = 3\nmodel = 5", "'model' is no dictionary"),
        ("a = b\nb = a\nmodel = dict(x=a)", "in a circle"),
        ("import os", "assigns nothing to 'model'"),
        ("model = (", "not Python"),
    ],
)
def test_anything_but_constants_is_refused_and_never_run(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_script(text, name="model", where="c.py")
