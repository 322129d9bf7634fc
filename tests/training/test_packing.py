"""Checks packing against the path of each token, which is written down token by token.

A path is what a token's row attends to: the context of its attempt, then the attempt up to it. In a
packed row `visible_until_T[key]` is the first row that no longer sees `key`.
"""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from socpo_fast.training.packing import PackedMicrobatch, count_unique_tokens, pack_rollouts
from socpo_fast.types import Rollout
from tests.helpers.made_rollouts import contexts, make_rollout, make_rollouts


def paths(microbatch: PackedMicrobatch) -> list[list[int]]:
    """Returns, for each row, the rows that it attends to, itself last."""
    until = microbatch.visible_until_T.tolist()
    assert all(row < end <= microbatch.tokens_forwarded for row, end in enumerate(until))
    return [[key for key in range(row + 1) if row < until[key]] for row in range(len(until))]


def assert_loss_tokens_see_their_sampling_context(
    rollouts: list[Rollout], microbatches: list[PackedMicrobatch]
) -> None:
    """Asserts that each sampled token is predicted once, by a row with the sampler's context."""
    packed_attempts = []
    for microbatch in microbatches:
        row_paths = paths(microbatch)
        ids = microbatch.token_ids_T.tolist()
        assert microbatch.positions_T.tolist() == [len(path) - 1 for path in row_paths]
        # attempt of the microbatch -> (context, target) of each of its tokens
        predicted: dict[int, list[tuple[list[int], int]]] = {}
        rows = microbatch.rows_N.tolist()
        targets = microbatch.targets_N.tolist()
        for row, target, attempt in zip(
            rows, targets, microbatch.attempt_of_token_N.tolist(), strict=True
        ):
            predicted.setdefault(attempt, []).append(([ids[key] for key in row_paths[row]], target))
        assert list(predicted) == list(range(len(microbatch.attempts)))
        for number, (rollout_pos, attempt_idx) in enumerate(microbatch.attempts):
            context = contexts(rollouts[rollout_pos])[attempt_idx]
            sampled = rollouts[rollout_pos].attempts[attempt_idx].token_ids
            assert predicted[number] == [
                (context + sampled[:t], target) for t, target in enumerate(sampled)
            ]
        packed_attempts += microbatch.attempts
    all_attempts = [
        (rollout_pos, k)
        for rollout_pos, rollout in enumerate(rollouts)
        for k in range(len(rollout.attempts))
    ]
    assert sorted(packed_attempts) == all_attempts


@pytest.mark.parametrize("packing", ["tree", "rows"])
# A microbatch holds one rollout, a few, part of a group, all.
@pytest.mark.parametrize("token_budget", [1, 20, 45, 10_000])
def test_loss_tokens_see_their_sampling_context(packing: str, token_budget: int) -> None:
    rollouts = make_rollouts()
    microbatches = pack_rollouts(rollouts, packing=packing, token_budget=token_budget)
    assert_loss_tokens_see_their_sampling_context(rollouts, microbatches)


@st.composite
def random_rollouts(draw: st.DrawFn) -> list[Rollout]:
    """Draws up to four questions with up to three rollouts of up to four attempts.

    Each attempt may be cut anywhere that is allowed, into the prompt as well.
    """
    rollouts = []
    size = st.integers(1, 4)
    for question_idx in range(draw(size)):
        prompt_ids = list(range(draw(size)))
        for rollout_idx in range(draw(st.integers(1, 3))):
            attempt_lens = draw(st.lists(size, min_size=1, max_size=4))
            bridge_lens = [draw(st.integers(0, 3)) for _ in attempt_lens[1:]]
            cuts = []
            context_len = len(prompt_ids)
            for attempt_len, bridge_len in zip(attempt_lens, bridge_lens, strict=False):
                cuts.append(draw(st.none() | st.integers(1 - context_len, attempt_len)))
                context_len += (attempt_len if cuts[-1] is None else cuts[-1]) + bridge_len
            rollouts.append(
                make_rollout(question_idx, rollout_idx, prompt_ids, attempt_lens, bridge_lens, cuts)
            )
    return rollouts


