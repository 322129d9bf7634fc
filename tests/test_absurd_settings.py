"""Settings that would fill the memory or never end are refused at once, and the limit is named."""

from __future__ import annotations

import re
import time

import pytest

from socpo_fast.config import Config, load_config
from socpo_fast.config.text import fields_of, rule_of

ENDPOINT = {"teacher.kind": "endpoint", "teacher.url": "http://x/v1", "teacher.model": "m"}
LIMITS = {
    "run.num_batches": 10**9,
    "run.checkpoint_every_updates": 10**9,
    "run.keep_checkpoints": 10**9,
    "run.trace_batches": 10**9,
    "data.max_prompt_tokens": 2**24,
    "data.builtin_train_questions": 20_000,
    "data.builtin_eval_questions": 20_000,
    "rollout.questions_per_batch": 2**18,
    "rollout.group_size": 2**18,
    "rollout.max_attempts": 256,
    "rollout.max_new_tokens": 2**24,
    "rollout.attempt_limit": 10**9,
    "rollout.guidance_limit": 10**9,
    "teacher.max_new_tokens": 2**24,
    "teacher.max_concurrency": 4096,
    "train.questions_per_update": 2**18,
    "train.epochs": 100,
    "train.warmup_updates": 10**9,
    "train.max_bad_updates": 10**9,
    "train.token_budget": 2**24,
    "engine.kv_cache_gib": 4096,
    "engine.page_size": 1024,
    "engine.max_running": 65536,
    "engine.token_budget": 2**24,
    "eval.every_updates": 10**9,
    "eval.samples": 4096,
    "eval.max_questions": 10**9,
}


@pytest.mark.parametrize("name", LIMITS)
def test_absurd_sizes_are_refused_by_their_limit(name: str) -> None:
    settings = ENDPOINT if name.startswith("teacher.") else {}
    for value in (LIMITS[name] + 1, 10**12):
        with pytest.raises(
            ValueError, match=rf"config: {re.escape(name)} must be .* <= {LIMITS[name]}\b.*, got "
        ):
            load_config(None, {**settings, name: str(value)})


def test_every_count_has_a_limit() -> None:
    """Whole numbers that are no seed, over all kinds of teachers and rewards."""
    counts = {name for name in fields_of(Config) if "an integer" in rule_of(Config, name)}
    assert counts - LIMITS.keys() == {"run.seed", "run.threads", "teacher.max_retries"}
    for name in counts:
        assert re.search(r"an integer .*<=? \d+", rule_of(Config, name)), name


def test_limits_themselves_are_taken() -> None:
    # These have to fit each other as well.
    sizes = {"rollout.questions_per_batch", "rollout.group_size", "train.questions_per_update"}
    for name in LIMITS.keys() - sizes:
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
