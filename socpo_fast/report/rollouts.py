"""Rollouts as rows for people: RUN/rollouts/batch_000001.jsonl, read by the page and by anybody
else.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from socpo_fast.report.tracker import read_jsonl, replace_jsonl
from socpo_fast.types import Question, Rollout, ShownGuidance


def rollout_record(rollout: Rollout, question: Question, *, batch: int) -> dict[str, Any]:
    """A rollout as a row for people: texts and numbers, no token ids. None = not known (no update,
    no decay yet).
    """
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
    run_folder: str | Path,
    rollouts: Iterable[Rollout],
    questions: Mapping[int, Question],
    *,
    batch: int,
) -> Path:
    """Write rollouts/batch_000001.jsonl, in the order of questions however they finished; questions
    by question_idx.
    """
    path = Path(run_folder) / "rollouts" / f"batch_{batch:06d}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    in_order = sorted(rollouts, key=lambda rollout: (rollout.question_idx, rollout.rollout_idx))
    replace_jsonl(
        path,
        (
            rollout_record(rollout, questions[rollout.question_idx], batch=batch)
            for rollout in in_order
        ),
    )
    return path


def drop_rollouts(run_folder: Path, *, after_batch: int) -> None:
    """Removes files of batches that will be made anew or that another start of this run made."""
    last = run_folder / "rollouts" / f"batch_{after_batch:06d}.jsonl"
    for path in (run_folder / "rollouts").glob("batch_*.jsonl"):
        if (len(path.name), path.name) > (len(last.name), last.name):
            path.unlink()


def read_rollouts(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of rollouts; one warning tells of those that are damaged and left out."""
    return read_jsonl(path, _is_whole)


def _is_whole(row: dict[str, Any]) -> bool:
    """Whether everything that the page shows is there, numbers as numbers."""
    try:
        turns = [(turn, turn["guidance"] or _NO_GUIDANCE) for turn in row["turns"]]
        numbers = [row["batch"], row["question_idx"]]
        for turn, guidance in turns:
            numbers += [turn["context_tokens"], turn["num_tokens"], guidance["kept_tokens"] or 0]
            numbers += [turn["reward"] or 0, turn["advantage"] or 0, turn["is_correct"]]
            _ = turn["text"], turn["finish_reason"], guidance["text"], guidance["was_shown"]
        _ = row["question"], row["ground_truth"], row["data_source"]
        _ = row["end_reason"], row["policy_version"]
    except (KeyError, TypeError):
        return False
    # Beyond 1e308 an integer is no float, and cannot be drawn.
    return bool(turns) and all(
        isinstance(number, int | float) and not abs(number) > 1e308 for number in numbers
    )


def _guidance_record(guidance: ShownGuidance) -> dict[str, Any]:
    """was_shown is False where it leaked the answer or left no room."""
    return {
        "raw_text": guidance.raw_text,
        "text": guidance.text,
        "was_shown": guidance.bridge_ids is not None,
        "kept_tokens": guidance.kept_tokens,
    }


_NO_GUIDANCE = {"text": None, "was_shown": False, "kept_tokens": 0}
