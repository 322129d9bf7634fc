"""Packs rollouts into microbatches in which every token of a group's tree is forwarded once.

Read top-down: pack_rollouts -> _Builder.add -> _Builder.build -> _Branch. The rollouts of a group
form one tree, because they share a prompt. Each packed token is one row. Rows are numbered in
depth-first order, so that the subtree below row r is the range from r up to visible_until[r] (not
included). Exactly the rows in that range attend to row r.

    tree, p = prompt                 rows      visible_until   what it is
    p p -+- p p -+- a a -+- a a      6, 7      8               end of attempt a, a leaf
         |       |       +- b c      8, 9      10              bridge b, second attempt c
         |       +- d d              10, 11    12              attempt d, correct at once
         |       +- e e              12, 13    14              attempt e, a leaf
         +- b c c                    14 to 16  17              bridge b, second attempt c

    row            0  1  2  3   4  5  6  7   8  9  10 11  12 13  14 15 16
    token          p  p  p  p   a  a  a  a   b  c   d  d   e  e   b  c  c
    visible_until 17 17 14 14  10 10  8  8  10 10  12 12  14 14  17 17 17

Letters are attempts and bridges, one per forwarded token; the last token of a leaf is not forwarded
and not shown. Three rollouts are shown. In the first, attempt a was cut after two tokens: the
second attempt c in row 9 sees the prompt, rows 4 and 5, and the bridge, but not rows 6 and 7. The
second rollout has the one attempt d. In the third, the chat template dropped all but two tokens of
the prompt after attempt e. Rows 14 to 16 therefore leave the prompt early and come after every row
that sees rows 2 and 3. The rows of one rollout (here 12, 13 and 14 to 16) need not be neighbours.

Differences from the packing of other trainers:

- The prompt of a group is the root of its tree and its rollouts are branches (packing="tree").
  packing="rows" gives every rollout its own tree. Tests compare the tree with it.
- A rollout is one chain, attempt_0 + bridge + attempt_1 + .., not one row per attempt. It branches
  only where the next attempt does not see the whole chain. The unseen tokens end in a leaf (they
  were sampled, so they are trained). The chain goes on after the last token that stays visible,
  which may lie inside the attempt, a bridge or the prompt.
- The last token of a leaf predicts nothing and is not forwarded. Hence, within one microbatch of
  packing="tree", the number of forwarded tokens is nodes of the tree - leaves of the tree.
- A loss token is identified by its position in an attempt, never by its id. Several loss tokens may
  be predicted by the same row (the prompt's last token, the last token before a cut), so rows_N
  repeats.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from socpo_fast.ops._checks import check_rule
from socpo_fast.types import Rollout

Packing = Literal["tree", "rows"]


@dataclass(frozen=True, kw_only=True)
class PackedMicrobatch:
    """One forward-backward: T packed tokens, N loss tokens. CPU tensors, int64 unless noted."""

    token_ids_T: Tensor
    positions_T: Tensor  # [T] depth along the token's own path
    visible_until_T: Tensor  # [T] int32, for ops.tree_attention
    targets_N: Tensor  # [N] the sampled tokens, attempt by attempt in the order of `attempts`
    rows_N: Tensor  # [N] the row whose hidden state predicts target n; may repeat
    attempt_of_token_N: Tensor  # [N] index into `attempts`
    attempts: list[tuple[int, int]]  # (index in the rollouts that were packed, attempt_idx)

    @property
    def tokens_forwarded(self) -> int:
        """Returns the number of packed tokens, T."""
        return self.token_ids_T.numel()


def pack_rollouts(
    rollouts: Sequence[Rollout], *, packing: Packing, token_budget: int
) -> list[PackedMicrobatch]:
    """Packs rollouts into microbatches of at most token_budget forwarded tokens.

    Args:
        rollouts:     any number, any order. Rollouts without attempts are left out.
        packing:      "tree": rollouts of one question with equal prompt_ids share the rows of the
                      prompt. "rows": no rows are shared.
        token_budget: >= 1, tokens forwarded in one microbatch. A rollout is never split: one that
                      exceeds the budget gets its own microbatch. A group stays together if it
                      fits, so that its prompt is forwarded once.

    Returns:
        microbatches, each with at least one rollout; together they hold every attempt exactly once.

    Raises:
        ValueError: an unknown packing, token_budget < 1, or a rollout that is inconsistent (no
                    prompt, an empty attempt, a cut outside the row).

    Memory: int64 lists of the packed tokens. Bitwise: same inputs, same microbatches.
    """
    check_rule("pack_rollouts", "packing", packing, packing in ("tree", "rows"), "'tree' or 'rows'")
    check_rule("pack_rollouts", "token_budget", token_budget, token_budget >= 1, ">= 1")
    trees: dict[Hashable, list[int]] = {}
    for rollout_idx, rollout in enumerate(rollouts):
        if rollout.attempts:
            _check_rollout(rollout_idx, rollout)
            tree: Hashable = group_key(rollout) if packing == "tree" else rollout_idx
            trees.setdefault(tree, []).append(rollout_idx)

    builders = [_Builder()]
    for tree, members in trees.items():
        num_prompt_tokens = len(rollouts[members[0]].prompt_ids)
        chain_sizes = [_num_chain_rows(rollouts[rollout_idx]) for rollout_idx in members]
        group_size = num_prompt_tokens + sum(chain_sizes)
        # A group that fits into an empty microbatch but not into what is left of this one moves
        # on as a whole. Otherwise its prompt would be forwarded twice.
        if builders[-1].num_tokens + group_size > token_budget >= group_size:
            builders.append(_Builder())
        for rollout_idx, chain_size in zip(members, chain_sizes, strict=True):
            num_added = chain_size if tree in builders[-1].roots else num_prompt_tokens + chain_size
            # An empty microbatch takes any rollout, also one that exceeds the budget.
            if builders[-1].roots and builders[-1].num_tokens + num_added > token_budget:
                builders.append(_Builder())
            builders[-1].add(tree, rollout_idx, rollouts[rollout_idx])
    return [builder.build() for builder in builders if builder.roots]


def group_key(rollout: Rollout) -> Hashable:
    """Returns the key that rollouts must have in common to share a prompt."""
    return rollout.question_idx, tuple(rollout.prompt_ids)


def count_unique_tokens(rollouts: Sequence[Rollout]) -> int:
    """Counts the nodes of the trees: each group's prompt once, every attempt, every bridge."""
    trained = [rollout for rollout in rollouts if rollout.attempts]
    prompts = {group_key(rollout): len(rollout.prompt_ids) for rollout in trained}
    return sum(prompts.values()) + sum(map(_num_chain_tokens, trained))


