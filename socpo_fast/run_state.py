"""Where a run stands, what a checkpoint keeps of it, where a run goes on, what comes next."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from socpo_fast.config import Config
from socpo_fast.files import read_json, replace_file
from socpo_fast.report.tracker import read_metrics
from socpo_fast.socratic.data import batch_questions, question_order
from socpo_fast.train.checkpoint import STATE, checkpoint_path, damage_of, latest_checkpoint
from socpo_fast.types import Question

# In checkpoints/ until the first one is whole: a run that ended before begins anew, and loses none.
NONE_YET = "none_yet"
UPDATE_ORDER_SEED = 2**31  # keeps the order of updates apart from that of questions; above run.seed
RECORD_VERSION = 3  # of what a run folder holds; checkpoints keep the settings they were made under


@dataclass(kw_only=True)
class RunState:
    """The state of a run. The trainer tells it what happens and asks it what comes next.

    A checkpoint keeps the first five fields. The others need no keeping: a checkpoint is made
    between two batches, and where a run goes on from one, nothing is to be saved yet.

    Fields:
        drawn_from:      the questions and the tokenizer in words, by their hashes.
        eval_due:        an evaluation comes before the next batch.
        batch:           finished batches.
        policy_version:  the engine's at the end of the last batch.
        best:            the best evaluation behind an update, whose checkpoint stays: "update",
                         "success", and "measured_by", what that depends on beside the weights.
        save_due:        a checkpoint comes before the next batch, and after the evaluation.
        between_batches: the weights are those of the last batch's end, so that they can be saved.
        is_saved:        the last checkpoint is of this very state.
    """

    drawn_from: dict[str, str]
    eval_due: bool
    batch: int = 0
    policy_version: int = 0
    best: dict[str, Any] | None = None
    save_due: bool = False
    between_batches: bool = True
    is_saved: bool = False

    def begin_updates(self) -> None:
        """The weights leave those of the last batch's end."""
        self.between_batches = False

    def end_batch(self, *, policy_version: int, eval_due: bool, save_due: bool) -> None:
        """The last update of a batch is made."""
        self.batch += 1
        self.policy_version = policy_version
        self.eval_due = eval_due
        self.save_due = save_due
        self.between_batches = True
        self.is_saved = False

    def end_evaluation(self, *, update: int, success: float, measured_by: str) -> bool:
        """The evaluation that was due is made. A checkpoint from before it still owes one.

        Returns whether it is better than all before and than 0, which makes a checkpoint due. That
        of the start, update 0, has none and does not count.
        """
        self.eval_due = False
        self.is_saved = False
        if update == 0 or success <= (0.0 if self.best is None else self.best["success"]):
            return False
        self.best = {"update": update, "success": success, "measured_by": measured_by}
        self.save_due = True
        return True

    def end_save(self) -> None:
        """A checkpoint of this state is on the disk."""
        self.save_due = False
        self.is_saved = True

    def to_record(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON values; from_record reads it."""
        return {
            "record_version": RECORD_VERSION,
            "batch": self.batch,
            "eval_due": self.eval_due,
            "policy_version": self.policy_version,
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
        """The state that a checkpoint kept, for a run of the present settings.

        Args:
            record:      what to_record returned when the checkpoint was made.
            checkpoint:  its folder.
            drawn_from:  of the present data; report/settings.py tells of other data.
            measured_by: what evaluations depend on beside the weights, in words; "": there are
                         no held-out questions, and nothing is due.
            is_own:      the checkpoint is this run's and not another's.

        Raises:
            ValueError: the checkpoint is of another record version.
        """
        version = record.get("record_version")
        if version != RECORD_VERSION:
            raise ValueError(
                f"run: {checkpoint} must be of record version {RECORD_VERSION}, got {version}, "
                "from an earlier socpo_fast; choose another run.name"
            )
        best = record.get("best")  # earlier versions kept none
        return cls(
            drawn_from=drawn_from,
            eval_due=record["eval_due"] and measured_by != "",
            batch=record["batch"],
            policy_version=record["policy_version"],
            best=best and recall_best(best, checkpoint, measured_by=measured_by, is_own=is_own),
            is_saved=is_own,
        )


def recall_best(
    best: dict[str, Any], checkpoint: Path, *, measured_by: str, is_own: bool
) -> dict[str, Any] | None:
    """The best evaluation that a checkpoint knows of, if it still counts; a warning says why not.

    It does not where evaluations measure something else by now ("": there are none), or where its
    own checkpoint is damaged or gone. A run that begins from another's has its best one only where
    it begins from that. The checkpoint itself is read already, and not again.
    """
    path = checkpoint_path(checkpoint.parent, best["update"])
    reason = (
        damage_of(path, thorough=path != checkpoint)
        if is_own or path == checkpoint
        else "it is another run's"
    )
    if measured_by not in (best["measured_by"], ""):
        reason = f"{best['measured_by']} -> {measured_by}"
    if reason:
        # prune_checkpoints leaves one that lacks something where it is.
        fate = (
            "; it goes at the next save unless it is one of the newest run.keep_checkpoints, copy "
            "it to keep it"
            if is_own and damage_of(path, thorough=False) is None
            else ""
        )
        warnings.warn(
            f"run: {path.name} counts no more as the best checkpoint: {reason}{fate}", stacklevel=2
        )
    return None if reason else best


def mark_none_yet(checkpoints: Path) -> None:
    """Make the folder and keep its mark true: NONE_YET stands there until the first checkpoint
    does.
    """
    checkpoints.mkdir(exist_ok=True)
    if any(checkpoints.glob("update_*")):
        (checkpoints / NONE_YET).unlink(missing_ok=True)
    else:
        replace_file(checkpoints / NONE_YET, "")


def last_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint of a run's folder; None where there never was one.

    Raises:
        ValueError: there were checkpoints, and none is whole.
    """
    latest = latest_checkpoint(folder / "checkpoints")
    if latest or (folder / "checkpoints" / NONE_YET).is_file():
        return latest
    if updates := max((row["update"] for row in read_metrics(folder / "metrics.jsonl")), default=0):
        raise ValueError(
            f"run: {folder / 'checkpoints'} must hold a checkpoint, as {folder / 'metrics.jsonl'} "
            f"tells of update {updates}, got none; bring it back, or remove {folder} to start again"
        )
    return None


def best_checkpoint(folder: Path) -> Path:
    """The checkpoint of a run's best evaluation, as its last one tells, whole to the byte."""
    latest = last_checkpoint(folder)
    best = None if latest is None else read_json(latest / STATE)["trainer"].get("best")
    if best is None:
        raise ValueError(
            f"eval: --checkpoint best must be in {folder / 'checkpoints'}, got no evaluation with "
            "a success "
            "behind an update; name a folder, or train with data.eval"
        )
    path = checkpoint_path(folder / "checkpoints", best["update"])
    if damage := damage_of(path):
        raise ValueError(
            f"eval: --checkpoint best must be whole, got {damage}; "
            f"bring it back, or name another checkpoint of {path.parent}"
        )
    return path


def find_checkpoint(config: Config) -> Path | None:
    """Where run.resume says to go on from, whole to the byte; None for a fresh run."""
    latest = last_checkpoint(config.folder)
    if config.run.resume == "auto":
        return latest
    if config.run.resume != "never":
        named = Path(config.run.resume)
        is_earlier = latest is not None and (len(named.name), named.name) < (
            len(latest.name),
            latest.name,
        )
        if latest is not None and is_earlier and named.resolve().parent == latest.resolve().parent:
            raise ValueError(
                f"run: run.resume must be the run's last checkpoint {latest.name} "
                f"or one of another run, got {named.name}; "
                "choose another run.name, or remove the later ones"
            )
        if latest is None and (damage := damage_of(named)):
            raise ValueError(f"run: run.resume must be a whole checkpoint, got {damage}")
        return latest or named  # a run that has begun goes on from its own
    if latest is not None:
        raise ValueError(
            f"run: {config.folder} must be new with run.resume never, got one with {latest.name}; "
            "choose another run.name or set run.resume auto"
        )
    return None


def update_order(config: Config, num_groups: int, batch: int) -> list[list[int]]:
    """The groups of each update of batch 1, 2, ..; every epoch has a seeded order of its own."""
    size = config.train.questions_per_update
    epochs = config.train.epochs
    order = []
    for epoch in range((batch - 1) * epochs, batch * epochs):
        shuffled = question_order(UPDATE_ORDER_SEED + config.run.seed, epoch, num_groups)
        order += [shuffled[start : start + size] for start in range(0, num_groups, size)]
    return order


def pick_questions(config: Config, questions: list[Question], batch: int) -> dict[int, Question]:
    """The questions of batch 1, 2, .. by question_idx, in the batch's order."""
    picked = batch_questions(
        questions, config.run.seed, batch - 1, config.rollout.questions_per_batch
    )
    return {question.question_idx: question for question in picked}


def is_due(before: int, after: int, every: int) -> bool:
    """Whether the updates from `before` to `after` crossed a multiple of `every`; 0 = never."""
    return every > 0 and before // every < after // every
