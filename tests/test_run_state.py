"""The state of a run: it round trips through a checkpoint, and tells which save or eval is due."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from socpo_fast.run_state import RECORD_VERSION, RunState

CHECKPOINT = Path("runs/run/checkpoints/update_000012")
DRAWN_FROM = {"questions of data.train": "13 with hash 0123456789ab"}
# The record in checkpoints of earlier versions, key for key.
RECORD = {
    "record_version": 3,
    "batch": 6,
    "eval_due": True,
    "policy_version": 12,
    "drawn_from": DRAWN_FROM,
}


def read(record: dict[str, Any], **changes: Any) -> RunState:
    settings = {
        "checkpoint": CHECKPOINT,
        "drawn_from": DRAWN_FROM,
        "measured_by": "two questions",
        "is_own": True,
    }
    return RunState.from_record(record, **(settings | changes))


@pytest.fixture
def fresh() -> RunState:
    return RunState(drawn_from=DRAWN_FROM, eval_due=True)


@pytest.mark.parametrize("eval_due", [True, False])
def test_round_trip_through_a_checkpoint(fresh: RunState, eval_due: bool) -> None:
    fresh.begin_updates()
    fresh.end_batch(policy_version=5, eval_due=eval_due, save_due=True)
    record = json.loads(json.dumps(fresh.to_record()))
    fresh.end_save()
    assert read(record) == fresh
    assert not read(record, is_own=False).is_saved


def test_record_of_an_earlier_version_is_read(fresh: RunState) -> None:
    """Written again, the record adds that no best evaluation and no tokens are known."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = read(RECORD)
    assert (state.batch, state.policy_version, state.eval_due) == (6, 12, True)
    assert (state.between_batches, state.is_saved, state.save_due) == (True, True, False)
    assert state.to_record() == RECORD | {"best": None, "num_tokens": 0}
    assert fresh.to_record().keys() == RECORD.keys() | {"best", "num_tokens"}


def test_current_data_replace_those_of_the_record() -> None:
    current_data = DRAWN_FROM | {"questions": "14"}
    assert read(RECORD, drawn_from=current_data).to_record()["drawn_from"] == current_data


def test_no_eval_is_due_without_held_out_questions() -> None:
    assert not read(RECORD, measured_by="").eval_due


@pytest.mark.parametrize("version", [None, 1, 2, RECORD_VERSION + 1])
def test_another_record_version_is_refused(version: int | None) -> None:
    record = {key: value for key, value in RECORD.items() if key != "record_version"}
    record |= {} if version is None else {"record_version": version}
    with pytest.raises(ValueError, match=f"must be of record version 3, got {version}, "):
        read(record)


def test_state_is_saved_again_only_after_a_change(fresh: RunState) -> None:
    """A run that ends before its first batch is saved as well; an evaluation changes the state."""
    assert not fresh.is_saved
    fresh.end_save()
    assert fresh.is_saved
    assert not fresh.end_evaluation(update=0, success=0.5, measured_by="two questions")
    assert not fresh.is_saved and not fresh.eval_due and not fresh.save_due
    fresh.end_save()
    fresh.begin_updates()
    assert not fresh.between_batches
    fresh.end_batch(policy_version=1, eval_due=False, save_due=True)
    assert fresh.between_batches and fresh.save_due and not fresh.is_saved
    assert fresh.batch == 1
    fresh.end_save()
    assert fresh.is_saved and not fresh.save_due


def test_first_of_equally_good_evaluations_is_best(fresh: RunState) -> None:
    """A better evaluation makes a save due, an equal one does not.

    The evaluation at the start does not count, as it has no checkpoint. A success of 0 is none.
    """
    is_best = []
    for update, success in ((0, 0.9), (4, 0.0), (8, 0.25), (12, 0.25), (16, 0.125), (20, 0.5)):
        fresh.save_due = False
        is_best.append(
            fresh.end_evaluation(update=update, success=success, measured_by="two questions")
        )
        assert fresh.save_due == is_best[-1]
    assert is_best == [False, False, True, False, False, True]
    assert fresh.to_record()["best"] == {
        "update": 20,
        "success": 0.5,
        "measured_by": "two questions",
    }
