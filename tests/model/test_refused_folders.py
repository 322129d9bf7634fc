"""Folders that are no models are called what they are; absurd sizes cost no memory or time."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from socpo_fast.model import load_student, save_student
from tests.helpers.model_folders import assert_refused, edit_json
from tests.helpers.tiny_tokenizers import CHATML, tiny_tokenizer

LORA = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 24)}


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.bin"])
def test_adapters_are_called_adapters(make_hf: Callable, file: str) -> None:
    """Also beside whole weights: transformers would put the adapter on top of them."""
    folder = make_hf("llama_tied")[1]
    (folder / file).write_text("{}")
    assert_refused(folder, "got an adapter; merge it into its base model first")
    (folder / "config.json").unlink()
    (folder / "model.safetensors").unlink()
    assert_refused(folder, "got an adapter; merge it into its base model first")


def test_adapter_tensors_are_called_an_adapter(make_hf: Callable) -> None:
    folder = make_hf("llama_tied")[1]
    save_file(LORA, folder / "model.safetensors")
    assert_refused(folder, "got an adapter; merge it into its base model first")


def test_a_model_in_a_subfolder_is_pointed_at(make_hf: Callable) -> None:
    """A trainer's output folder, and a run folder of this project."""
    folder = make_hf("llama_tied")[1]
    output = folder.parent / "output"
    for name in ("checkpoint-500", "checkpoint-1000"):
        shutil.copytree(folder, output / name)
    newest = output / "checkpoint-1000"
    assert_refused(output, "got 2 folders with one inside", f"such as {newest}")
    (output / "config.json").write_text("{}")
    assert_refused(output, "got 2 folders with one inside", f"such as {newest}")
    run = folder.parent / "run"
    shutil.copytree(folder, run / "checkpoints/update_000010")
    assert_refused(run, "got 1 folders with one inside", "update_000010")


@pytest.mark.parametrize(
    "file",
    [
        "optimizer.pt",
        "training_args.bin",
        "model_world_size_8_rank_0.pt",
        "global_step7/x_states.pt",
    ],
)
def test_trainer_state_is_called_that(make_hf: Callable, file: str) -> None:
    folder = make_hf("llama_tied")[1]
    (folder / "model.safetensors").unlink()
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_bytes(b"x")
    assert_refused(folder, "must hold a model, got only the state of a trainer", "model_merger")


@pytest.mark.parametrize(
    ("field", "size"),
    [
        ("num_hidden_layers", 10**9),
        ("hidden_size", 10**9),
        ("intermediate_size", 10**9),
        ("vocab_size", 10**12),
        ("num_attention_heads", 10**12),
        ("head_dim", 10**9),
        ("max_position_embeddings", 10**30),
    ],
)
def test_absurd_sizes_are_refused_at_once(make_hf: Callable, field: str, size: int) -> None:
    folder = make_hf("llama_tied")[1]
    edit_json(folder / "config.json", **{field: size})
    start = time.monotonic()
    assert_refused(folder, f"config.json: {field} must be <= ", f"got {size}; correct config.json")
    assert time.monotonic() - start < 2


def test_largest_sizes_need_no_memory(make_hf: Callable) -> None:
    """Sizes just within the limits are compared with the stored tensors, on the meta device."""
    folder = make_hf("llama_tied")[1]
    sizes: dict[str, Any] = {"num_hidden_layers": 1000, "hidden_size": 2**17, "vocab_size": 2**24}
    edit_json(folder / "config.json", **sizes)
    start = time.monotonic()
    assert_refused(folder, "is missing", "config.json asks for it")
    assert time.monotonic() - start < 20


def test_named_chat_templates_are_saved(make_hf: Callable, tmp_path: Path) -> None:
    """Both ways of storing them: a folder of templates, and a list in tokenizer_config.json."""
    templates = {"default": CHATML, "tool_use": "TOOLS" + CHATML, "rag": "RAG" + CHATML}
    folder = make_hf("llama_tied")[1]
    tokenizer = tiny_tokenizer(CHATML)
    tokenizer.chat_template = templates
    for name, in_files in (("files", True), ("list", False)):
        tokenizer.save_pretrained(tmp_path / name, save_jinja_files=in_files)
        saved = tmp_path / f"{name}_saved"
        save_student(load_student(folder), saved, tokenizer_from=tmp_path / name)
        assert AutoTokenizer.from_pretrained(saved).chat_template == templates
    assert isinstance(
        json.loads((saved / "tokenizer_config.json").read_text())["chat_template"], list
    )
