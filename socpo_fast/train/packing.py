"""Rollouts to packed microbatches in which every token of a group's tree is forwarded once.

Read top-down: pack_rollouts -> _Builder.add -> _Builder.build -> _Branch. A group is one tree, and
its rows stand in depth-first order; visible_until says which rows see a row: those from it up to
there.

    row            0  1  2  3   4  5  6  7   8  9  10 11  12 13  14 15 16
    token          p  p  p  p   a  a  a  a   b  c   d  d   e  e   b  c  c
    visible_until 17 17 14 14  10 10  8  8  10 10  12 12  14 14  17 17 17

The prompt p is shared. The second attempt c of row 9 stands behind the bridge b and sees two tokens
of the first, a. Attempt d was right. Behind attempt e a template dropped all but two tokens of the
prompt: rows 14 to 16 leave it early, so they come after all that sees rows 2 and 3. A rollout's
rows (here 12, 13 and 14 to 16) need not be neighbours.

Differences from packing as trainers know it:

- The prompt of a group is the root of its tree and its rollouts are branches (packing="tree");
  packing="rows" gives every rollout a tree of its own and is what the tree is tested against.
- A rollout is one chain, attempt_0 + bridge + attempt_1 + .., not one row an attempt. Only where
  the next attempt does not see all of it does it branch: what it does not see ends in a leaf (it
  was sampled, so it is trained), and the chain goes on behind the tokens that stay, be their end
  inside the attempt, a bridge or the prompt.
- The last token of a leaf predicts nothing and is not forwarded. Hence, within one microbatch of
  packing="tree", tokens forwarded = nodes of the tree - its leaves.
- A loss token is known by its place in an attempt, never by its id. Several may share the row that
  predicts them (the prompt's last token, the last token before a cut), so rows_N repeats.
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
    """One forward-backward: T packed tokens, N loss tokens. CPU tensors, all but one int64."""

    token_ids_T: Tensor
    positions_T: Tensor  # [T] depth along the token's own path
    visible_until_T: Tensor  # [T] int32, for ops.tree_attention
    targets_N: Tensor  # [N] the sampled tokens, attempt by attempt in the order of `attempts`
    rows_N: Tensor  # [N] the packed token whose hidden state predicts target n; may repeat
    attempt_of_token_N: Tensor  # [N] index into `attempts`
    attempts: list[tuple[int, int]]  # (index in the rollouts that were packed, attempt_idx)

    @property
    def tokens_forwarded(self) -> int:
        return self.token_ids_T.numel()


def pack_rollouts(
    rollouts: Sequence[Rollout], *, packing: Packing, token_budget: int
) -> list[PackedMicrobatch]:
    """Pack rollouts into microbatches of at most token_budget forwarded tokens.

    Args:
        rollouts:     any number, any order; those without attempts are left out.
        packing:      "tree": rollouts of one question with equal prompt_ids share the prompt's
                      rows; "rows": none do.
        token_budget: >= 1, tokens forwarded in one microbatch. A rollout is never split: one that
                      is larger by itself gets a microbatch alone. A group stays together where it
                      fits, so its prompt is forwarded once.

    Returns:
        microbatches, each with at least one rollout; together they hold every attempt exactly once.

    Raises:
        ValueError: an unknown packing, token_budget < 1, or a rollout whose parts do not fit
                    together.

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
        prompt = len(rollouts[members[0]].prompt_ids)
        chains = [_chain_tokens(rollouts[rollout_idx]) for rollout_idx in members]
        group = prompt + sum(chains)
        if builders[-1].num_tokens + group > token_budget >= group:
            builders.append(_Builder())
        for rollout_idx, chain in zip(members, chains, strict=True):
            cost = chain if tree in builders[-1].roots else prompt + chain
            if builders[-1].roots and builders[-1].num_tokens + cost > token_budget:
                builders.append(_Builder())
            builders[-1].add(tree, rollout_idx, rollouts[rollout_idx])
    return [builder.build() for builder in builders if builder.roots]


def group_key(rollout: Rollout) -> Hashable:
    """What rollouts must have in common to share a prompt."""
    return rollout.question_idx, tuple(rollout.prompt_ids)


def count_unique_tokens(rollouts: Sequence[Rollout]) -> int:
    """Nodes of the rollouts' trees: each group's prompt once, every attempt, every bridge."""
    trained = [rollout for rollout in rollouts if rollout.attempts]
    prompts = {group_key(rollout): len(rollout.prompt_ids) for rollout in trained}
    return sum(prompts.values()) + sum(map(_chain_nodes, trained))