@settings(max_examples=200, deadline=None, derandomize=True)
@given(random_rollouts(), st.sampled_from(["tree", "rows"]), st.sampled_from([1, 15, 1000]))
def test_loss_tokens_of_any_rollouts(
    rollouts: list[Rollout], packing: str, token_budget: int
) -> None:
    """Random rollouts: every loss token sees its context, and a tree forwards no node twice."""
    microbatches = pack_rollouts(rollouts, packing=packing, token_budget=token_budget)
    assert_loss_tokens_see_their_sampling_context(rollouts, microbatches)
    # The last token of a path predicts nothing and is not forwarded. A path ends at the end of a
    # rollout, and at the end of an attempt whose tail is cut off.
    leaves = len(rollouts)
    for rollout in rollouts:
        for k, attempt in enumerate(rollout.attempts[:-1]):
            leaves += rollout.next_context(k)[0] < rollout.context_length(k) + attempt.num_tokens
    if packing == "tree" and token_budget == 1000:
        assert microbatches[0].tokens_forwarded == count_unique_tokens(rollouts) - leaves


def number_nodes(rollouts: list[Rollout]) -> None:
    """Gives each node of the trees a token id of its own, so that a packed row names its node."""
    fresh = itertools.count()
    prompts = {}
    for rollout in rollouts:
        key = rollout.question_idx, tuple(rollout.prompt_ids)
        prompts.setdefault(key, [next(fresh) for _ in rollout.prompt_ids])
        rollout.prompt_ids = prompts[key]
        for turn in rollout.turns:
            turn.attempt.token_ids = [next(fresh) for _ in turn.attempt.token_ids]
            if turn.guidance is not None:
                turn.guidance.bridge_ids = [next(fresh) for _ in turn.guidance.bridge_ids]


def naive_paths(rollouts: list[Rollout]) -> dict[int, list[int]]:
    """Returns, for each node, the nodes that it sees, itself last; read off sampling contexts."""
    seen_by_node: dict[int, list[int]] = {}
    for rollout in rollouts:
        for context, attempt in zip(contexts(rollout), rollout.attempts, strict=True):
            row = context + attempt.token_ids
            for num_seen, node in enumerate(row, start=1):
                assert seen_by_node.setdefault(node, row[:num_seen]) == row[:num_seen]
    return seen_by_node


@settings(max_examples=200, deadline=None, derandomize=True)
@given(random_rollouts(), st.sampled_from(["tree", "rows"]), st.sampled_from([1, 15, 1000]))
def test_every_row_sees_what_its_node_sees(
    rollouts: list[Rollout],
    packing: str,
    token_budget: int,
) -> None:
    number_nodes(rollouts)
    expected = naive_paths(rollouts)
    inner_nodes = {node for path in expected.values() for node in path[:-1]}  # all but leaves
    forwarded = []
    for microbatch in pack_rollouts(rollouts, packing=packing, token_budget=token_budget):
        ids = microbatch.token_ids_T.tolist()
        row_paths = paths(microbatch)
        assert [[ids[row] for row in path] for path in row_paths] == [expected[i] for i in ids]
        forwarded += ids
    assert set(forwarded) == inner_nodes
    if packing == "tree" and token_budget == 1000:
        assert len(forwarded) == len(inner_nodes)


def test_tree_forwards_each_node_once() -> None:
    """The forwarded tokens, counted by hand: every node once, except for the last of each path.

    With rows instead of a tree, the prompt is forwarded once more for each further rollout.
    """
    rollouts = make_rollouts()
    (microbatch,) = pack_rollouts(rollouts, packing="tree", token_budget=10_000)
    prompts = 5 + 1 + 2 + 5
    attempts_and_bridges = (
        4 + (11 + 2) + (9 + 4) + (3 + 3) + 3 + (16 + 6) + (15 + 4) + (8 + 2) + (8 + 2) + (6 + 2) + 4
    )
    attempts_and_bridges += (9 + 3) + (8 + 2) + (10 + 5) + (12 + 2) + (8 + 2)
    # Ends of chains; tails of the cuts 2, 3, (1, 2), 3 and 0.
    leaves = 11 + 1 + 1 + 2 + 1 + 1
    # Ends of chains; attempts that negative cuts hide, and one that is cut at 2.
    leaves += 5 + 2 + 2 + 1 + 2 + 1
    assert count_unique_tokens(rollouts) == prompts + attempts_and_bridges
    assert microbatch.tokens_forwarded == prompts + attempts_and_bridges - leaves
    (rows,) = pack_rollouts(rollouts, packing="rows", token_budget=10_000)
    assert rows.tokens_forwarded == microbatch.tokens_forwarded + 5 * (7 - 1) + 1 * (5 - 1) + 2 * (
        3 - 1
    )


