"""What the plan refuses, in which words, and that each piece of its advice helps."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from socpo_fast.cli import main
from socpo_fast.engine import Engine
from socpo_fast.report.cards import CARDS, Card
from socpo_fast.report.plan import plan_table
from socpo_fast.socratic.bridge import Bridge
from socpo_fast.socratic.teachers.base import TeacherPrompt
from socpo_fast.socratic.teachers.local import LocalTeacher
from socpo_fast.types import SamplingParams
from tests.helpers.plans import Planner, planner

__all__ = ["planner"]  # a fixture

GIB = 2**30

TOO_MANY = "plan: the run must fit into the {} GiB of {}, got {} GiB, {} too many; "
LENGTH = "plan: --{}-tokens must be an integer from 1 to {}, got '{}'; name one, or leave it out"
LARGER = "use a smaller model or a larger card"
NO_CARD = (
    "'Torch not compiled with CUDA enabled'; install a build of torch with CUDA"
    if torch.version.cuda is None
    else "'Found no NVIDIA driver on your system'; install a driver that fits this torch, or a "
    "torch that fits the driver"
)


def test_a_local_teacher_beside_4b_is_refused(planner: Planner) -> None:
    teacher = {"teacher__kind": "local", "teacher__path": str(planner.model("Qwen3-8B"))}
    with pytest.raises(ValueError, match="^plan: ") as refused:
        planner("Qwen3-4B", **teacher)
    assert str(refused.value) == TOO_MANY.format("79.1", "H100", "84.4", "5.3") + (
        f"put the teacher behind an endpoint, {LARGER}"
    )
    assert planner("Qwen3-4B", teacher__kind="retry").left >= 0


def test_a_card_in_use_by_others_is_named(planner: Planner) -> None:
    card = CARDS["h100"]._replace(others_gib=12.25)
    with pytest.raises(ValueError, match="^plan: ") as refused:
        planner("Qwen3-4B", card)
    card_name = "H100, 12.2 of them held by others (a card in use by others)"
    assert str(refused.value) == TOO_MANY.format("79.1", card_name, "71.9", "5.1") + (
        f"use a free card, {LARGER}"
    )
    plan = planner("Qwen3-1.7B", card)
    on_free_card = planner("Qwen3-1.7B")
    assert plan.config.train == on_free_card.config.train, (
        "results must not depend on what others hold"
    )
    assert plan.shared + 12.25 * GIB <= on_free_card.shared + plan.page_bytes
    assert "  held by others                               12.25\n" in plan_table(plan)


REFUSED = {
    "fp32 of 4B as it is": (
        ["--train.checkpointing", "false"],
        TOO_MANY.format("79.1", "H100", "96.2", "17.1") + f"set train.checkpointing true, {LARGER}",
    ),
    "card": (
        ["--card", "h10"],
        f"plan: --card must be one of {', '.join(CARDS)}, got h10; did you mean h100?",
    ),
    "cards that begin so": (
        ["--card", "A100"],
        f"plan: --card must be one of {', '.join(CARDS)}, got A100; did you mean a100-80 or "
        "a100-40?",
    ),
    "no such card": (
        ["--card", "tpu"],
        f"plan: --card must be one of {', '.join(CARDS)}, got tpu; name one; without it, this "
        "machine's own is asked",
    ),
    "no card here": (
        ["--card", "none", "--run.device", "cuda"],
        f"plan: run.device: cuda must be a card that torch {torch.__version__} can use, got "
        f"{NO_CARD}, or name a kind of card with --card: {', '.join(CARDS)}",
    ),
    "a card for a run on a CPU": (
        ["--run.device", "cpu"],
        "plan: run.device must be cuda or left out with --card, got 'cpu'; leave one out",
    ),
    "no folder": (
        ["--student.path", "FOLDER"],
        "FOLDER/config.json: is missing; a Hugging Face folder has one",
    ),
    "no tokens": (
        ["--answer-tokens", "0"],
        LENGTH.format("answer", "rollout.max_new_tokens, 1024", "0"),
    ),
    "more tokens than an answer has": (
        ["--answer-tokens", "1025"],
        LENGTH.format("answer", "rollout.max_new_tokens, 1024", "1025"),
    ),
    "more tokens than a prompt has": (
        ["--prompt-tokens", "2049"],
        LENGTH.format("prompt", "data.max_prompt_tokens, 2048", "2049"),
    ),
    "digits of another script": (
        ["--guidance-tokens", "1\u0663"],
        LENGTH.format("guidance", "rollout.guidance_limit, 2048", "1\u0663"),
    ),
    "a small cache": (
        ["--engine.kv_cache_gib", "0.5"],
        "plan: engine.kv_cache_gib must be >= 1.7, the longest context of 6176 tokens, got 0.5; "
        f"set engine.kv_cache_gib auto, {LARGER}",
    ),
    "a large cache": (
        ["--engine.kv_cache_gib", "40", "--loss.kl_coef", "0.1", "--train.token_budget", "8192"],
        TOO_MANY.format("79.1", "H100", "111.8", "32.7")
        + "set engine.kv_cache_gib auto and set loss.kl_coef 0, "
        f"set engine.kv_cache_gib auto and set student.dtype bfloat16, {LARGER}",
    ),
    "a large budget": (
        ["--student.dtype", "bfloat16", "--train.token_budget", "300000"],
        TOO_MANY.format("79.1", "H100", "211.0", "131.9") + f"lower train.token_budget, {LARGER}",
    ),
    "longer answers than the model": (
        ["--rollout.max_new_tokens", "40960"],
        "rollout: rollout.max_new_tokens must be below the model's 40960 positions, got 40960; "
        "lower it",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(
    planner: Planner, case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, message = REFUSED[case]
    words = [word.replace("FOLDER", str(tmp_path)) for word in words]
    assert main(planner.words("Qwen3-4B", *words)) == 2
    assert capsys.readouterr().err == message.replace("FOLDER", str(tmp_path)) + "\n"


NO_MODELS = {
    "adapter_config.json": "must hold a whole model, got an adapter; merge it",
    "adapter_model.safetensors": "must hold a whole model, got an adapter; merge it",
    "optimizer.pt": "must hold a model, got only the state of a trainer; save the model with",
    "checkpoint-5/config.json": "must hold a model itself, got 1 folders with one inside; give one",
}


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("file", NO_MODELS)
def test_folders_are_called_what_they_are(
    planner: Planner, file: str, role: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the words of load_student, although nothing has a config.json."""
    folder = tmp_path / "folder"
    path = folder / file
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    if path.suffix != ".pt":
        (path.parent / "model.safetensors").write_bytes(b"")
    words = ["--teacher.kind", "local"] if role == "teacher" else []
    assert main(planner.words("Qwen3-0.6B", *words, f"--{role}.path", str(folder))) == 2
    assert capsys.readouterr().err.startswith(f"{folder}: {NO_MODELS[file]}")


