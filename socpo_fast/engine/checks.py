"""Checks what callers hand to the engine, before any state has changed.

Each function is called by the method of Engine that its errors name. A request that passes can be
served: the scheduler relies on every single sequence fitting into the pool (Scheduler.plan).
"""

from collections import Counter
from collections.abc import Sequence as Seq

from socpo_fast.engine.pages import PagePool
from socpo_fast.engine.sequence import Sequence
from socpo_fast.model.config import ModelConfig
from socpo_fast.ops._checks import check_rule
from socpo_fast.ops.paged_attention import check_head_dim
from socpo_fast.types import Attempt, RolloutKey, SamplingParams


def check_settings(
    head_dim: int,
    page_size: int,
    max_running: int,
    token_budget: int,
    tokens_per_sync: int | None,
) -> None:
    """Refuses numbers that an engine could never run with."""
    # The engine calls the registered op, which does not check it again.
    check_head_dim("Engine", head_dim)
    is_power_of_two = page_size >= 1 and page_size.bit_count() == 1
    check_rule("Engine", "page_size", page_size, is_power_of_two, "a power of two")
    # tokens_per_sync None means the device's default, which is valid.
    if min(limits := (max_running, token_budget, tokens_per_sync or 1)) < 1:
        raise ValueError(
            f"Engine: max_running, token_budget and tokens_per_sync must be >= 1, got {limits}"
        )


def check_fits(
    where: str, token_ids: Seq[int], params: SamplingParams, config: ModelConfig, pool: PagePool
) -> None:
    """Refuses token ids outside the vocabulary, and contexts too long for the model or the pool."""
    is_in_vocab = len(token_ids) > 0 and min(token_ids) >= 0 and max(token_ids) < config.vocab_size
    check_rule(
        where,
        "token ids",
        list(token_ids[:8]),
        is_in_vocab,
        f"non-empty and in [0, {config.vocab_size})",
    )
    num_tokens = len(token_ids) + params.max_new_tokens
    if num_tokens > config.max_position_embeddings:
        raise ValueError(
            f"{where}: prompt + max_new_tokens must be <= the model's "
            f"{config.max_position_embeddings} positions, "
            f"got {len(token_ids)} + {params.max_new_tokens}; shorten the prompt or lower "
            "max_new_tokens"
        )
    # Against the whole pool, not the free pages: other sequences finish or are preempted in time.
    if (num_needed := pool.pages_for(num_tokens)) > pool.num_pages:
        raise ValueError(
            f"{where}: need {num_needed} pages of {pool.page_size} tokens, the pool has "
            f"{pool.num_pages}; "
            "raise engine.kv_cache_gib or lower max_new_tokens"
        )


def check_key(where: str, key: tuple[int, int], in_flight: Counter[RolloutKey]) -> RolloutKey:
    """Returns the key as a RolloutKey; refuses one beyond 64 bits or with rollouts in flight."""
    is_valid = len(key) == 2 and all(isinstance(n, int) and -(2**63) <= n < 2**63 for n in key)
    check_rule(where, "key", key, is_valid, "two 64-bit integers")
    rollout_key = RolloutKey(*key)
    # Two rollouts in flight under one key would draw the same noise.
    if num_rollouts := in_flight[rollout_key]:
        raise ValueError(
            f"{where}: key must have no rollout in flight, got {tuple(key)} with {num_rollouts}; "
            "release or cancel them first, or take another key"
        )
    return rollout_key


def check_resume(
    attempt: Attempt, old: Sequence | None, suffix_ids: Seq[int], kept_tokens: int
) -> Sequence:
    """Returns the pinned sequence of an attempt, checked to be resumable like this."""
    if old is None:
        raise ValueError(
            "resume: attempt must be finished, neither released nor resumed before, got "
            f"{attempt.key} rollout "
            f"{attempt.rollout_idx} attempt {attempt.attempt_idx}; submit the whole context instead"
        )
    if not suffix_ids:
        raise ValueError(
            "resume: suffix_ids must be non-empty, got none; the next attempt needs a context of "
            "its own"
        )
    check_rule(
        "resume",
        "kept_tokens",
        kept_tokens,
        1 <= kept_tokens <= len(old.token_ids),
        f"in [1, {len(old.token_ids)}]",
        f"the row is {old.attempt_start} tokens of context and {attempt.num_tokens} sampled ones",
    )
    return old
