"""Checks saving and loading of Hugging Face folders, and every way in which one can be wrong."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from socpo_fast.model import load_student, save_student, weights
from tests.helpers.model_folders import assert_refused, edit_json, edit_tensors

EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
NORM = "model.norm.weight"
IDS = torch.arange(12)[None]


# Saving and loading


@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 6000], ids=["single", "sharded"])
@pytest.mark.parametrize(
    "family", ["llama_biases", "llama3_rope", "mistral", "qwen2_untied", "qwen3_tied"]
)
def test_saved_student_loads_in_transformers(
    make_hf: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    shard_bytes: int,
) -> None:
    """Saving undoes the fusion of weights: transformers loads the folder and has its old logits."""
    monkeypatch.setattr(weights, "SHARD_BYTES", shard_bytes)
    reference, folder = make_hf(family)
    student = load_student(folder)
    save_student(student, tmp_path / "saved")

    result: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    loaded, report = result
    assert loaded.dtype == torch.float32
    assert not any(
        report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
    ), report
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, reference(IDS).logits)
    again = load_student(tmp_path / "saved")
    assert again.config == student.config
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), student.parameters(), strict=True)
    )
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) == 1 or shard_bytes == 6000
    # No partly written folder is left beside it.
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([family, "saved"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_is_the_requested_one(make_hf: Callable, tmp_path: Path, dtype: str) -> None:
    """Parameters are loaded and saved in the requested dtype; rotary frequencies stay fp32."""
    reference, folder = make_hf("qwen2_tied", dtype=torch.bfloat16)
    student = load_student(folder, dtype=dtype)
    assert {str(parameter.dtype) for parameter in student.parameters()} == {f"torch.{dtype}"}
    assert student.inv_freq.dtype == torch.float32 and student.inv_freq.device.type == "cpu"
    assert torch.equal(student.embed.weight.bfloat16(), reference.get_input_embeddings().weight)
    save_student(student, tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())["dtype"] == dtype


def test_tied_head_is_one_parameter_and_trainable(make_hf: Callable) -> None:
    student = load_student(make_hf("llama_tied")[1])
    assert student.lm_head.weight is student.embed.weight
    assert all(
        parameter.requires_grad and not parameter.is_meta for parameter in student.parameters()
    )


def test_redundant_tensors_are_accepted(make_hf: Callable) -> None:
    """Tensors that hold nothing new load: a copy of a tied LM head, old Llama's rotary table."""
    folder = make_hf("llama_tied")[1]
    embed = load_file(folder / "model.safetensors")[EMBED]
    edit_tensors(
        folder / "model.safetensors",
        **{HEAD: embed.clone(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)},
    )
    load_student(folder)


def test_save_copies_the_tokenizer(make_hf: Callable, tmp_path: Path) -> None:
    folder = make_hf("llama_tied")[1]
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ):
        (folder / name).write_text(f"the source's {name}")
    (tmp_path / "saved").mkdir()  # the target may exist if it is empty
    save_student(load_student(folder), tmp_path / "saved", tokenizer_from=folder)
    copied = {path.name for path in (tmp_path / "saved").iterdir()}
    assert copied == {path.name for path in folder.iterdir()}
    assert (
        tmp_path / "saved/chat_template.jinja"
    ).read_text() == "the source's chat_template.jinja"


