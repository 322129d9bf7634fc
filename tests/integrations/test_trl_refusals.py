"""Checks what SocraticGRPOTrainer refuses, each in words that name the option and what to do."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from socpo_fast.integrations.trl_checks import check_trainer, question_of_row
from socpo_fast.socratic.episode import RolloutOptions

trl = pytest.importorskip("trl", minversion="1.16")

import socpo_fast.integrations.trl as integration  # noqa: E402 - needs TRL, as does the helper
from tests.helpers.tiny_trl import make_data, make_model, make_trainer  # noqa: E402

REFUSED = [
    ({}, {"reward_funcs": [len]}, "reward_funcs must be left out, got .*; give it as grader="),
    ({}, {"tools": [len]}, "tools must be left out"),
    ({"scale_rewards": "none"}, {}, "args.scale_rewards must be 'group' .*, got 'none'; set it"),
    ({"loss_type": "cispo"}, {}, "loss_type must be one of grpo, .* got 'cispo'; use loss='trl'"),
    ({"delta": 2.0}, {}, "args.delta must be None for loss='fused', got 2.0; use loss='trl'"),
    ({"importance_sampling_level": "sequence"}, {}, "importance_sampling_level must be 'token'"),
    ({"top_entropy_quantile": 0.5}, {}, "args.top_entropy_quantile must be 1.0"),
    ({"mask_truncated_completions": True}, {}, "must be False since a row is a whole rollout"),
    ({"entropy_coef": 0.1}, {}, "args.entropy_coef must be 0.0"),
    ({"beta": 0.1}, {}, "args.use_bias_correction_kl must be False for loss='fused' with beta"),
    ({"repetition_penalty": 1.1}, {}, "repetition_penalty must be 1.0 .*; use generation='trl'"),
    ({"generation_kwargs": {"num_beams": 2}}, {}, "args.generation_kwargs must be None"),
    ({}, {"options": RolloutOptions(group_size=3)}, "group_size must be args.num_generations 4"),
    (
        {},
        {"options": RolloutOptions(group_size=4, attempt_limit=3)},
        "options.attempt_limit must be at least args.max_completion_length 8, .* got 3; raise it",
    ),
    ({}, {"options": RolloutOptions(group_size=4, context="template")}, "must be 'tokens'"),
    ({"chat_template_kwargs": {"x": 1}}, {}, "chat_template_kwargs must be one of"),
    ({}, {"generation": "vllm"}, "generation must be one of engine, trl, got 'vllm'"),
    ({}, {"loss": "liger"}, "loss must be one of fused, trl, got 'liger'"),
    ({}, {"peft_config": object()}, "must be without an adapter .*; use generation='trl'"),
]


@pytest.mark.parametrize(("of_trl", "ours", "message"), REFUSED)
def test_refused_in_words(
    tmp_path: Path, of_trl: dict[str, Any], ours: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^SocraticGRPOTrainer: .*{message}"):
        make_trainer(tmp_path, of_trl=of_trl, **ours)


def test_sharded_models_are_refused() -> None:
    """Also where accelerate's own configuration shards them, which TRL knows only later."""
    trainer = MagicMock(is_fsdp_enabled=True, is_deepspeed_enabled=False)
    with pytest.raises(ValueError, match="must be whole on each rank .*; use generation='trl'"):
        check_trainer(trainer, "engine", "trl")


def test_rows_without_ground_truth_are_refused(tmp_path: Path) -> None:
    data = make_data().remove_columns("ground_truth")
    with pytest.raises(ValueError, match="ground_truth must be a column of text, got None"):
        make_trainer(tmp_path, train_dataset=data).train()


def test_rows_that_ask_nothing_are_refused() -> None:
    answered = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "4"}]
    with pytest.raises(ValueError, match="^SocraticGRPOTrainer: the last message must be the user"):
        question_of_row({"prompt": answered, "ground_truth": "4"}, 0)
    image = [{"role": "user", "content": [{"type": "image"}]}]
    with pytest.raises(ValueError, match="^SocraticGRPOTrainer: the user message must have text"):
        question_of_row({"prompt": image, "ground_truth": "4"}, 0)


def test_parts_of_a_group_are_refused(tmp_path: Path) -> None:
    """The engine forks a prompt into a whole group, so a batch must not end amid one."""
    trainer = make_trainer(tmp_path, of_trl={"num_generations_eval": 3}, eval_dataset=make_data(6))
    with pytest.raises(ValueError, match="rows of a rank must be whole groups of 3 .*, got 8; "):
        trainer.evaluate()


def test_soft_capped_logits_are_refused(tmp_path: Path) -> None:
    model = make_model()
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="final_logit_softcapping must be none .* got 30.0"):
        make_trainer(tmp_path, model=model)


def test_other_versions_of_trl_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl, "__version__", "1.17.0")
    with pytest.raises(ImportError, match=r"TRL must be 1\.16\.x, .* got 1\.17\.0; pip install"):
        importlib.reload(integration)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"TRL must be installed, .*; pip install"):
        importlib.reload(integration)
