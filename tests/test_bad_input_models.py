"""Student folders and checkpoints that cannot work are refused in one line, with exit code 2.

The files of an existing run stay as they were.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from socpo_fast.cli import main
from socpo_fast.report.tracker import read_metrics
from tests.helpers.bad_input import (
    Words,
    assert_refused,
    assert_train_refuses,
    damaged_student,
    edit_json,
    edit_tensors,
    finished_run,
    run_dir,
    snapshot,
    words_of,
    write,
)

__all__ = ["finished_run", "run_dir"]  # fixtures

NORM = "model.norm.weight"
ROUGH = "<|im_start|>{{ messages[0].content }}"


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


CASES: dict[str, tuple[Callable[[Path], Words], str]] = {
    "no such folder": (
        lambda folder: {"student.path": folder / "none"},
        "load_student: folder must be a local",
    ),
    "an empty folder": (lambda folder: {"student.path": folder}, ".*config.json: is missing"),
    "a file": (
        lambda folder: {"student.path": __file__},
        "load_student: folder must be a local Hugging Face folder, got",
    ),
    "unsupported architecture": (
        damaged_student(
            edit_json("config.json", architectures=["GPT2LMHeadModel"], model_type="gpt2")
        ),
        ".*config.json: architectures must be one of LlamaForCausalLM, MistralForCausalLM, "
        "Qwen2ForCausalLM, "
        r"Qwen3ForCausalLM, got \['GPT2LMHeadModel'\]",
    ),
    "no tokenizer": (
        damaged_student(remove("tokenizer.json")),
        "tokenizer: .*student must hold a tokenizer.json that",
    ),
    "missing config": (damaged_student(remove("config.json")), ".*config.json: is missing"),
    "broken config": (
        damaged_student(write("config.json", "{")),
        ".*config.json: must be JSON, got ",
    ),
    "config that is a list": (
        damaged_student(write("config.json", "[]")),
        ".*config.json: must be a JSON object",
    ),
    "config in Latin-1": (
        damaged_student(write("config.json", b'{"a": "\xe9"}')),
        ".*config.json: must be JSON, got",
    ),
    "missing config field": (
        damaged_student(edit_json("config.json", rms_norm_eps=None)),
        ".*: rms_norm_eps is missing",
    ),
    "config field of another kind": (
        damaged_student(edit_json("config.json", num_hidden_layers="two")),
        ".*config.json: num_hidden_layers must be an integer >= 1, got 'two'",
    ),
    "missing weights": (
        damaged_student(remove("model.safetensors")),
        ".*: model.safetensors is missing",
    ),
    "truncated weights": (
        damaged_student(truncate),
        ".*model.safetensors: must be a safetensors file, got ",
    ),
    "weights that are text": (
        damaged_student(write("model.safetensors", "x")),
        ".*: must be a safetensors file, got",
    ),
    "missing tensor": (
        damaged_student(edit_tensors(lambda tensors: tensors.pop(NORM))),
        f".*: tensor {NORM} is missing",
    ),
    "extra tensor": (
        damaged_student(edit_tensors(lambda tensors: tensors.update(extra=torch.ones(1)))),
        ".*: tensor extra is extra",
    ),
    "misshapen tensor": (
        damaged_student(edit_tensors(lambda tensors: tensors.update({NORM: torch.ones(3)}))),
        rf".*: tensor {NORM} must be \[128\] by config.json, got \[3\]",
    ),
    "tensor of integers": (
        damaged_student(edit_tensors(lambda tensors: tensors.update({NORM: tensors[NORM].int()}))),
        f".*: tensor {NORM} must be of F64",
    ),
    "NaN in a tensor": (
        damaged_student(edit_tensors(lambda tensors: tensors[NORM].__setitem__(0, torch.nan))),
        f".*: tensor {NORM} must be finite in float32, got NaN or infinity",
    ),
    "no chat template": (
        damaged_student(remove("chat_template.jinja")),
        "bridge: tokenizer must have a chat template, got none in '.*student'; use the instruct "
        "version",
    ),
    "a chat template that is broken": (
        damaged_student(write("chat_template.jinja", "{% if %}")),
        "chat template: must ",
    ),
    "a chat template without turns": (
        damaged_student(write("chat_template.jinja", ROUGH)),
        "bridge: the ",
    ),
    "broken generation_config": (
        damaged_student(write("generation_config.json", "{")),
        ".*generation_config.json: must be JSON, got ",
    ),
    "generation_config that is a list": (
        damaged_student(write("generation_config.json", "[]")),
        ".*generation_config.json: must be a JSON object, got list",
    ),
    "an eos id that is a word": (
        damaged_student(write("generation_config.json", '{"eos_token_id": "</s>"}')),
        ".*generation_config.json: eos_token_id must be an id, a list of ids or null, got '</s>'",
    ),
    "broken tokenizer": (
        damaged_student(write("tokenizer.json", '{"model": 3}')),
        "tokenizer: .*student must hold a",
    ),
    "a local teacher that is none": (
        lambda folder: {"teacher.kind": "local", "teacher.path": folder / "none"},
        "tokenizer: must be a Hugging Face folder on this machine, got '.*none'",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_train_refuses(
    case: str, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_train_refuses(CASES[case], run_dir, tmp_path, capsys)


def checkpoint_of(run_dir: Path) -> Path:
    return run_dir / "run" / "checkpoints" / "update_000001"


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "trainer_state.json", "config.json"]
)
def test_checkpoint_with_a_flipped_byte_is_refused(
    name: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_last_byte(checkpoint_of(run_dir) / name)
    old_files = snapshot(run_dir)
    assert main(words_of("train", run_dir, {"run.num_batches": 2})) == 2
    message = f"checkpoint: .*update_000001/{name} has other bytes than were written, and no other"
    assert_refused(capsys.readouterr().err, message)
    assert snapshot(run_dir) == old_files


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"config.json": 3}', '{"config.json": {"bytes": 3}}', "\x00"]
)
def test_checkpoint_with_damaged_manifest_is_refused(
    text: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = checkpoint_of(run_dir)
    (checkpoint / "manifest.json").write_text(text)
    words = {"run.resume": checkpoint, "run.name": "other"}
    assert main(words_of("train", run_dir, words)) == 2
    assert_refused(
        capsys.readouterr().err,
        "run: run.resume must be a whole checkpoint, got .*/manifest.json is missing or damaged",
    )


def test_checkpoint_of_another_model_is_refused(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A student with one layer less fits neither the run's own checkpoint nor a named one."""
    make = damaged_student(drop_last_layer)
    words = make(tmp_path)
    old_files = snapshot(run_dir)
    for changes in (
        {"run.num_batches": 2},
        {"run.name": "other", "run.resume": checkpoint_of(run_dir)},
    ):
        assert main(words_of("train", run_dir, words | changes)) == 2
        assert_refused(
            capsys.readouterr().err,
            "checkpoint: .*update_000001 must be of this student's model, got num_layers [0-9]+ "
            "instead of [0-9]+; ",
        )
    assert snapshot(run_dir) == old_files


