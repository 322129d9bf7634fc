"""Rollouts as rows for people: RUN/rollouts/batch_000001.jsonl, read by the page and by anybody else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from socpo_fast.metrics import replace_file
from socpo_fast.types import Question, Rollout, ShownGuidance


def rollout_record(rollout: Rollout, question: Question, *, batch: int) -> dict[str, Any]:
    """A rollout as a row for people: texts and numbers, no token ids. None = not known (no update, no decay yet)."""
    turns = [
        {
            "text": turn.text,
            "is_correct": turn.is_correct,
            "raw_reward": turn.raw_reward,
            "reward_parts": turn.reward_parts,
            "reward": turn.reward,
            "advantage": turn.advantage,
            "context_tokens": rollout.context_length(turn_idx),
            "num_tokens": turn.attempt.num_tokens,
            "finish_reason": turn.attempt.finish_reason,
            "guidance": None if turn.guidance is None else _guidance_record(turn.guidance),
        }
        for turn_idx, turn in enumerate(rollout.turns)
    ]
    return {
        "batch": batch,
        "question_idx": rollout.question_idx,
        "rollout_idx": rollout.rollout_idx,
        "data_source": question.data_source,
        "question": question.text,
        "ground_truth": question.ground_truth,
        "turns": turns,
        "end_reason": rollout.end_reason,
        "policy_version": rollout.turns[0].attempt.policy_version if rollout.turns else None,
    }


def write_rollouts(
    run_folder: str | Path, rollouts: Iterable[Rollout], questions: Mapping[int, Question], *, batch: int
) -> Path:
    """Write rollouts/batch_000001.jsonl, in the order of questions however they finished; questions by question_idx."""
    path = Path(run_folder) / "rollouts" / f"batch_{batch:06d}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    in_order = sorted(rollouts, key=lambda rollout: (rollout.question_idx, rollout.rollout_idx))
    rows = [rollout_record(rollout, questions[rollout.question_idx], batch=batch) for rollout in in_order]
    replace_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def _guidance_record(guidance: ShownGuidance) -> dict[str, Any]:
    """was_shown is False where it leaked the answer or left no room."""
    return {
        "raw_text": guidance.raw_text,
        "text": guidance.text,
        "was_shown": guidance.bridge_ids is not None,
        "kept_tokens": guidance.kept_tokens,
    }