@dataclass(eq=False)
class _Branch:
    """A run of consecutive tokens, the first at position `depth`; the parent holds the prefix."""

    parent: _Branch | None = None
    depth: int = 0
    token_ids: list[int] = field(default_factory=list)
    branches: list[_Branch] = field(default_factory=list)
    start: int = 0  # row of the first token, set by _Builder.build

    def branch_at(self, position: int) -> _Branch:
        """Returns the branch on this path that holds, or will hold, the token at a position."""
        branch = self
        while branch.parent is not None and position < branch.depth:
            branch = branch.parent
        return branch

    def fork(self, kept_tokens: int) -> _Branch:
        """Returns a new branch that sees the first kept_tokens tokens of the path."""
        parent = self.branch_at(kept_tokens - 1)
        parent.branches.append(_Branch(parent, kept_tokens))
        return parent.branches[-1]


@dataclass
class _Builder:
    """A microbatch under construction."""

    roots: dict[Hashable, _Branch] = field(default_factory=dict)  # the prompts
    num_tokens: int = 0
    # (rollout_idx, attempt_idx) -> branch, position of the first token, token ids of the attempt
    spans: dict[tuple[int, int], tuple[_Branch, int, list[int]]] = field(default_factory=dict)

    def add(self, tree: Hashable, rollout_idx: int, rollout: Rollout) -> None:
        """Adds a rollout's chain; it forks where the next attempt does not see the whole chain."""
        if tree not in self.roots:
            self.roots[tree] = _Branch(token_ids=list(rollout.prompt_ids))
            self.num_tokens += len(rollout.prompt_ids)
        branch = self.roots[tree].fork(len(rollout.prompt_ids))
        for attempt_idx, attempt in enumerate(rollout.attempts):
            if attempt_idx > 0:
                kept_tokens, bridge_ids = rollout.next_context(attempt_idx - 1)
                num_unseen = _row_length(rollout, attempt_idx - 1) - kept_tokens
                # The branch holds the attempt without its last token (see below). If the next
                # attempt sees that token, it is no leaf's end and is forwarded after all. If it is
                # the only unseen token, the branch is already exactly what the next attempt sees.
                if num_unseen == 0:
                    branch.token_ids += rollout.attempts[attempt_idx - 1].token_ids[-1:]
                elif num_unseen > 1:
                    branch = branch.fork(kept_tokens)
                branch.token_ids += bridge_ids
            self.spans[rollout_idx, attempt_idx] = (
                branch,
                rollout.context_length(attempt_idx),
                attempt.token_ids,
            )
            # Without its last token, which predicts nothing as long as no other follows.
            branch.token_ids += attempt.token_ids[:-1]
        self.num_tokens += _num_chain_rows(rollout)

    def build(self) -> PackedMicrobatch:
        """Numbers the rows depth-first and returns the finished microbatch."""
        token_ids: list[int] = []
        positions: list[int] = []
        visible_until = [self.num_tokens] * self.num_tokens
        path: list[int] = []  # position -> row, along the path to the branch being numbered

        def assign_rows(branch: _Branch) -> None:
            """Numbers a branch and its subtree; children that see more of it come first."""
            branch.start = len(token_ids)
            # The path still ends in the sibling numbered last. Its rows, and those of the parent
            # behind the fork, are not seen from here on: their subtrees are complete.
            for row in path[branch.depth :]:
                visible_until[row] = branch.start
            token_ids.extend(branch.token_ids)
            path[branch.depth :] = range(branch.start, len(token_ids))
            positions.extend(range(branch.depth, branch.depth + len(branch.token_ids)))
            # The deepest fork first: a fork at depth d ends the visibility of every parent row from
            # d on, so a later child must not need those rows. This keeps subtrees contiguous.
            for child in sorted(branch.branches, key=lambda child: child.depth, reverse=True):
                assign_rows(child)

        for root in self.roots.values():
            assign_rows(root)
        assert len(token_ids) == self.num_tokens, "tokens as counted for the budget"

        rows: list[int] = []
        for branch, position, ids in self.spans.values():
            predictor = branch.branch_at(position - 1)
            # The first token is predicted by the last token of the context, which may lie in a
            # parent branch. Each later token is predicted by the token before it.
            row = branch.start + position - branch.depth
            rows += [
                predictor.start + position - 1 - predictor.depth,
                *range(row, row + len(ids) - 1),
            ]
        attempt_lens = torch.tensor([len(ids) for _, _, ids in self.spans.values()])
        return PackedMicrobatch(
            token_ids_T=torch.tensor(token_ids),
            positions_T=torch.tensor(positions),
            visible_until_T=torch.tensor(visible_until, dtype=torch.int32),
            targets_N=torch.tensor([token for _, _, ids in self.spans.values() for token in ids]),
            rows_N=torch.tensor(rows),
            attempt_of_token_N=torch.arange(len(self.spans)).repeat_interleave(attempt_lens),
            attempts=list(self.spans),
        )


