"""Checks rollouts as padded rows, and advantages computed from rows.

Other trainers use these. Advantages must be those of socpo_fast's own trainer, however the rows are
spread over ranks.
"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from socpo_fast import attempt_table, pad_rollouts, socratic_advantages
from socpo_fast.integrations.tensors import PaddedRollouts
from socpo_fast.ops import CreditOptions
from socpo_fast.socratic.credit import assign_credit
from socpo_fast.types import Rollout
from tests.helpers.made_rollouts import contexts, make_rollout, make_rollouts

PAD = 52


def random_batch(seed: int, *, num_questions: int = 5, group_size: int = 4) -> list[Rollout]:
    """Returns rollouts of one to three attempts without cuts, with rewards in [0, 1]."""
    rng = random.Random(seed)
    rollouts = []
    for question in range(num_questions):
        for idx in range(group_size):
            attempt_lens = [rng.randint(1, 9) for _ in range(rng.randint(1, 3))]
            rollout = make_rollout(
                30 + 7 * question, idx, [1, 2, 3][: 1 + question % 3], attempt_lens
            )
            for turn in rollout.turns:
                turn.raw_reward = rng.choice([0.0, 0.0, 0.25, 1.0])
                turn.advantage = None
            rollouts.append(rollout)
    return rollouts


def tokens_of(padded: PaddedRollouts) -> list[tuple[int, int, int, float]]:
    """Returns (group, attempt, token id, log-prob) of every token with loss, row by row."""
    tokens = []
    for row, position in padded.loss_mask_BL.nonzero().tolist():
        fields = (padded.attempt_BL, padded.ids_BL, padded.logprobs_BL)
        tokens.append((int(padded.group_B[row]), *(x[row, position].item() for x in fields)))
    return tokens


def sampled(rollouts: list[Rollout]) -> list[tuple[int, int, int, float]]:
    """Returns (question, attempt, token id, log-prob) of every sampled token."""
    return [
        (rollout.question_idx, turn.attempt.attempt_idx, token_id, logprob)
        for rollout in rollouts
        for turn in rollout.turns
        for token_id, logprob in zip(
            turn.attempt.token_ids, turn.attempt.logprobs.tolist(), strict=True
        )
    ]


def test_one_row_per_attempt_holds_its_context() -> None:
    """With rows="attempt" every sampled token has a loss once, in the context it was sampled in."""
    rollouts = make_rollouts()
    padded = pad_rollouts(rollouts, rows="attempt", pad_id=PAD)
    expected = [
        context + turn.attempt.token_ids
        for rollout in rollouts
        for context, turn in zip(contexts(rollout), rollout.turns, strict=False)
    ]
    for i, ids in enumerate(expected):
        assert padded.ids_BL[i, : len(ids)].tolist() == ids
        assert (padded.ids_BL[i, len(ids) :] == PAD).all()
        assert padded.attention_mask_BL[i].sum() == len(ids)
    assert padded.ids_BL.shape == (len(expected), max(map(len, expected)))
    assert tokens_of(padded) == sampled(rollouts)


def test_one_row_per_rollout() -> None:
    """With rows="rollout" a row is a whole rollout, with rewards at the ends of attempts."""
    rollouts = random_batch(1)
    padded = pad_rollouts(rollouts, rows="rollout", pad_id=PAD)
    for i, rollout in enumerate(rollouts):
        row = rollout.context_ids(len(rollout.turns) - 1) + rollout.turns[-1].attempt.token_ids
        assert padded.ids_BL[i, padded.attention_mask_BL[i]].tolist() == row
        rewards = padded.rewards_BL[i][padded.loss_mask_BL[i]]
        assert rewards.sum() == sum(turn.raw_reward for turn in rollout.turns)
        ends = torch.tensor([turn.attempt.num_tokens for turn in rollout.turns]).cumsum(0) - 1
        assert rewards[ends].tolist() == [turn.raw_reward for turn in rollout.turns]
    assert tokens_of(padded) == sampled(rollouts)
    assert padded.advantages_BL[padded.loss_mask_BL].isnan().all()  # no credit yet
    assert padded.group_B.tolist() == [rollout.question_idx for rollout in rollouts]


def test_advantages_are_at_their_attempts_tokens() -> None:
    """Each sampled token has its attempt's advantage; all others have 0."""
    rollouts = random_batch(2)
    assign_credit(rollouts, options=CreditOptions())
    padded = pad_rollouts(rollouts, rows="rollout", pad_id=PAD)
    expected = [
        turn.advantage
        for rollout in rollouts
        for turn in rollout.turns
        for _ in range(turn.attempt.num_tokens)
    ]
    assert padded.advantages_BL[padded.loss_mask_BL].tolist() == expected
    assert (padded.advantages_BL[~padded.loss_mask_BL] == 0).all()


