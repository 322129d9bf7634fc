"""Pads rollouts to tensors and returns their advantages, for other trainers.

Read pad_rollouts, then socratic_advantages. The trainer of this package uses neither: it packs a
group's tree without padding. Here a row has a form that other trainers know: one attempt with its
context, or one whole rollout. An attempt is a run of ones in the loss mask:

    ids          prompt  attempt 0  bridge  attempt 1  pad
    loss_mask    0 0 0   1 1 1 1    0 0 0   1 1 1      0 0

A batch that is spread over ranks is credited as one. Decay, baselines and whitening need all
attempts, so the ranks exchange one small table of them (`gather`).
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from socpo_fast.ops import CreditOptions, credit_attempts
from socpo_fast.ops._checks import INDEX, WIDE_FLOATS, TensorChecker, check_word
from socpo_fast.ops.credit_options import CreditTo
from socpo_fast.types import Rollout, Turn

Rows = Literal["attempt", "rollout"]
OnCut = Literal["refuse", "split"]
# [A, ..] of this rank -> [A of all ranks, ..] in the order of the ranks, and the index at which the
# rows of this rank begin.
Gather = Callable[[Tensor], tuple[Tensor, int]]


class PaddedRollouts(NamedTuple):
    """Rollouts as rows, padded on the right to the length L of the longest one."""

    ids_BL: Tensor  # int64; contexts, attempts and bridges, then pad_id
    attention_mask_BL: Tensor  # bool; False on padding
    loss_mask_BL: Tensor  # bool; True on sampled tokens, each of them in one row only
    logprobs_BL: Tensor  # fp32, nats; sampler_logprobs of sampled tokens, 0 elsewhere
    rewards_BL: Tensor  # fp32; the raw reward of an attempt on its last token, 0 elsewhere
    # fp32; the attempt's advantage on each of its tokens, 0 elsewhere. NaN: not assigned yet.
    advantages_BL: Tensor
    group_B: Tensor  # int64; question_idx of the row
    attempt_BL: Tensor  # int64; attempt_idx on sampled tokens, -1 elsewhere


def pad_rollouts(
    rollouts: Sequence[Rollout], *, rows: Rows, pad_id: int, on_cut: OnCut = "refuse"
) -> PaddedRollouts:
    """Returns rollouts as rows of [B, L] tensors on the CPU.

    Args:
        rollouts: a rollout without turns gives no row.
        rows:     "attempt": a row is an attempt behind its whole context. "rollout": a row is a
                  rollout, all attempts and bridges in order.
        pad_id:   any token id; the masks say what is padding.
        on_cut:   with rows "rollout", what to do with an attempt that saw less than the whole row
                  before it (because of attempt_limit, or context "template"). "refuse": raise.
                  "split": it begins a new row, behind the context it saw. Then the runs in a row's
                  mask need not be all attempts of a rollout.

    Raises:
        ValueError: rows or on_cut is unknown, an attempt has no token, or an attempt is cut with
            on_cut "refuse".
    """
    where = "pad_rollouts"
    check_word(where, "rows", rows, get_args(Rows))
    check_word(where, "on_cut", on_cut, get_args(OnCut))
    padded: list[_Row] = []
    for rollout in rollouts:
        for turn_idx, turn in enumerate(rollout.turns):
            if turn.attempt.num_tokens == 0:
                raise ValueError(
                    f"{where}: attempts must have a token, got none in attempt {turn_idx} of "
                    "rollout "
                    f"{rollout.rollout_idx} of question {rollout.question_idx}; leave that "
                    "rollout out"
                )
            context = rollout.context_ids(turn_idx)
            row = padded[-1] if turn_idx > 0 and rows == "rollout" else None
            # The context must be the row so far and at least one token more: without a bridge in
            # between, two attempts would be one run in the mask.
            is_continued = row is not None and context[: len(row.ids)] == row.ids != context
            if row is not None and not is_continued and on_cut == "refuse":
                raise ValueError(
                    f"{where}: rollout {rollout.rollout_idx} of question {rollout.question_idx} "
                    "must be one row, "
                    f"got attempt {turn_idx} behind {rollout.next_context(turn_idx - 1)[0]} of "
                    f"{len(row.ids)} tokens; "
                    'use rows="attempt" or on_cut="split"'
                )
            if row is None or not is_continued:
                row = _Row(rollout.question_idx, [], [])
                padded.append(row)
            row.ids.extend(context[len(row.ids) :])
            row.turns.append((len(row.ids), turn_idx, turn))
            row.ids.extend(turn.attempt.token_ids)
    return _pad(padded, pad_id)


def socratic_advantages(
    token_rewards_BT: Tensor,
    mask_BT: Tensor,
    group_B: Tensor,
    *,
    schedule: str = "batch_mean",
    factor: float | None = None,
    credit: CreditTo = "attempt",
    estimator: str = "reinforce_plus_plus_baseline",
    eps: float = 1e-6,
    gather: Gather | None = None,
) -> Tensor:
    """Returns the advantage of each token of padded rows, one row a rollout.

    An attempt is a run of ones in the mask; its raw reward is the sum of the token rewards from its
    first token up to the next attempt of the row.

    Args:
        token_rewards_BT: [B, T] fp32 or fp64, finite; 0 before the first attempt of a row.
        mask_BT:          [B, T] bool, or integers 0 and 1; 1 on the student's tokens.
        group_B:          [B] int64; rows with the same number are rollouts of one question, on any
                          rank.
        schedule, factor, credit, estimator, eps: as in `ops.CreditOptions`.
        gather:           for a batch that is spread over ranks, for example `gather_rows`. Every
                          rank calls it equally often. None: all of the batch is on this rank.

    Returns:
        [B, T] fp32, on the device of the mask: the attempt's advantage on its tokens, 0 elsewhere.

    Raises:
        ValueError: an argument breaks the rules above, or those of `ops.credit_attempts`.
    """
    options = CreditOptions(
        schedule=schedule, factor=factor, credit=credit, estimator=estimator, eps=eps
    )
    check = TensorChecker("socratic_advantages")
    check("token_rewards_BT", token_rewards_BT, WIDE_FLOATS)
    check("mask_BT", mask_BT, (torch.bool, torch.int32, torch.int64))
    check("group_B", group_B, INDEX)
    check.every("mask_BT", mask_BT.flatten(), ((mask_BT == 0) | (mask_BT == 1)).flatten(), "0 or 1")
    check.finite("token_rewards_BT", token_rewards_BT.flatten())
    # N = B T, the flattened rows.
    #
    #     mask_BT           0  0  1  1  0  1  1  0
    #     begins_BT         0  0  1  0  0  1  0  0
    #     attempt_idx_BT   -1 -1  0  0  0  1  1  1
    is_sampled_BT = mask_BT != 0
    begins_BT = is_sampled_BT.clone()
    begins_BT[:, 1:] &= ~is_sampled_BT[:, :-1]
    attempt_idx_BT = begins_BT.cumsum(1) - 1
    rewards_before_BT = token_rewards_BT.where(attempt_idx_BT < 0, 0)
    check.every(
        "token_rewards_BT",
        rewards_before_BT.flatten(),
        rewards_before_BT.flatten() == 0,
        "0 before a row's first attempt",
    )
    attempt_of_token_N = begins_BT.flatten().cumsum(0) - 1
    num_attempts = int(begins_BT.sum())
    rewards_N = token_rewards_BT.flatten().double()
    has_attempt_N = attempt_of_token_N >= 0
    rewards_A = rewards_N.new_zeros(num_attempts).index_add(
        0, attempt_of_token_N[has_attempt_N], rewards_N[has_attempt_N]
    )
    attempt_of_sampled_N = attempt_of_token_N[is_sampled_BT.flatten()]
    num_tokens_A = attempt_of_sampled_N.bincount(minlength=num_attempts)
    group_A = group_B[:, None].expand_as(mask_BT)[begins_BT]
    # From here on the attempts of all ranks, A of them, so that credit sees the whole batch.
    counts_A3 = torch.stack((num_tokens_A, group_A, attempt_idx_BT[begins_BT]), dim=1)
    start = 0
    if gather is not None:
        rewards_A, start = gather(rewards_A)
        counts_A3, _ = gather(counts_A3)
    num_tokens_A, group_A, attempt_idx_A = counts_A3.t().contiguous()
    # Attempts come row by row, and each row begins with attempt 0.
    rollout_idx_A = (attempt_idx_A == 0).cumsum(0)
    credited = credit_attempts(
        rewards_A,
        num_tokens_A,
        group_A,
        attempt_idx_A,
        rollout_idx_A,
        options=options,
    )
    advantages_N = credited.advantages_A[start + attempt_of_sampled_N]
    return advantages_N.new_zeros(mask_BT.shape).masked_scatter(is_sampled_BT, advantages_N)


def gather_rows(x: Tensor, group: dist.ProcessGroup | None = None) -> tuple[Tensor, int]:
    """Gathers the rows of all ranks with torch.distributed.

    Args:
        x: [A, ..], on a device that the process group's backend can send from. A may differ from
           rank to rank.

    Returns:
        (rows, start). The rows of all ranks, in the order of the ranks; the index of this rank's
        first row.
    """
    # all_gather needs equal shapes, so the number of rows goes first and then padded rows.
    num_ranks = dist.get_world_size(group)
    rank = dist.get_rank(group)
    num_rows_here = torch.tensor([x.shape[0]], device=x.device)
    sizes = [torch.empty_like(num_rows_here) for _ in range(num_ranks)]
    dist.all_gather(sizes, num_rows_here, group=group)
    num_rows = [int(size) for size in sizes]
    padded = x.new_zeros((max(num_rows), *x.shape[1:]))
    padded[: x.shape[0]] = x
    gathered = [torch.empty_like(padded) for _ in range(num_ranks)]
    dist.all_gather(gathered, padded, group=group)
    rows = torch.cat([rank_rows[:size] for rank_rows, size in zip(gathered, num_rows, strict=True)])
    return rows, sum(num_rows[:rank])


class _Row(NamedTuple):
    """One row while it grows."""

    question_idx: int
    ids: list[int]
    # The attempts that this row trains: position of the first token, turn_idx, turn.
    turns: list[tuple[int, int, Turn]]


def _pad(rows: list[_Row], pad_id: int) -> PaddedRollouts:
    """Returns the rows as padded tensors."""
    seq_lens_B = torch.tensor([len(row.ids) for row in rows], dtype=torch.int64)
    shape = len(rows), max(seq_lens_B.tolist(), default=0)
    ids_BL = torch.full(shape, pad_id)
    attempt_BL = torch.full(shape, -1)
    logprobs_BL, rewards_BL, advantages_BL = torch.zeros(3, *shape)
    for i, row in enumerate(rows):
        ids_BL[i, : len(row.ids)] = torch.tensor(row.ids)
        for start, turn_idx, turn in row.turns:
            stop = start + turn.attempt.num_tokens
            attempt_BL[i, start:stop] = turn_idx
            logprobs_BL[i, start:stop] = turn.attempt.logprobs
            rewards_BL[i, stop - 1] = turn.raw_reward
            advantages_BL[i, start:stop] = torch.nan if turn.advantage is None else turn.advantage
    return PaddedRollouts(
        ids_BL=ids_BL,
        attention_mask_BL=torch.arange(shape[1]) < seq_lens_B[:, None],
        loss_mask_BL=attempt_BL >= 0,
        logprobs_BL=logprobs_BL,
        rewards_BL=rewards_BL,
        advantages_BL=advantages_BL,
        group_B=torch.tensor([row.question_idx for row in rows], dtype=torch.int64),
        attempt_BL=attempt_BL,
    )
