"""Rollouts to packed microbatches in which every token of a group's tree is forwarded once.

Read top-down: pack_rollouts -> _Builder.add -> _Builder._segment. Differences from packing as trainers know it:

- The prompt of a group is one root segment and its rollouts are branches below it (packing="tree"); packing="rows"
  gives every rollout its own copy of the prompt and is what the tree is tested against.
- A rollout is one chain, attempt_0 + bridge + attempt_1 + .., not one row an attempt. Only where the next attempt does
  not see all of it does the chain fork: what it does not see ends in a leaf (it was sampled, so it is trained), and the
  chain goes on behind the tokens that stay, be their end inside the attempt, a bridge or the shared prompt.
- The last token of a leaf predicts nothing and is not forwarded. Hence, within one microbatch of packing="tree",
  tokens forwarded = nodes of the tree - its leaves.
- A loss token is known by its place in an attempt, never by its id. Several may share the row that predicts them (the
  prompt's last token, the last token before a cut), so rows_N repeats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from socpo_fast.ops.packed_attention import Segment
from socpo_fast.types import Rollout

Packing = Literal["tree", "rows"]
GroupKey = tuple[int, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class PackedMicrobatch:
    """One forward-backward: T packed tokens, N loss tokens. Tensors are int64 on the CPU."""

    token_ids_T: Tensor
    positions_T: Tensor  # [T] depth along the token's own path
    segments: list[Segment]  # partition [0, T)
    targets_N: Tensor  # [N] the sampled tokens, attempt by attempt in the order of `attempts`
    rows_N: Tensor  # [N] the packed token whose hidden state predicts target n; may repeat
    attempt_of_token_N: Tensor  # [N] index into `attempts`
    attempts: list[tuple[int, int]]  # (place in the rollouts that were packed, attempt_idx)

    @property
    def tokens_forwarded(self) -> int:
        return self.token_ids_T.numel()


def pack_rollouts(rollouts: Sequence[Rollout], *, packing: Packing, token_budget: int) -> list[PackedMicrobatch]:
    """Pack rollouts into microbatches of at most token_budget forwarded tokens.

    Args:
        rollouts:     any number, any order; those without attempts are left out.
        packing:      "tree": rollouts of one question with equal prompt_ids share the prompt's rows; "rows": none do.
        token_budget: >= 1, tokens forwarded in one microbatch. A rollout is never split: one that is larger by itself
                      gets a microbatch alone. A group stays together where it fits, so its prompt is forwarded once.

    Returns:
        microbatches, each with at least one rollout; together they hold every attempt exactly once.

    Raises:
        ValueError: an unknown packing, token_budget < 1, or a rollout whose parts do not fit together.

    Memory: int64 lists of the packed tokens. Bitwise: same inputs, same microbatches.
    """
    if packing not in ("tree", "rows"):
        raise ValueError(f"pack_rollouts: packing must be 'tree' or 'rows', got {packing!r}")
    if token_budget < 1:
        raise ValueError(f"pack_rollouts: token_budget must be >= 1, got {token_budget}")
    groups: dict[tuple[int, GroupKey], list[int]] = {}
    for place, rollout in enumerate(rollouts):
        if rollout.attempts:
            _check_rollout(place, rollout)
            groups.setdefault((place if packing == "rows" else 0, group_key(rollout)), []).append(place)

    builders = [_Builder()]
    for places in groups.values():
        chains = [_chain_tokens(rollouts[place]) for place in places]
        prompt = len(rollouts[places[0]].prompt_ids)
        has_room = len(builders[-1].token_ids) + prompt + sum(chains) <= token_budget
        if not has_room and prompt + sum(chains) <= token_budget:
            builders.append(_Builder())
        root = None
        for place, chain in zip(places, chains, strict=True):
            cost = chain + (prompt if root is None else 0)
            if builders[-1].token_ids and len(builders[-1].token_ids) + cost > token_budget:
                builders.append(_Builder())
                root = None
            if root is None:
                root = builders[-1].add_prompt(rollouts[place], shared=packing == "tree")
            builders[-1].add(place, rollouts[place], root)
    return [builder.build() for builder in builders if builder.attempts]


def group_key(rollout: Rollout) -> GroupKey:
    """What rollouts must have in common to share a prompt."""
    return rollout.question_idx, tuple(rollout.prompt_ids)


def count_unique_tokens(rollouts: Sequence[Rollout]) -> int:
    """Nodes of the rollouts' trees: each group's prompt once, every attempt, every bridge."""
    trained = [rollout for rollout in rollouts if rollout.attempts]
    prompts = {group_key(rollout): len(rollout.prompt_ids) for rollout in trained}
    chains = sum(len(_bridge_ids(rollout)) + _num_sampled(rollout) for rollout in trained)
    return sum(prompts.values()) + chains


class _Path(NamedTuple):
    """Where a new segment hangs."""

    context: tuple[tuple[int, int], ...]  # rows of its ancestors, in path order
    depth: int  # tokens in context
    pending: list[int]  # tokens that must open the segment: a prompt that is not shared

    def back(self, num_tokens: int) -> _Path:
        """The path without its last num_tokens; it may end inside a segment."""
        context, left = list(self.context), num_tokens
        while left:
            start, end = context.pop()
            dropped = min(left, end - start)
            context += [(start, end - dropped)] if dropped < end - start else []
            left -= dropped
        return _Path(tuple(context), self.depth - num_tokens, [])


@dataclass
class _Builder:
    """One microbatch in the making, as Python lists."""

    token_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    attempt_of_token: list[int] = field(default_factory=list)
    attempts: list[tuple[int, int]] = field(default_factory=list)

    def add_prompt(self, rollout: Rollout, *, shared: bool) -> _Path:
        """The root below which the rollout hangs: a segment that others may share, or the head of its own chain."""
        root = _Path((), 0, list(rollout.prompt_ids))
        return self._segment(root.pending, root) if shared else root

    def add(self, place: int, rollout: Rollout, path: _Path) -> None:
        """Append a rollout's chain, which forks where the next attempt does not see all that came before."""
        run = list(path.pending)  # the chain's tokens that are not yet in a segment
        for attempt_idx, attempt in enumerate(rollout.attempts):
            ids, start = attempt.token_ids, len(self.token_ids) + len(run)
            self.targets += ids
            self.rows += [start - 1 if run else path.context[-1][1] - 1, *range(start, start + len(ids) - 1)]
            self.attempt_of_token += [len(self.attempts)] * len(ids)
            self.attempts.append((place, attempt_idx))
            run += ids[:-1]
            if attempt_idx == len(rollout.turns) - 1:
                break
            kept_tokens, bridge_ids = rollout.seam(attempt_idx)
            unseen = rollout.context_length(attempt_idx) + len(ids) - kept_tokens
            if unseen == 0:
                run += ids[-1:]
            elif unseen > 1:
                path, run = self._segment(run, path).back(unseen - 1), []
            run += bridge_ids
        self._segment(run, path)

    def _segment(self, token_ids: list[int], path: _Path) -> _Path:
        """Append tokens below path; the path that ends with them."""
        if not token_ids:
            return path
        start, end = len(self.token_ids), len(self.token_ids) + len(token_ids)
        self.token_ids += token_ids
        self.positions += range(path.depth, path.depth + len(token_ids))
        self.segments.append(Segment(start, end, path.context))
        return _Path((*path.context, (start, end)), path.depth + len(token_ids), [])

    def build(self) -> PackedMicrobatch:
        assert len(self.rows) == len(self.targets), "one predicting row for every loss token"
        lists = {
            "token_ids_T": self.token_ids,
            "positions_T": self.positions,
            "targets_N": self.targets,
            "rows_N": self.rows,
            "attempt_of_token_N": self.attempt_of_token,
        }
        tensors = {name: torch.tensor(values, dtype=torch.int64) for name, values in lists.items()}
        return PackedMicrobatch(segments=self.segments, attempts=self.attempts, **tensors)


