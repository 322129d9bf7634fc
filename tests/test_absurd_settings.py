"""Settings that would fill the memory or never end are refused at once, and the limit is named."""

from __future__ import annotations

import re
import time

import pytest

from socpo_fast.config import load_config

ENDPOINT = {"teacher.kind": "endpoint", "teacher.url": "http://x/v1", "teacher.model": "m"}
LIMITS = {
    "data.max_prompt_tokens": 2**24,
    "data.builtin_train_questions": 20_000,
    "data.builtin_eval_questions": 20_000,
    "rollout.questions_per_batch": 2**18,
    "rollout.group_size": 2**18,
    "rollout.max_attempts": 256,
    "rollout.max_new_tokens": 2**24,
    "teacher.max_new_tokens": 2**24,
    "teacher.max_concurrency": 4096,
    "train.epochs": 100,
    "train.token_budget": 2**24,
    "engine.kv_cache_gib": 4096,
    "engine.page_size": 1024,
    "engine.max_running": 65536,
    "engine.token_budget": 2**24,
    "eval.samples": 4096,
}


@pytest.mark.parametrize("name", LIMITS)
def test_absurd_sizes_are_refused_by_their_limit(name: str) -> None:
    settings = ENDPOINT if name.startswith("teacher.") else {}
    for value in (LIMITS[name] + 1, 10**12):
        with pytest.raises(
            ValueError, match=rf"config: {re.escape(name)} must be .* <= {LIMITS[name]}\b.*, got "
        ):
            load_config(None, {**settings, name: str(value)})


def test_limits_themselves_are_taken() -> None:
    for name in LIMITS.keys() - {"rollout.questions_per_batch", "rollout.group_size"}:
        settings = ENDPOINT if name.startswith("teacher.") else {}
        load_config(None, {**settings, name: str(LIMITS[name])})


def test_thousands_of_threads_are_refused() -> None:
    for words in ("4096", str(10**12)):
        with pytest.raises(ValueError, match=r"config: run.threads must be .* <= \d+, got"):
            load_config(None, {"run.threads": words})
    load_config(None, {"run.threads": "64"})


def test_a_batch_of_too_many_rollouts_is_refused() -> None:
    """Each of the two factors is in its own range."""
    started = time.monotonic()
    with pytest.raises(
        ValueError,
        match=re.escape(
            "config: rollout.questions_per_batch * rollout.group_size must be <= 262144, got "
            "1048576; lower one of them"
        ),
    ):
        load_config(None, {"rollout.questions_per_batch": 1024, "rollout.group_size": 1024})
    load_config(None, {"rollout.questions_per_batch": 1024, "rollout.group_size": 256})
    assert time.monotonic() - started < 5