def test_invalid_saves_are_refused(make_hf: Callable, tmp_path: Path) -> None:
    folder = make_hf("llama_tied")[1]
    student = load_student(folder)
    with pytest.raises(ValueError, match="save_student: folder must be new or empty, got"):
        save_student(student, folder)
    with pytest.raises(ValueError, match="tokenizer_from must hold tokenizer files, got"):
        save_student(student, tmp_path / "saved", tokenizer_from=tmp_path)
    student.config = dataclasses.replace(student.config, rope_theta=1.0)
    with pytest.raises(ValueError, match="student.config must agree with its .raw"):
        save_student(student, tmp_path / "saved")
    student.config = dataclasses.replace(student.config, raw={})
    with pytest.raises(ValueError, match="student.config must agree with its .raw"):
        save_student(student, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_interrupted_save_leaves_nothing(
    make_hf: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while a file of weights is written leaves no folder behind."""
    student = load_student(make_hf("llama_tied")[1])

    def interrupt(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_student(student, tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["llama_tied"]


# Refusals


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (NORM, ..., "tensor model.norm.weight is missing (1 in all)"),
        (
            "model.layers.2.mlp.up_proj.weight",
            torch.ones(2),
            "model.layers.2.mlp.up_proj.weight is extra (1 in all)",
        ),
        (
            "model.layers.0.self_attn.q_proj.bias",
            torch.ones(24),
            "model.layers.0.self_attn.q_proj.bias is extra",
        ),
        (
            "model.layers.1.self_attn.k_proj.weight",
            torch.ones(13, 24),
            "must be [12, 24] by config.json, got [13, 24]",
        ),
        (
            NORM,
            torch.ones(24, dtype=torch.int8),
            "model.norm.weight must be of F64|F32|BF16|F16, got I8",
        ),
        (
            HEAD,
            torch.zeros(53, 24),
            "lm_head.weight must equal model.embed_tokens.weight under tie_word_embeddings",
        ),
    ],
)
def test_wrong_tensor_is_refused(make_hf: Callable, name: str, value: Any, message: str) -> None:
    folder = make_hf("llama_tied")[1]
    edit_tensors(folder / "model.safetensors", **{name: value})
    assert_refused(folder, str(folder), message)


def test_missing_untied_head_is_refused(make_hf: Callable) -> None:
    folder = make_hf("llama_untied")[1]
    edit_tensors(folder / "model.safetensors", **{HEAD: ...})
    assert_refused(folder, "tensor lm_head.weight is missing")


def test_wrong_folder_is_refused(make_hf: Callable, tmp_path: Path) -> None:
    assert_refused(tmp_path / "nowhere", "must be a local Hugging Face folder, got", "nowhere")
    assert_refused(tmp_path, "config.json: is missing")
    folder = make_hf("llama_tied")[1]
    with pytest.raises(
        ValueError, match="dtype must be one of float32, bfloat16, float16, got 'fp32'"
    ):
        load_student(folder, dtype="fp32")

    (folder / "model.safetensors").write_bytes(b"not a safetensors file")
    assert_refused(folder, "model.safetensors: must be a safetensors file, got")
    (folder / "model.safetensors").unlink()
    assert_refused(folder, "model.safetensors is missing, and so is model.safetensors.index.json")
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert_refused(folder, "weights must be safetensors, got pickle files")
    (folder / "config.json").write_text("{")
    assert_refused(folder, "config.json: must be JSON, got")
    (folder / "config.json").write_text("[]")
    assert_refused(folder, "config.json: must be a JSON object, got list")


def test_wrong_shards_are_refused(make_hf: Callable) -> None:
    folder = make_hf("llama_tied", max_shard_size="10KB")[1]
    index = folder / "model.safetensors.index.json"
    shards = sorted(folder.glob("*.safetensors"))
    weight_map = json.loads(index.read_text())["weight_map"]

    edit_json(index, weight_map={name: f"../{file}" for name, file in weight_map.items()})
    assert_refused(folder, "weight_map must map tensor names to file names of this folder")
    edit_json(index, weight_map=weight_map)
    (folder / "copy.safetensors").write_bytes(shards[0].read_bytes())
    edit_json(index, weight_map=weight_map | {NORM: "copy.safetensors"})
    assert_refused(folder, "must be stored once, got it in a second file")
    edit_json(index, weight_map=weight_map)
    shards[0].unlink()
    assert_refused(
        folder, f"{shards[0].name}: is missing, but model.safetensors.index.json names it"
    )