def _bridge_ids(rollout: Rollout) -> list[int]:
    """All that stands between its attempts."""
    return [i for idx in range(len(rollout.turns) - 1) for i in rollout.seam(idx)[1]]


def _num_sampled(rollout: Rollout) -> int:
    return sum(attempt.num_tokens for attempt in rollout.attempts)


def _chain_tokens(rollout: Rollout) -> int:
    """Tokens a rollout adds to a forward, prompt aside; the last token of each leaf is left out."""
    num_forks = 0
    for turn_idx, attempt in enumerate(rollout.attempts[:-1]):
        row_length = rollout.context_length(turn_idx) + attempt.num_tokens
        num_forks += rollout.seam(turn_idx)[0] < row_length
    return _num_sampled(rollout) + len(_bridge_ids(rollout)) - num_forks - 1


def _check_rollout(place: int, rollout: Rollout) -> None:
    where = f"pack_rollouts: rollouts[{place}]"
    if not rollout.prompt_ids:
        raise ValueError(f"{where}.prompt_ids must be non-empty, got []; its last token predicts the first sampled one")
    for turn_idx, attempt in enumerate(rollout.attempts):
        if attempt.num_tokens == 0:
            raise ValueError(f"{where}.turns[{turn_idx}].attempt must have tokens, got none")
        if turn_idx == len(rollout.turns) - 1:
            break
        try:
            kept_tokens, _ = rollout.seam(turn_idx)
        except ValueError as error:
            raise ValueError(f"pack_rollouts: {error}") from None
        row_length = rollout.context_length(turn_idx) + attempt.num_tokens
        if not 1 <= kept_tokens <= row_length:
            raise ValueError(
                f"{where}.turns[{turn_idx}].guidance.kept_tokens must be in [1, {row_length}], the row's "
                f"length, got {kept_tokens}; the context and the attempt make up the row"
            )