def _row_length(rollout: Rollout, turn_idx: int) -> int:
    """Returns the number of tokens of an attempt and of its context together."""
    return rollout.context_length(turn_idx) + rollout.turns[turn_idx].attempt.num_tokens


def _num_chain_tokens(rollout: Rollout) -> int:
    """Counts the tokens of a rollout's attempts and bridges."""
    bridges = sum(len(rollout.next_context(idx)[1]) for idx in range(len(rollout.turns) - 1))
    return bridges + sum(attempt.num_tokens for attempt in rollout.attempts)


def _num_chain_rows(rollout: Rollout) -> int:
    """Counts the rows that a rollout adds beside its prompt: its tokens, but no leaf's last one."""
    turn_indices = range(len(rollout.turns) - 1)
    num_forks = sum(
        rollout.next_context(idx)[0] < _row_length(rollout, idx) for idx in turn_indices
    )
    return _num_chain_tokens(rollout) - num_forks - 1


def _check_rollout(rollout_idx: int, rollout: Rollout) -> None:
    """Refuses a rollout without a prompt, with an empty attempt, or with a cut out of range."""
    name = f"rollouts[{rollout_idx}]"
    if not rollout.prompt_ids:
        raise ValueError(
            f"pack_rollouts: {name}.prompt_ids must be non-empty, got []; its last token predicts "
            "the first sampled one"
        )
    for turn_idx, attempt in enumerate(rollout.attempts):
        if attempt.num_tokens == 0:
            raise ValueError(
                f"pack_rollouts: {name}.turns[{turn_idx}].attempt must have tokens, got none"
            )
    for turn_idx in range(len(rollout.turns) - 1):
        try:
            kept_tokens, _ = rollout.next_context(turn_idx)
        except ValueError as error:
            raise ValueError(f"pack_rollouts: {error}") from None
        row_length = _row_length(rollout, turn_idx)
        check_rule(
            "pack_rollouts",
            f"{name}.turns[{turn_idx}].guidance.kept_tokens",
            kept_tokens,
            1 <= kept_tokens <= row_length,
            f"in [1, {row_length}], the row's length",
            "the context and the attempt make up the row",
        )
