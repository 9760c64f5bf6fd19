"""`tl.load` on what users have: WeNet's, OpenAI's and Hugging Face's files, through the public names only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.models.wenet_cases import CASES
from torch import Tensor

import thawline as tl
from thawline.core.rng import derive
from thawline.tasks.speech_weights import NEW_TENSOR_KEY, notes_of


def prompts(folder: Path) -> dict[str, Any]:
    """Languages and tasks of WeNet's Whisper variant; nothing for the others."""
    meta = json.loads((folder / "meta.json").read_text())
    return {"languages": meta["langs"], "tasks": meta["tasks"]} if folder.name == "whisper" else {}


def valid_rows(out: Tensor, lengths: Tensor) -> Tensor:
    return out[torch.arange(out.size(1)) < lengths.unsqueeze(1)]


@pytest.mark.parametrize("name", CASES)
def test_a_wenet_directory_gives_wenets_own_numbers(shared: Path, name: str) -> None:
    folder = shared / "parity" / "wenet" / name
    io = load_file(folder / "io.safetensors")
    model: Any = tl.load(folder)
    assert not model.training
    with torch.no_grad():
        out, lengths = model.encode(io["feats"], io["feats_lengths"])
        torch.testing.assert_close(valid_rows(out, lengths), valid_rows(io["encoder_out"], lengths), atol=2e-5, rtol=0)
        assert lengths.tolist() == io["encoder_out_lens"].tolist()
        log_probs = model.ctc_log_probs(out)
        torch.testing.assert_close(
            valid_rows(log_probs, lengths), valid_rows(io["ctc_log_probs"], lengths), atol=5e-5, rtol=0
        )
        loss = model.loss(io["feats"], io["feats_lengths"], io["target"], io["target_lengths"], **prompts(folder))
    torch.testing.assert_close(loss.total, io["full_loss"], atol=0, rtol=1e-5)
    torch.testing.assert_close(loss.ctc, io["full_loss_ctc"], atol=0, rtol=1e-5)
    torch.testing.assert_close(loss.attention, io["full_loss_att"], atol=0, rtol=1e-5)
    torch.testing.assert_close(loss.accuracy, io["full_acc"], atol=0, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_all_four_modes_give_wenets_tokens_and_scores(shared: Path, name: str) -> None:
    folder = shared / "parity" / "wenet" / name
    io, golden = load_file(folder / "io.safetensors"), json.loads((folder / "decode.json").read_text())["full_context"]
    model: Any = tl.load(folder)
    reverse = 0.3 if name.startswith("u2pp") else 0.0
    for mode in ("ctc_greedy_search", "ctc_prefix_beam_search", "attention", "attention_rescoring"):
        hyps = model.decode(
            io["feats"],
            io["feats_lengths"],
            mode=mode,
            beam=5,
            ctc_weight=0.3,
            reverse_weight=reverse,
            **prompts(folder),
        )
        found = golden["results"][mode]
        assert [list(h.tokens) for h in hyps] == [row["tokens"] for row in found]
        if mode not in ("attention", "ctc_greedy_search"):  # WeNet returns 0 for these two
            assert [h.score for h in hyps] == pytest.approx([row["score"] for row in found], abs=1e-3)


@pytest.mark.parametrize("name", ["u2pp_conformer", "u2pp_conformer_bn"])
def test_chunked_attention_gives_wenets_numbers(shared: Path, name: str) -> None:
    folder = shared / "parity" / "wenet" / name
    io = load_file(folder / "io.safetensors")
    model: Any = tl.load(folder)
    keys = [key for key in io if key.endswith(".masked.encoder_out")]
    assert keys
    for key in keys:
        chunk, left = (int(part.lstrip("chunkleft")) for part in key.split(".")[0].split("_"))
        with torch.no_grad():
            out, lengths = model.encode(io["feats"], io["feats_lengths"], chunk_size=chunk, left_chunks=left)
        torch.testing.assert_close(valid_rows(out, lengths), valid_rows(io[key], lengths), atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["u2pp_conformer", "u2pp_conformer_bn"])
def test_streaming_with_caches_gives_wenets_frames_and_the_tokens_of_its_chunk_mask(shared: Path, name: str) -> None:
    folder = shared / "parity" / "wenet" / name
    io, golden = load_file(folder / "io.safetensors"), json.loads((folder / "decode.json").read_text())
    model: Any = tl.load(folder)
    chunked = [case for case in golden.values() if case["args"]["decoding_chunk_size"] > 0]
    assert chunked
    for case in chunked:
        args = case["args"]
        chunk, left = args["decoding_chunk_size"], args["num_decoding_left_chunks"]
        for i, frames in enumerate(io["feats_lengths"].tolist()):
            stream = model.stream(chunk_size=chunk, left_chunks=left)
            out = torch.cat([stream.feed(io["feats"][i : i + 1, :frames]), stream.finish()], dim=1)
            torch.testing.assert_close(out, io[f"chunk{chunk}_left{left}.stream.utt{i}"], atol=2e-5, rtol=0)
        for mode, expected in case["results"].items():
            found = model.decode(
                io["feats"], io["feats_lengths"], mode=mode, beam=args["beam_size"], ctc_weight=args["ctc_weight"],
                reverse_weight=args["reverse_weight"], chunk_size=chunk, left_chunks=left, streaming=True,
            )  # fmt: skip
            assert [list(h.tokens) for h in found] == [row["tokens"] for row in expected]


def test_an_experiment_directory_with_a_dangling_final_link_is_its_last_epoch(shared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "exp"
    shutil.copytree(shared / "parity" / "wenet" / "exp_dir_epoch_mode", folder)
    folder.chmod(0o755)
    (folder / "final.pt").symlink_to("1.pt")  # what WeNet's train.py leaves
    last = torch.load(folder / "epoch_1.pt", weights_only=True)
    found = tl.load(folder).state_dict()
    assert found.keys() == last.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in last.items())
    first = torch.load(folder / "epoch_0.pt", weights_only=True)
    assert all(torch.equal(tl.load(folder / "epoch_0.pt").state_dict()[n], t) for n, t in first.items())


@pytest.mark.parametrize("file", ["final.pt", "openai.pt"])
def test_a_whisper_in_wenets_or_openais_names_beside_train_yaml_has_nothing_random(shared: Path, file: str) -> None:
    folder = shared / "parity" / "wenet" / "whisper_from_openai"
    io = load_file(folder / "io.safetensors")
    torch.manual_seed(1)
    model: Any = tl.load(folder / file)
    torch.manual_seed(2)
    again = tl.load(folder / file).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    state = model.state_dict()
    assert not state["decoder.output_layer.bias"].any()
    assert torch.equal(state["decoder.output_layer.weight"], state["decoder.embed.0.weight"])
    assert model.decoder.output_layer.weight is model.decoder.embed[0].weight
    with torch.no_grad():
        out, lengths = model.encode(io["mel"], torch.tensor([io["mel"].size(1)]))
    assert lengths.tolist() == [100]
    torch.testing.assert_close(out, io["encoder_out"], atol=2e-5, rtol=0)


def test_the_new_ctc_head_of_a_whisper_is_drawn_from_a_stated_key_and_named(shared: Path) -> None:
    model: Any = tl.load(shared / "parity" / "wenet" / "whisper_from_openai")
    weight = model.state_dict()["ctc.ctc_lo.weight"]
    name = "ctc.ctc_lo.weight"
    generator = torch.Generator().manual_seed(derive(0, *NEW_TENSOR_KEY, name))
    drawn = (torch.rand(weight.shape, generator=generator) * 2 - 1) / weight.size(1) ** 0.5
    assert torch.equal(weight, drawn)
    assert not model.state_dict()["ctc.ctc_lo.bias"].any()
    notes = notes_of(model)
    assert any(note.startswith("ctc.ctc_lo.weight: new, as Whisper has no CTC head") for note in notes)
    assert "decoder.output_layer.bias: zero, as Whisper has no output bias" in notes


def test_openais_file_alone_becomes_hugging_faces_network(shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    source = shared / "parity" / "wenet" / "whisper_from_openai"
    shutil.copyfile(source / "openai.pt", tmp_path / "tiny.pt")
    theirs = torch.load(source / "openai.pt", weights_only=True)["model_state_dict"]
    model: Any = tl.load(tmp_path / "tiny.pt")
    state = model.state_dict()
    assert torch.equal(state["model.decoder.embed_tokens.weight"], theirs["decoder.token_embedding.weight"].float())
    assert torch.equal(state["model.encoder.layers.1.fc1.weight"], theirs["encoder.blocks.1.mlp.0.weight"].float())
    assert torch.equal(state["proj_out.weight"], state["model.decoder.embed_tokens.weight"])
    with pytest.raises(tl.RecipeError, match="special tokens of this vocabulary of 120 are not known"):
        model.decode(torch.zeros(1, 20, 80), torch.tensor([20]))


def test_both_kinds_of_wenets_lora_files_give_the_model_with_lora(shared: Path) -> None:
    folder = shared / "parity" / "wenet" / "u2_conformer_lora"
    io = load_file(folder / "io.safetensors")
    lengths = io["feats_lengths"]
    wanted = {"step.pt": "unmerged", "epoch.pt": "merged", "lora_only.pt": "factors"}
    for file, kind in wanted.items():
        model: Any = tl.load(folder / file, base=folder / "base.pt")
        with torch.no_grad():
            out, frames = model.encode(io["feats"], lengths)
        torch.testing.assert_close(
            valid_rows(out, frames), valid_rows(io["encoder_out.with_lora"], frames), atol=2e-5, rtol=0
        )
        assert f"found {kind}" in notes_of(model)[0]
        assert not any("lora" in name for name in model.state_dict())
    plain: Any = tl.load(folder / "base.pt")
    with torch.no_grad():
        out, frames = plain.encode(io["feats"], lengths)
    torch.testing.assert_close(valid_rows(out, frames), valid_rows(io["encoder_out.base"], frames), atol=2e-5, rtol=0)


def test_a_lora_file_without_its_base_is_refused_unless_wenets_tag_tells_its_kind(shared: Path, tmp_path: Path) -> None:
    source = shared / "parity" / "wenet" / "u2_conformer_lora"
    for name in ("epoch.pt", "train.yaml"):
        shutil.copyfile(source / name, tmp_path / name)
    with pytest.raises(tl.CheckpointError, match=r"may hold merged weights .* or unmerged ones") as refused:
        tl.load(tmp_path / "epoch.pt")
    assert "base" in refused.value.fix
    (tmp_path / "epoch.yaml").write_text("tag: epoch_1\n")
    io = load_file(source / "io.safetensors")
    model: Any = tl.load(tmp_path / "epoch.pt")
    with torch.no_grad():
        out, frames = model.encode(io["feats"], io["feats_lengths"])
    torch.testing.assert_close(
        valid_rows(out, frames), valid_rows(io["encoder_out.with_lora"], frames), atol=2e-5, rtol=0
    )


def test_a_missing_and_a_surplus_tensor_are_refused_by_name(shared: Path, tmp_path: Path) -> None:
    source = shared / "parity" / "wenet" / "transformer"
    for name in ("train.yaml", "units.txt"):
        shutil.copyfile(source / name, tmp_path / name)
    state = torch.load(source / "final.pt", weights_only=True)
    del state["ctc.ctc_lo.bias"]
    torch.save(state, tmp_path / "final.pt")
    with pytest.raises(tl.CheckpointError, match=r"1 missing in it: ctc\.ctc_lo\.bias"):
        tl.load(tmp_path)
    state["ctc.ctc_lo.bias"] = torch.zeros(60)
    state["ctc.extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "final.pt")
    with pytest.raises(tl.CheckpointError, match=r"1 unknown to the model: ctc\.extra"):
        tl.load(tmp_path)


def test_a_file_of_an_old_wenet_without_positional_tables_and_cmvn_is_completed(shared: Path, tmp_path: Path) -> None:
    source = shared / "parity" / "wenet" / "u2_conformer"
    shutil.copytree(source, tmp_path / "m")
    (tmp_path / "m").chmod(0o755)
    state = torch.load(source / "final.pt", weights_only=True)
    left_out = [n for n in state if n.endswith(".pe") or "global_cmvn" in n]
    assert len(left_out) == 4
    (tmp_path / "m" / "final.pt").unlink()
    torch.save({n: t for n, t in state.items() if n not in left_out}, tmp_path / "m" / "final.pt")
    model = tl.load(tmp_path / "m")
    for name in left_out:
        torch.testing.assert_close(model.state_dict()[name], state[name], atol=1e-6, rtol=1e-6)
    assert any("computed" in note for note in notes_of(model))


def test_a_folder_without_weights_is_refused_with_what_was_looked_for(shared: Path, tmp_path: Path) -> None:
    shutil.copyfile(shared / "parity" / "wenet" / "transformer" / "train.yaml", tmp_path / "train.yaml")
    with pytest.raises(tl.CheckpointError, match="a WeNet configuration, but no weights beside it") as refused:
        tl.load(tmp_path)
    assert "final.pt, avg_N.pt, epoch_N.pt" in refused.value.fix


def test_a_misspelt_path_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "whisper-base").mkdir()
    with pytest.raises(tl.CheckpointError) as refused:
        tl.load(tmp_path / "wisper-base")
    assert "whisper-base" in refused.value.fix