@dataclass(eq=False)
class _Branch:
    """Tokens in a row, the first of them at position `depth`; their path begins in the parent."""

    parent: _Branch | None = None
    depth: int = 0
    token_ids: list[int] = field(default_factory=list)
    branches: list[_Branch] = field(default_factory=list)
    start: int = 0  # row of the first token, once rows have their order

    def branch_at(self, position: int) -> _Branch:
        """The branch that holds the path's token at a position, or will hold it."""
        branch = self
        while branch.parent is not None and position < branch.depth:
            branch = branch.parent
        return branch

    def fork(self, kept_tokens: int) -> _Branch:
        """A new branch that sees the first kept_tokens tokens of the path."""
        parent = self.branch_at(kept_tokens - 1)
        parent.branches.append(_Branch(parent, kept_tokens))
        return parent.branches[-1]


@dataclass
class _Builder:
    """One microbatch in the making."""

    roots: dict[Hashable, _Branch] = field(default_factory=dict)  # the prompts
    num_tokens: int = 0
    # (rollout, attempt) -> its branch, the position of its first token, its tokens
    spans: dict[tuple[int, int], tuple[_Branch, int, list[int]]] = field(default_factory=dict)

    def add(self, tree: Hashable, rollout_idx: int, rollout: Rollout) -> None:
        """Adds a rollout's chain, which forks where the next attempt does not see all before it."""
        if tree not in self.roots:
            self.roots[tree] = _Branch(token_ids=list(rollout.prompt_ids))
            self.num_tokens += len(rollout.prompt_ids)
        branch = self.roots[tree].fork(len(rollout.prompt_ids))
        for attempt_idx, attempt in enumerate(rollout.attempts):
            if attempt_idx > 0:
                kept_tokens, bridge_ids = rollout.seam(attempt_idx - 1)
                num_unseen = _row_length(rollout, attempt_idx - 1) - kept_tokens
                if num_unseen == 0:
                    branch.token_ids += rollout.attempts[attempt_idx - 1].token_ids[-1:]
                elif num_unseen > 1:  # the last token of those is not in the branch
                    branch = branch.fork(kept_tokens)
                branch.token_ids += bridge_ids
            self.spans[rollout_idx, attempt_idx] = (
                branch,
                rollout.context_length(attempt_idx),
                attempt.token_ids,
            )
            branch.token_ids += attempt.token_ids[:-1]
        self.num_tokens += _chain_tokens(rollout)

    def build(self) -> PackedMicrobatch:
        token_ids: list[int] = []
        positions: list[int] = []
        visible_until = [self.num_tokens] * self.num_tokens
        path: list[int] = []  # the row at each position of the branch's path

        def place(branch: _Branch) -> None:
            """Gives rows to a branch and to all below it, those that see most of it first."""
            branch.start = len(token_ids)
            for row in path[branch.depth :]:  # these are not seen from here on
                visible_until[row] = branch.start
            token_ids.extend(branch.token_ids)
            path[branch.depth :] = range(branch.start, len(token_ids))
            positions.extend(range(branch.depth, branch.depth + len(branch.token_ids)))
            for below in sorted(branch.branches, key=lambda below: below.depth, reverse=True):
                place(below)

        for root in self.roots.values():
            place(root)
        assert len(token_ids) == self.num_tokens, "tokens as counted for the budget"

        rows: list[int] = []
        for branch, position, ids in self.spans.values():
            before = branch.branch_at(position - 1)
            row = branch.start + position - branch.depth
            rows += [before.start + position - 1 - before.depth, *range(row, row + len(ids) - 1)]
        lengths = torch.tensor([len(ids) for _, _, ids in self.spans.values()])
        return PackedMicrobatch(
            token_ids_T=torch.tensor(token_ids),
            positions_T=torch.tensor(positions),
            visible_until_T=torch.tensor(visible_until, dtype=torch.int32),
            targets_N=torch.tensor([token for _, _, ids in self.spans.values() for token in ids]),
            rows_N=torch.tensor(rows),
            attempt_of_token_N=torch.arange(len(self.spans)).repeat_interleave(lengths),
            attempts=list(self.spans),
        )


def _row_length(rollout: Rollout, turn_idx: int) -> int:
    """Tokens of an attempt and of all that it was sampled behind."""
    return rollout.context_length(turn_idx) + rollout.turns[turn_idx].attempt.num_tokens


def _chain_nodes(rollout: Rollout) -> int:
    """Tokens of a rollout's attempts and bridges."""
    bridges = sum(len(rollout.seam(idx)[1]) for idx in range(len(rollout.turns) - 1))
    return bridges + sum(attempt.num_tokens for attempt in rollout.attempts)


def _chain_tokens(rollout: Rollout) -> int:
    """Tokens a rollout adds to a forward, prompt aside; the last token of each leaf is left out."""
    seams = range(len(rollout.turns) - 1)
    num_forks = sum(rollout.seam(idx)[0] < _row_length(rollout, idx) for idx in seams)
    return _chain_nodes(rollout) - num_forks - 1


def _check_rollout(rollout_idx: int, rollout: Rollout) -> None:
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
            kept_tokens, _ = rollout.seam(turn_idx)
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