# Advice in a refusal -> settings that follow it. Numbers are the smallest that are still useful.
FOLLOWED: dict[str, dict[str, Any]] = {
    "set train.checkpointing true": {"train__checkpointing": True},
    "lower train.token_budget": {"train__token_budget": 1},
    "lower data.max_prompt_tokens": {"data__max_prompt_tokens": 256},
    "lower rollout.max_new_tokens": {"rollout__max_new_tokens": 256},
    "lower rollout.guidance_limit": {"rollout__guidance_limit": 128},
    "lower engine.max_running": {"engine__max_running": 8},
    "set engine.kv_cache_gib auto": {"engine__kv_cache_gib": "auto"},
    "set loss.kl_coef 0": {"loss__kl_coef": 0.0},
    "set student.dtype bfloat16": {"student__dtype": "bfloat16"},
}
# case -> model, card, settings, and all advice of the refusal except for LARGER, which comes last.
LEVERS: dict[str, tuple[str, Card, dict[str, Any], list[str]]] = {
    "graph pools, draws": (
        "Qwen3-0.6B",
        CARDS["rtx4090"],
        {"engine__max_running": 16384},
        ["lower engine.max_running"],
    ),
    "a fixed cache": (
        "Qwen3-0.6B",
        CARDS["rtx4090"],
        {"engine__kv_cache_gib": 12.0},
        ["set engine.kv_cache_gib auto"],
    ),
    "a small cache": (
        "Qwen3-0.6B",
        CARDS["l4"],
        {"engine__kv_cache_gib": 0.5},
        [
            "lower data.max_prompt_tokens",
            "lower rollout.max_new_tokens",
            "lower rollout.guidance_limit",
            "set engine.kv_cache_gib auto",
        ],
    ),
    "a fixed budget": (
        "Qwen3-4B",
        CARDS["h100"],
        {"train__token_budget": 300_000},
        ["lower train.token_budget"],
    ),
    "long answers": (
        "Qwen3-4B",
        CARDS["h100"],
        {"rollout__max_new_tokens": 20_000, "rollout__max_attempts": 3},
        ["lower rollout.max_new_tokens"],
    ),
    "a reference": (
        "Qwen3-4B",
        CARDS["h100"],
        {"loss__kl_coef": 0.1, "student__dtype": "float32"},
        ["set loss.kl_coef 0", "set student.dtype bfloat16"],
    ),
    "in use by others": (
        "Qwen3-4B",
        CARDS["h100"]._replace(others_gib=12.0),
        {},
        ["use a free card"],
    ),
    "in use, but too small": ("Qwen3-8B", CARDS["rtx4090"]._replace(others_gib=9.0), {}, []),
    "far too small": (
        "Qwen3-8B",
        CARDS["l4"],
        {"engine__kv_cache_gib": 12.0, "loss__kl_coef": 0.1},
        [],
    ),
}


