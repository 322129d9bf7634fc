"""Writes and reads rollouts as rows for people: RUN/rollouts/batch_000001.jsonl.

The rows are for report.html and for any other reader; training never reads them back.
export_rollouts makes one parquet file of all of them.
"""

from collections.abc import Iterable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from socpo_fast.extras import import_extra
from socpo_fast.files import replace_file
from socpo_fast.ops._checks import check_rule
from socpo_fast.report.tracker import read_jsonl, replace_jsonl
from socpo_fast.types import Question, Rollout, ShownGuidance

# The metrics of `socpo rollout`, in the run's folder. A metrics.jsonl there would be a training's.
ROLLOUT_METRICS = "rollouts/metrics.jsonl"


def rollout_record(rollout: Rollout, question: Question, *, batch: int) -> dict[str, Any]:
    """Returns a rollout as a row for people: texts and numbers, no token ids.

    None stands for what is not known, such as rewards before the first decay.
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
        "prompt": list(question.messages),
        "question": question.text,
        "ground_truth": question.ground_truth,
        "reference_solution": question.reference_solution,
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
    """Writes rollouts/batch_000001.jsonl and returns its path.

    Rollouts are sorted by question, so the file does not depend on the order in which they ended.

    Args:
        questions: by question_idx.
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


def export_rollouts(run_folder: str | Path, path: str | Path) -> int:
    """Writes all rollouts of a run to a parquet file in verl's layout, one a row.

    `datasets` loads the file, and load_questions reads the questions back. extra_info.turns holds
    the attempts in order, each with the guidance that followed it.

    Args:
        path: ends in .parquet; a file that is there is replaced.

    Returns:
        The number of rollouts.

    Raises:
        ValueError: the run has no rollouts, people gave one other types, path is no name of a
            parquet file, or pyarrow is not installed.

    Memory: all rows.
    """
    path = Path(path)
    check_rule("export", "the file", str(path), path.suffix == ".parquet", "named FILE.parquet")
    pa = import_extra("export", "pyarrow", extra="parquet")
    parquet = import_extra("export", "pyarrow.parquet", extra="parquet")
    rows = [
        _exported_row(row)
        for file in batch_files(run_folder)
        # Rows of an older version hold no prompt.
        for row in read_jsonl(file, lambda row: _is_complete(row) and "prompt" in row)
    ]
    check_rule("export", "the run folder", str(run_folder), bool(rows), "one with rollouts")
    text, count, number = pa.string(), pa.int64(), pa.float64()
    turn = dict.fromkeys(("text", "finish_reason", "guidance"), text)
    turn |= {"is_correct": pa.bool_(), "reward": number, "advantage": number}
    extra_info = dict.fromkeys(("index", "batch", "rollout_idx", "policy_version"), count)
    extra_info |= {"end_reason": text, "reference_solution": text}
    extra_info["turns"] = pa.list_(pa.struct(turn))
    # Named types, since a column of a run may hold nothing but None.
    columns = {
        "data_source": text,
        "prompt": pa.list_(pa.struct({"role": text, "content": text})),
        "reward_model": pa.struct({"style": text, "ground_truth": text}),
        "extra_info": pa.struct(extra_info),
    }
    buffer = BytesIO()
    try:
        parquet.write_table(pa.Table.from_pylist(rows, pa.schema(columns)), buffer)
    except (pa.ArrowException, OverflowError) as error:
        raise ValueError(
            f"export: {run_folder} must hold rollouts as a run writes them, got others ({error})"
        ) from error
    replace_file(path, buffer.getvalue())
    return len(rows)


def _exported_row(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row of rollout_record in verl's layout."""
    turns = [
        {key: turn[key] for key in ("text", "finish_reason", "is_correct", "reward", "advantage")}
        | {"guidance": (turn["guidance"] or _NO_GUIDANCE)["text"]}
        for turn in row["turns"]
    ]
    extra_keys = ("batch", "rollout_idx", "policy_version", "end_reason", "reference_solution")
    return {
        "data_source": row["data_source"],
        "prompt": row["prompt"],
        "reward_model": {"style": "rule", "ground_truth": row["ground_truth"]},
        "extra_info": {key: row.get(key) for key in extra_keys}
        | {"index": row["question_idx"], "turns": turns},
    }


def _age(path: Path) -> tuple[int, str]:
    """Returns what sorts files of batches: names no longer sort as text beyond batch 999999."""
    return len(path.name), path.name


def batch_files(run_folder: str | Path) -> list[Path]:
    """Returns the files of rollouts of all batches in order."""
    return sorted(Path(run_folder).glob("rollouts/batch_*.jsonl"), key=_age)


def drop_rollouts(run_folder: Path, *, after_batch: int) -> None:
    """Removes files of later batches: an earlier start made them, and this one makes them anew."""
    last = run_folder / "rollouts" / f"batch_{after_batch:06d}.jsonl"
    for path in batch_files(run_folder):
        if _age(path) > _age(last):
            path.unlink()


def read_rollouts(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a file; leaves out damaged ones with one warning."""
    return read_jsonl(path, _is_complete)


def _is_complete(row: dict[str, Any]) -> bool:
    """Whether a row has everything that the page shows, with numbers where it needs them."""
    # People may edit these files, and the page should show what is left of them.
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
    # JSON integers have no limit, but above 1e308 they do not convert to a float.
    return bool(turns) and all(
        isinstance(number, int | float) and not abs(number) > 1e308 for number in numbers
    )


def _guidance_record(guidance: ShownGuidance) -> dict[str, Any]:
    """Returns guidance as a row; was_shown is False if it leaked the answer or did not fit."""
    return {
        "raw_text": guidance.raw_text,
        "text": guidance.text,
        "was_shown": guidance.bridge_ids is not None,
        "kept_tokens": guidance.kept_tokens,
    }


_NO_GUIDANCE = {"text": None, "was_shown": False, "kept_tokens": 0}