def drop_last_layer(folder: Path) -> None:
    num_layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    edit_json("config.json", num_hidden_layers=num_layers - 1, layer_types=None)(folder)
    prefix = f"model.layers.{num_layers - 1}."
    edit_tensors(
        lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(prefix)]
    )(folder)


def test_eval_of_a_missing_checkpoint_is_refused(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old_files = snapshot(run_dir)
    assert main(words_of("eval", run_dir, {"checkpoint": run_dir / "none"})) == 2
    assert_refused(
        capsys.readouterr().err,
        "load_student: folder must be a local Hugging Face folder, got '.*none'",
    )
    assert snapshot(run_dir) == old_files


def test_truncated_checkpoint_is_skipped(run_dir: Path) -> None:
    """A warning names it, and the run resumes from the last whole checkpoint."""
    checkpoint = checkpoint_of(run_dir)
    truncated = checkpoint.with_name("update_000009")
    shutil.copytree(checkpoint, truncated)
    truncate(truncated)
    with pytest.warns(UserWarning, match="update_000009/.*; passed over for update_000001"):
        assert main(words_of("train", run_dir, {"run.num_batches": 2})) == 0
    rows = read_metrics(run_dir / "run" / "metrics.jsonl")
    assert [row["batch"] for row in rows if row["kind"] == "batch"] == [1, 2]