@pytest.mark.parametrize("case", LEVERS)
def test_each_lever_helps_alone(planner: Planner, case: str) -> None:
    name, card, settings, levers = LEVERS[case]
    with pytest.raises(ValueError, match="^plan: ") as refused:
        planner(name, card, **settings)
    assert str(refused.value).partition("; ")[2].split(", ") == [*levers, LARGER]
    for lever in levers:
        if lever == "use a free card":
            planner(name, card._replace(others_gib=0.0), **settings)
        else:
            planner(name, card, **settings | FOLLOWED[lever])
    for lever, changes in FOLLOWED.items():
        if lever not in levers:
            with pytest.raises(ValueError, match="^plan: "):
                planner(name, card, **settings | changes)


def test_a_teacher_without_room_is_refused(planner: Planner) -> None:
    """The message is the teacher's own, but it comes before the student is loaded."""
    teacher = {"teacher__kind": "local", "teacher__path": str(planner.model("Qwen3-1.7B"))}
    # 1 GiB are 292 pages of 32 tokens of 28 layers, 8 heads of 128, in bf16.
    for max_new_tokens, gib, num_tokens in ((9344, 1.0, 9344), (40960, 8.0, 40960)):
        engine = cast(Engine, SimpleNamespace(max_tokens=num_tokens))
        params = SamplingParams(
            temperature=1.0, max_new_tokens=max_new_tokens, eos_ids=(0,), seed=0
        )
        bridge = cast(Bridge, SimpleNamespace(after=""))
        with pytest.raises(ValueError, match=f"context of {num_tokens} tokens") as teacher_refuses:
            LocalTeacher(engine, bridge=bridge, prompt=cast(TeacherPrompt, None), params=params)
        limits = {"teacher__kv_cache_gib": gib, "teacher__max_new_tokens": max_new_tokens}
        with pytest.raises(ValueError, match=r"^teacher\.max_new_tokens") as refused:
            planner("Qwen3-0.6B", **teacher, **limits)
        assert str(refused.value) == str(teacher_refuses.value)
        planner("Qwen3-0.6B", **teacher, **limits | {"teacher__max_new_tokens": max_new_tokens - 1})