def test_a_cut_is_refused_or_begins_a_row() -> None:
    """An attempt behind a cut context is no continuation of its row, so it needs another row."""
    uncut = make_rollout(0, 0, [5, 6], [3, 2])
    cut = make_rollout(0, 1, [5, 6], [6, 3, 2], [4, 1], [2, None])
    message = (
        r"^pad_rollouts: rollout 1 of question 0 must be one row, got attempt 1 behind 4 of 8 "
        r"tokens; "
        r'use rows="attempt" or on_cut="split"$'
    )
    with pytest.raises(ValueError, match=message):
        pad_rollouts([uncut, cut], rows="rollout", pad_id=PAD)
    padded = pad_rollouts([uncut, cut], rows="rollout", pad_id=PAD, on_cut="split")
    rows = [
        row[mask].tolist()
        for row, mask in zip(padded.ids_BL, padded.attention_mask_BL, strict=True)
    ]
    first, _, third = contexts(cut)
    assert rows[1:] == [first + cut.attempts[0].token_ids, third + cut.attempts[2].token_ids]
    assert tokens_of(padded) == sampled([uncut, cut])


def test_every_cut_of_a_tree_splits_losslessly() -> None:
    """Splitting at cuts keeps every sampled token once, with fewer rows than one per attempt."""
    rollouts = make_rollouts()
    padded = pad_rollouts(rollouts, rows="rollout", pad_id=PAD, on_cut="split")
    assert tokens_of(padded) == sampled(rollouts)
    num_attempts = sum(len(rollout.turns) for rollout in rollouts)
    assert sum(bool(rollout.turns) for rollout in rollouts) < len(padded.ids_BL) < num_attempts
    # No padding stands before a token with loss.
    for row, position in padded.loss_mask_BL.nonzero().tolist():
        assert padded.attention_mask_BL[row, :position].all()


def test_no_rollouts_give_no_rows() -> None:
    padded = pad_rollouts([make_rollout(0, 0, [1], [])], rows="attempt", pad_id=PAD)
    assert padded.ids_BL.shape == (0, 0) and padded.group_B.shape == (0,)
    with pytest.raises(
        ValueError, match="^pad_rollouts: rows must be one of attempt, rollout, got 'batch'"
    ):
        pad_rollouts([], rows="batch", pad_id=PAD)  # type: ignore[arg-type]


class Ranks:
    """A batch's rows on several ranks, run one after the other in this process.

    A first pass records what each rank sends to gather. In a second pass gather returns the tensors
    of all ranks, as between real processes.
    """

    def __init__(self, shares: list[list[Rollout]], **options: Any):
        self.padded = [pad_rollouts(share, rows="rollout", pad_id=PAD) for share in shares]
        self.options = options
        self.sent = []

    def run(self) -> list[Tensor]:
        sent: list[list[Tensor]] = [[] for _ in self.padded]
        for rank in range(len(self.padded)):
            self._advantages(rank, lambda x, rank=rank: (sent[rank].append(x), (x, 0))[1])
        advantages = []
        for rank in range(len(self.padded)):
            calls = iter(zip(*sent, strict=True))

            def gather(x: Tensor, rank: int = rank, calls: Any = calls) -> tuple[Tensor, int]:
                parts = next(calls)
                torch.testing.assert_close(parts[rank], x, rtol=0, atol=0)
                return torch.cat(parts), sum(part.shape[0] for part in parts[:rank])

            advantages.append(self._advantages(rank, gather))
        return advantages

    def _advantages(self, rank: int, gather: Any) -> Tensor:
        padded = self.padded[rank]
        table = padded.rewards_BL, padded.loss_mask_BL, padded.group_B
        return socratic_advantages(*table, gather=gather, **self.options)


