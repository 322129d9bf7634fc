"""Keeps the state of a run: what a checkpoint stores, where a run resumes, what is due next.

Read RunState, then find_checkpoint (where run.resume continues), recall_best, and the schedule of a
run: update_order, pick_questions, is_due. A run moves through these states:

    between batches --begin_updates--> within updates --end_batch--> between batches
      end_evaluation, end_save         nothing is saved              what is due comes first
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from socpo_fast.config import Config
from socpo_fast.files import read_json, replace_file
from socpo_fast.report.tracker import read_metrics
from socpo_fast.socratic.data import batch_questions, question_order
from socpo_fast.training.checkpoint import STATE, checkpoint_path, find_damage, latest_checkpoint
from socpo_fast.types import Question

# This file stands in checkpoints/ until the first checkpoint is complete. It tells a run that never
# saved, which may start anew, from a run whose checkpoints were lost, which may not.
NONE_YET = "none_yet"
# Added to run.seed, which is smaller, so that the order of updates uses other random numbers than
# the order of questions.
UPDATE_ORDER_SEED = 2**31
RECORD_VERSION = 3  # of what a run folder holds; since 3, checkpoints store their settings


@dataclass(kw_only=True)
class RunState:
    """The state of a run. The trainer reports events to it and asks what is due next.

    A checkpoint stores the first six fields. The others need not be stored, because a checkpoint
    is made between two batches, and a resumed run has nothing to save yet.

    Fields:
        drawn_from:      the questions and the tokenizer as text, identified by hashes.
        eval_due:        whether an evaluation comes before the next batch.
        batch:           the number of finished batches.
        policy_version:  the engine's, at the end of the last batch.
        num_tokens:      sampled in the rollouts of the finished batches.
        best:            the best evaluation after an update, or None. Its checkpoint is kept. Keys:
                         "update", "success", and "measured_by", a text of everything beside the
                         weights that the success depends on.
        save_due:        whether a checkpoint comes before the next batch, after the evaluation.
        between_batches: whether the weights are those at the end of a batch, and may be saved.
        is_saved:        whether the last checkpoint holds exactly this state.
    """

    drawn_from: dict[str, str]
    eval_due: bool
    batch: int = 0
    policy_version: int = 0
    num_tokens: int = 0
    best: dict[str, Any] | None = None
    save_due: bool = False
    between_batches: bool = True
    is_saved: bool = False

    def begin_updates(self) -> None:
        """Notes that the weights now change, so that they must not be saved."""
        self.between_batches = False

    def end_batch(self, *, policy_version: int, eval_due: bool, save_due: bool) -> None:
        """Notes that the last update of a batch is done, and what is due before the next one."""
        self.batch += 1
        self.policy_version = policy_version
        self.eval_due = eval_due
        self.save_due = save_due
        self.between_batches = True
        self.is_saved = False

    def end_evaluation(self, *, update: int, success: float, measured_by: str) -> bool:
        """Notes the result of an evaluation; returns whether it is the best so far.

        A success of 0 is never the best. The evaluation before the first update does not count,
        since there is no checkpoint of update 0. A new best makes a checkpoint due.
        """
        self.eval_due = False
        # A checkpoint made earlier still says that the evaluation is due, so it is outdated.
        self.is_saved = False
        if update == 0 or success <= (0.0 if self.best is None else self.best["success"]):
            return False
        self.best = {"update": update, "success": success, "measured_by": measured_by}
        self.save_due = True
        return True

    def end_save(self) -> None:
        """Notes that a checkpoint of this state is on the disk."""
        self.save_due = False
        self.is_saved = True

    def to_record(self) -> dict[str, Any]:
        """Returns what a checkpoint stores, as JSON values; from_record reads it."""
        return {
            "record_version": RECORD_VERSION,
            "batch": self.batch,
            "eval_due": self.eval_due,
            "policy_version": self.policy_version,
            "num_tokens": self.num_tokens,
            "drawn_from": self.drawn_from,
            "best": self.best,
        }

    @classmethod
    def from_record(
        cls,
        record: Mapping[str, Any],
        *,
        checkpoint: Path,
        drawn_from: dict[str, str],
        measured_by: str,
        is_own: bool,
    ) -> Self:
        """Returns the state stored in a checkpoint, for a run with the current settings.

        Args:
            record:      what to_record returned when the checkpoint was made.
            checkpoint:  its folder.
            drawn_from:  of the current data. report/settings.py reports a change of the data.
            measured_by: a text of what evaluations depend on beside the weights. "" means that
                         there are no held-out questions, so that no evaluation is due.
            is_own:      whether the checkpoint belongs to this run rather than to another.

        Raises:
            ValueError: the checkpoint is of another record version.
        """
        version = record.get("record_version")
        if version != RECORD_VERSION:
            raise ValueError(
                f"run: {checkpoint} must be of record version {RECORD_VERSION}, got {version}, "
                "from an earlier socpo_fast; choose another run.name"
            )
        best = record.get("best")  # some earlier checkpoints do not have it
        return cls(
            drawn_from=drawn_from,
            eval_due=record["eval_due"] and measured_by != "",
            batch=record["batch"],
            policy_version=record["policy_version"],
            num_tokens=record.get("num_tokens", 0),  # some earlier checkpoints do not have it
            best=best and recall_best(best, checkpoint, measured_by=measured_by, is_own=is_own),
            is_saved=is_own,
        )


def recall_best(
    best: dict[str, Any], checkpoint: Path, *, measured_by: str, is_own: bool
) -> dict[str, Any] | None:
    """Returns the best evaluation stored in a checkpoint, or None with a warning that says why.

    It no longer counts if evaluations now measure something else, or if its own checkpoint is
    damaged or gone. (measured_by "" means that there are no evaluations; then it still counts.) A
    run that starts from a checkpoint of another run keeps the best evaluation only if it is that of
    this checkpoint.
    """
    path = checkpoint_path(checkpoint.parent, best["update"])
    # The caller has just checked `checkpoint` byte by byte, so only its sizes are compared again.
    reason = (
        find_damage(path, thorough=path != checkpoint)
        if is_own or path == checkpoint
        else "it is another run's"
    )
    if measured_by not in (best["measured_by"], ""):
        reason = f"{best['measured_by']} -> {measured_by}"
    if reason:
        # prune_checkpoints never removes a damaged checkpoint, so only a whole one is announced.
        fate = (
            "; it goes at the next save unless it is one of the newest run.keep_checkpoints, copy "
            "it to keep it"
            if is_own and find_damage(path, thorough=False) is None
            else ""
        )
        warnings.warn(
            f"run: {path.name} counts no more as the best checkpoint: {reason}{fate}", stacklevel=2
        )
    return None if reason else best


def mark_none_yet(checkpoints: Path) -> None:
    """Makes the folder; writes the file NONE_YET, or removes it if there is a checkpoint."""
    checkpoints.mkdir(exist_ok=True)
    if any(checkpoints.glob("update_*")):
        (checkpoints / NONE_YET).unlink(missing_ok=True)
    else:
        replace_file(checkpoints / NONE_YET, "")


def last_checkpoint(folder: Path) -> Path | None:
    """Returns the last undamaged checkpoint of a run's folder; None if the run never saved one.

    Raises:
        ValueError: there were checkpoints, but none is left undamaged.
    """
    latest = latest_checkpoint(folder / "checkpoints")
    if latest or (folder / "checkpoints" / NONE_YET).is_file():
        return latest
    # No checkpoint and no NONE_YET, but rows of updates: the checkpoints were lost or moved.
    # Without this error the run would silently start from update 0.
    if updates := max((row["update"] for row in read_metrics(folder / "metrics.jsonl")), default=0):
        raise ValueError(
            f"run: {folder / 'checkpoints'} must hold a checkpoint, as {folder / 'metrics.jsonl'} "
            f"tells of update {updates}, got none; bring it back, or remove {folder} to start again"
        )
    return None


def best_checkpoint(folder: Path) -> Path:
    """Returns the checkpoint of the best evaluation, as the last checkpoint tells; checks it."""
    latest = last_checkpoint(folder)
    best = None if latest is None else read_json(latest / STATE)["trainer"].get("best")
    if best is None:
        raise ValueError(
            f"eval: --checkpoint best must be in {folder / 'checkpoints'}, got no evaluation with "
            "a success "
            "behind an update; name a folder, or train with data.eval"
        )
    path = checkpoint_path(folder / "checkpoints", best["update"])
    if damage := find_damage(path):
        raise ValueError(
            f"eval: --checkpoint best must be whole, got {damage}; "
            f"bring it back, or name another checkpoint of {path.parent}"
        )
    return path


def find_checkpoint(config: Config) -> Path | None:
    """Returns the checkpoint that run.resume continues from, fully checked; None for a new run."""
    latest = last_checkpoint(config.folder)
    if config.run.resume == "auto":
        return latest
    if config.run.resume != "never":
        resume_path = Path(config.run.resume)
        # By length first: update_1000000 is later than update_999999.
        is_earlier = latest is not None and (len(resume_path.name), resume_path.name) < (
            len(latest.name),
            latest.name,
        )
        if (
            latest is not None
            and is_earlier
            and resume_path.resolve().parent == latest.resolve().parent
        ):
            raise ValueError(
                f"run: run.resume must be the run's last checkpoint {latest.name} "
                f"or one of another run, got {resume_path.name}; "
                "choose another run.name, or remove the later ones"
            )
        if latest is None and (damage := find_damage(resume_path)):
            raise ValueError(f"run: run.resume must be a whole checkpoint, got {damage}")
        # A run that has its own checkpoints continues from them. So the same command both starts
        # the run and resumes it.
        return latest or resume_path
    if latest is not None:
        raise ValueError(
            f"run: {config.folder} must be new with run.resume never, got one with {latest.name}; "
            "choose another run.name or set run.resume auto"
        )
    return None


def update_order(config: Config, num_groups: int, batch: int) -> list[list[int]]:
    """Returns the group indices of each update of batch 1, 2, ..; each epoch is shuffled anew."""
    size = config.train.questions_per_update
    epochs = config.train.epochs
    order = []
    for epoch in range((batch - 1) * epochs, batch * epochs):
        shuffled = question_order(UPDATE_ORDER_SEED + config.run.seed, epoch, num_groups)
        order += [shuffled[start : start + size] for start in range(0, num_groups, size)]
    return order


def pick_questions(config: Config, questions: list[Question], batch: int) -> dict[int, Question]:
    """Returns the questions of batch 1, 2, .. by question_idx, in the order of the batch."""
    picked = batch_questions(
        questions, config.run.seed, batch - 1, config.rollout.questions_per_batch
    )
    return {question.question_idx: question for question in picked}


def is_due(before: int, after: int, every: int) -> bool:
    """Whether the updates from `before` to `after` crossed a multiple of `every`; 0 = never."""
    return every > 0 and before // every < after // every
