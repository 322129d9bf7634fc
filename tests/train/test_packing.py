"""Packing against a reading of each token's own path, token by token."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from socpo_fast.train.packing import PackedMicrobatch, count_unique_tokens, pack_rollouts
from socpo_fast.types import Rollout
from tests.train.rollouts import contexts, make_rollout, make_rollouts


def paths(microbatch: PackedMicrobatch) -> list[list[int]]:
    """Row -> the rows it attends to, itself last."""
    assert [0, *(segment.end for segment in microbatch.segments)] == [
        *(segment.start for segment in microbatch.segments),
        microbatch.tokens_forwarded,
    ]
    found = []
    for start, end, context in microbatch.segments:
        ancestors = [row for first, last in context for row in range(first, last)]
        found += [ancestors + list(range(start, row + 1)) for row in range(start, end)]
    return found


def assert_every_loss_token_sees_what_the_sampler_saw(
    rollouts: list[Rollout], microbatches: list[PackedMicrobatch]
) -> None:
    packed_attempts = []
    for microbatch in microbatches:
        row_paths, ids = paths(microbatch), microbatch.token_ids_T.tolist()
        assert microbatch.positions_T.tolist() == [len(path) - 1 for path in row_paths]
        seen_by_attempt: dict[int, list[tuple[list[int], int]]] = {}
        rows, targets = microbatch.rows_N.tolist(), microbatch.targets_N.tolist()
        for row, target, attempt in zip(rows, targets, microbatch.attempt_of_token_N.tolist(), strict=True):
            seen_by_attempt.setdefault(attempt, []).append(([ids[other] for other in row_paths[row]], target))
        assert list(seen_by_attempt) == list(range(len(microbatch.attempts)))
        for number, (place, attempt_idx) in enumerate(microbatch.attempts):
            before, sampled = contexts(rollouts[place])[attempt_idx], rollouts[place].attempts[attempt_idx].token_ids
            assert seen_by_attempt[number] == [(before + sampled[:t], target) for t, target in enumerate(sampled)]
        packed_attempts += microbatch.attempts
    every = [(place, k) for place, rollout in enumerate(rollouts) for k in range(len(rollout.attempts))]
    assert sorted(packed_attempts) == every


@pytest.mark.parametrize("packing", ["tree", "rows"])
@pytest.mark.parametrize("token_budget", [1, 20, 45, 10_000])  # alone, a few, part of a group, all
def test_every_loss_token_sees_what_the_sampler_saw(packing: str, token_budget: int) -> None:
    rollouts = make_rollouts()
    microbatches = pack_rollouts(rollouts, packing=packing, token_budget=token_budget)
    assert_every_loss_token_sees_what_the_sampler_saw(rollouts, microbatches)


@st.composite
def random_rollouts(draw: st.DrawFn) -> list[Rollout]:
    """Up to three questions with up to three rollouts of up to four attempts, cut anywhere that is allowed."""
    rollouts, size = [], st.integers(1, 4)
    for question_idx in range(draw(size)):
        prompt_ids = list(range(draw(size)))
        for rollout_idx in range(draw(st.integers(1, 3))):
            lengths = draw(st.lists(size, min_size=1, max_size=4))
            bridge_lengths = [draw(st.integers(0, 3)) for _ in lengths[1:]]
            cuts, seen = [], len(prompt_ids)
            for length, bridge_length in zip(lengths, bridge_lengths, strict=False):
                cuts.append(draw(st.none() | st.integers(1 - seen, length)))
                seen += (length if cuts[-1] is None else cuts[-1]) + bridge_length
            rollouts.append(make_rollout(question_idx, rollout_idx, prompt_ids, lengths, bridge_lengths, cuts))
    return rollouts


@settings(max_examples=200, deadline=None, derandomize=True)
@given(random_rollouts(), st.sampled_from(["tree", "rows"]), st.sampled_from([1, 15, 1000]))
def test_any_rollouts(rollouts: list[Rollout], packing: str, token_budget: int) -> None:
    microbatches = pack_rollouts(rollouts, packing=packing, token_budget=token_budget)
    assert_every_loss_token_sees_what_the_sampler_saw(rollouts, microbatches)
    leaves = len(rollouts)
    for rollout in rollouts:
        for k, attempt in enumerate(rollout.attempts[:-1]):
            leaves += rollout.seam(k)[0] < rollout.context_length(k) + attempt.num_tokens
    if packing == "tree" and token_budget == 1000:
        assert microbatches[0].tokens_forwarded == count_unique_tokens(rollouts) - leaves


def test_tree_forwards_each_node_once_but_the_last_token_of_a_leaf() -> None:
    rollouts = make_rollouts()
    (microbatch,) = pack_rollouts(rollouts, packing="tree", token_budget=10_000)
    prompts = 5 + 1 + 2 + 5
    attempts_and_bridges = 4 + (11 + 2) + (9 + 4) + (3 + 3) + 3 + (16 + 6) + (15 + 4) + (8 + 2) + (8 + 2) + (6 + 2) + 4
    attempts_and_bridges += (9 + 3) + (8 + 2) + (10 + 5) + (12 + 2) + (8 + 2)
    leaves = 11 + 1 + 1 + 2 + 1 + 1  # chains; tails of the cuts 2, 3, (1, 2), 3 and 0
    leaves += 5 + 2 + 2 + 1 + 2 + 1  # chains; attempts that negative cuts hide, and one that is cut at 2
    assert count_unique_tokens(rollouts) == prompts + attempts_and_bridges
    assert microbatch.tokens_forwarded == prompts + attempts_and_bridges - leaves
    (rows,) = pack_rollouts(rollouts, packing="rows", token_budget=10_000)
    assert rows.tokens_forwarded == microbatch.tokens_forwarded + 5 * (7 - 1) + 1 * (5 - 1) + 2 * (3 - 1)


@pytest.mark.parametrize("packing", ["tree", "rows"])
def test_budget_holds_unless_a_rollout_is_larger_by_itself(packing: str) -> None:
    rollouts = make_rollouts()
    for token_budget in (1, 12, 25, 60):
        for microbatch in pack_rollouts(rollouts, packing=packing, token_budget=token_budget):
            num_rollouts = len({place for place, _ in microbatch.attempts})
            assert microbatch.tokens_forwarded <= token_budget or num_rollouts == 1


def test_group_that_fits_stays_together() -> None:
    prompts = {question: [question] * 10 for question in range(3)}
    rollouts = [make_rollout(question, idx, prompts[question], [6]) for idx in range(4) for question in range(3)]
    microbatches = pack_rollouts(rollouts, packing="tree", token_budget=45)  # a group is 10 + 4 * 5
    assert [microbatch.tokens_forwarded for microbatch in microbatches] == [30, 30, 30]
    split = pack_rollouts(rollouts, packing="tree", token_budget=20)  # prompt and two rollouts
    assert [microbatch.tokens_forwarded for microbatch in split] == [20] * 6


def test_nothing_to_train() -> None:
    assert pack_rollouts([], packing="tree", token_budget=5) == []
    assert pack_rollouts([make_rollout(0, 0, [1], [])], packing="rows", token_budget=5) == []


def test_refusals() -> None:
    with pytest.raises(ValueError, match="packing must be 'tree' or 'rows', got 'trie'"):
        pack_rollouts([], packing="trie", token_budget=5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="token_budget must be >= 1, got 0"):
        pack_rollouts([], packing="tree", token_budget=0)
    not_shown = make_rollout(0, 0, [1], [2, 2])
    not_shown.turns[0].guidance = None
    bad = {
        r"rollouts\[0\].prompt_ids must be non-empty": make_rollout(0, 0, [], [2]),
        r"turns\[1\].attempt must have tokens, got none": make_rollout(0, 0, [1], [2, 0]),
        r"turns\[0\].guidance must have been shown, got None": not_shown,
        r"\[0\].guidance.kept_tokens must be in \[1, 6\], .* got 7": make_rollout(0, 0, [1] * 4, [2, 2], [1], [3]),
        r"\[0\].guidance.kept_tokens must be in \[1, 3\], .* got 0": make_rollout(0, 0, [1], [2, 2], [1], [-1]),
        r"\[1\].guidance.kept_tokens must be in \[1, 6\], .* got 0": make_rollout(
            0, 0, [1, 2], [5, 2, 2], [3, 1], [-1, -4]
        ),
    }
    for message, rollout in bad.items():
        with pytest.raises(ValueError, match=message):
            pack_rollouts([rollout], packing="tree", token_budget=5)


def test_packing_is_quick() -> None:
    rollouts = [make_rollout(idx // 8, idx, [idx // 8] * 100, [100, 100], [20]) for idx in range(128)]
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        pack_rollouts(rollouts, packing="tree", token_budget=4096)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.1  # 7 ms on an idle core; a packer that walks tokens one by one takes longer than this