@pytest.mark.filterwarnings("ignore:compute_advantages. the batch has no loss tokens")
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("credit", ["attempt", "trajectory"])
@pytest.mark.parametrize(
    "estimator", ["reinforce_plus_plus_baseline", "reinforce_plus_plus", "grpo", "rloo"]
)
def test_ranks_have_the_trainers_numbers(num_ranks: int, credit: Any, estimator: str) -> None:
    """Advantages do not depend on how rows are spread over ranks.

    The shares are contiguous, or interleaved so that questions are split, or one rank has no row.
    """
    for seed in range(3):
        rollouts = random_batch(seed)
        assign_credit(rollouts, options=CreditOptions(credit=credit, estimator=estimator))
        size = -(-len(rollouts) // num_ranks)
        contiguous = [rollouts[rank * size : (rank + 1) * size] for rank in range(num_ranks)]
        for shares in (
            contiguous,
            [rollouts[rank::num_ranks] for rank in range(num_ranks)],
            [*contiguous, []],
        ):
            ranks = Ranks(shares, credit=credit, estimator=estimator)
            for padded, advantages in zip(ranks.padded, ranks.run(), strict=True):
                torch.testing.assert_close(advantages, padded.advantages_BL, rtol=1e-6, atol=1e-7)


def test_ranks_without_gather_are_wrong() -> None:
    """Without gather, half a batch has other advantages: decay and whitening need all of it."""
    rollouts = random_batch(0)
    assign_credit(rollouts, options=CreditOptions())
    half = pad_rollouts(rollouts[:10], rows="rollout", pad_id=PAD)
    ungathered = socratic_advantages(half.rewards_BL, half.loss_mask_BL, half.group_B)
    assert (ungathered - half.advantages_BL).abs().max() > 0.05


def test_rewards_may_stand_anywhere_in_an_attempt() -> None:
    """Token rewards are summed over an attempt and the tokens between it and the next one.

    So trainers may add a penalty at every token.
    """
    mask_BT = torch.tensor([[0, 1, 1, 0, 0, 1, 0], [1, 1, 0, 0, 0, 0, 0]])
    rewards_BT = torch.tensor([[0, 0.1, 0.2, 0.1, 0, 0.5, 0.25], [0.5, 0, 0.5, 0, 0, 0, 0]])
    group_B = torch.tensor([4, 4])
    advantages = socratic_advantages(
        rewards_BT, mask_BT, group_B, schedule="none", estimator="dr_grpo"
    )
    a = 0.4
    b = 0.75
    c = 1.0
    mean = (a + b + c) / 3
    expected = [[0, a - mean, a - mean, 0, 0, b - mean, 0], [c - mean, c - mean, 0, 0, 0, 0, 0]]
    torch.testing.assert_close(advantages, torch.tensor(expected))
    with pytest.raises(
        ValueError, match="token_rewards_BT must be 0 before a row's first attempt, got 0.5 at 0"
    ):
        socratic_advantages(rewards_BT.flip(1) + 0.25, mask_BT, group_B)


def test_the_tables_of_ranks_make_the_batch() -> None:
    """The attempt tables of two ranks, concatenated, are the table of the whole batch."""
    rollouts = random_batch(6)
    tables = [attempt_table(rollouts[:7]), attempt_table(rollouts[7:])]
    for columns, expected in zip(zip(*tables, strict=True), attempt_table(rollouts), strict=True):
        assert torch.equal(torch.cat(columns), expected)


RANK = """
import sys, torch, torch.distributed as dist
from socpo_fast.integrations.tensors import gather_rows
rank, path = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
for shape in ((3, 2), (0, 2)), ((1,), (2,)):
    own = torch.arange(torch.Size(shape[rank]).numel()).view(shape[rank]) + 10 * rank
    rows, start = gather_rows(own)
    assert torch.equal(rows[start : start + len(own)], own), (rank, rows, start)
    print(rows.tolist())
dist.destroy_process_group()
"""


def test_gather_rows_between_processes(tmp_path: Path) -> None:
    """gather_rows concatenates the rows of two processes, for unequal and for empty shares."""
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    printed = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    for text in printed:  # torch 2.10 prints of its connections, too
        lines = [line for line in text.splitlines() if not line.startswith("[Gloo]")]
        assert lines == ["[[0, 1], [2, 3], [4, 5]]", "[0, 10, 11]"]


def test_rows_without_attempts_have_advantages_of_0() -> None:
    """A rank whose rows have no attempt still takes part in gather, and has advantages of 0."""
    empty_rows = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.long), torch.tensor([0, 0])
    with pytest.warns(UserWarning, match="no loss tokens"):
        assert socratic_advantages(*empty_rows).tolist() == [[0.0] * 3] * 2
    other_rank = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([[4, 9, 0], [2, 9, 0]])

    def gather(x: Tensor) -> tuple[Tensor, int]:
        return torch.cat((other_rank[x.dim() - 1].to(x.dtype), x)), 2

    assert socratic_advantages(*empty_rows, gather=gather).tolist() == [[0.0] * 3] * 2


def test_invalid_rows_are_refused() -> None:
    group_B = torch.tensor([0])
    rewards_BT = torch.zeros(1, 3)
    with pytest.raises(
        ValueError, match="socratic_advantages: mask_BT must be 0 or 1, got -100 at 2"
    ):
        socratic_advantages(rewards_BT, torch.tensor([[1, 0, -100]]), group_B)
    with pytest.raises(
        ValueError, match="socratic_advantages: token_rewards_BT must be finite, got nan at 1"
    ):
        socratic_advantages(torch.tensor([[0, torch.nan, 0]]), torch.tensor([[1, 1, 0]]), group_B)
    empty = make_rollout(3, 1, [5], [2])
    empty.turns[0].attempt.token_ids = []
    with pytest.raises(
        ValueError, match="attempts must have a token, got none in attempt 0 of rollout 1"
    ):
        pad_rollouts([empty], rows="attempt", pad_id=PAD)