@pytest.mark.parametrize("packing", ["tree", "rows"])
def test_budget_holds_unless_one_rollout_exceeds_it(packing: str) -> None:
    rollouts = make_rollouts()
    for token_budget in (1, 12, 25, 60):
        for microbatch in pack_rollouts(rollouts, packing=packing, token_budget=token_budget):
            num_rollouts = len({rollout_pos for rollout_pos, _ in microbatch.attempts})
            assert microbatch.tokens_forwarded <= token_budget or num_rollouts == 1


def test_the_tree_drawn_in_the_module() -> None:
    """The example in packing's docstring has the visible_until, positions and rows drawn there."""
    prompt = [1, 2, 3, 4]
    rollouts = [
        make_rollout(0, 0, prompt, [5, 2], [1], [2]),
        make_rollout(0, 1, prompt, [3]),
        make_rollout(0, 2, prompt, [3, 3], [1], [-2]),
    ]
    (microbatch,) = pack_rollouts(rollouts, packing="tree", token_budget=100)
    expected = "17 17 14 14 10 10 8 8 10 10 12 12 14 14 17 17 17"
    assert microbatch.visible_until_T.tolist() == [int(number) for number in expected.split()]
    assert microbatch.positions_T.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 6, 7, 4, 5, 4, 5, 2, 3, 4]
    assert microbatch.rows_N.tolist() == [3, 4, 5, 6, 7, 8, 9, 3, 10, 11, 3, 12, 13, 14, 15, 16]


def test_group_that_fits_stays_together() -> None:
    """A group that fits into the budget is not split, even if its rollouts come interleaved."""
    prompts = {question: [question] * 10 for question in range(3)}
    rollouts = [
        make_rollout(question, idx, prompts[question], [6])
        for idx in range(4)
        for question in range(3)
    ]
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
    without_guidance = make_rollout(0, 0, [1], [2, 2])
    without_guidance.turns[0].guidance = None
    bad = {
        r"rollouts\[0\].prompt_ids must be non-empty": make_rollout(0, 0, [], [2]),
        r"turns\[1\].attempt must have tokens, got none": make_rollout(0, 0, [1], [2, 0]),
        r"turns\[0\].guidance must have been shown, got None": without_guidance,
        r"\[0\].guidance.kept_tokens must be in \[1, 6\], .* got 7": make_rollout(
            0, 0, [1] * 4, [2, 2], [1], [3]
        ),
        r"\[0\].guidance.kept_tokens must be in \[1, 3\], .* got 0": make_rollout(
            0, 0, [1], [2, 2], [1], [-1]
        ),
        r"\[1\].guidance.kept_tokens must be in \[1, 6\], .* got 0": make_rollout(
            0, 0, [1, 2], [5, 2, 2], [3, 1], [-1, -4]
        ),
    }
    for message, rollout in bad.items():
        with pytest.raises(ValueError, match=message):
            pack_rollouts([rollout], packing="tree", token_budget=5)


def test_packing_is_quick() -> None:
    """128 rollouts of 200 sampled tokens are packed in well under 0.1 s."""
    rollouts = [
        make_rollout(idx // 8, idx, [idx // 8] * 100, [100, 100], [20]) for idx in range(128)
    ]
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        pack_rollouts(rollouts, packing="tree", token_budget=4096)
        seconds.append(time.perf_counter() - start)
    # 7 ms on an idle core. A packer that walks tokens one by one takes longer than the limit.
    assert min(seconds) < 0.1
