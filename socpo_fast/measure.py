"""Measures a student without training it: `socpo eval` and `socpo rollout`.

Read evaluate and rollout_only. The trainer uses tell_plan and roll_out as well.
"""

import time
import warnings
from contextlib import closing, nullcontext

from socpo_fast.config import Config
from socpo_fast.files import RunFailed, named_failure
from socpo_fast.report.evaluations import add_evaluation
from socpo_fast.report.folder import run_folder
from socpo_fast.report.progress import GuidanceWatch, Progress
from socpo_fast.report.rollouts import ROLLOUT_METRICS, drop_rollouts, write_rollouts
from socpo_fast.report.run_end import command
from socpo_fast.report.run_plan import DRY_RUN_END, Reached, first_line, run_plan_text
from socpo_fast.report.settings import drawn_from, measured_by
from socpo_fast.report.summary import rollout_perf, sources_of, summarize
from socpo_fast.report.tracker import append_row, without_nan
from socpo_fast.run_state import best_checkpoint, last_checkpoint, pick_questions
from socpo_fast.session import Session, credit_options
from socpo_fast.socratic.credit import assign_credit
from socpo_fast.types import Question, Rollout


def evaluate(config: Config, checkpoint: str | None, *, dry_run: bool = False) -> dict[str, float]:
    """Measures the accuracy of a checkpoint on data.eval; adds it to the run's eval.json.

    It takes no lock, so that it may run beside the training whose checkpoint it evaluates.

    Args:
        config:     of the run.
        checkpoint: a folder; "best", the checkpoint of the run's best evaluation; or None, the
                    run's last checkpoint, or student.path if there is none.
        dry_run:    print the plan and return {}.
    """
    from_run = None
    if checkpoint == "best":
        from_run = best_checkpoint(config.folder)
    elif checkpoint is None:
        from_run = last_checkpoint(config.folder)
    path = str(from_run or checkpoint or config.student.path)
    if checkpoint is None and from_run is None:
        warnings.warn(f"eval: {config.folder} has no checkpoint; this is {path}", stacklevel=2)
    student = config.student.model_copy(update={"path": path})
    config = config.model_copy(update={"student": student})
    # A checkpoint found in the run's folder has just been checked byte by byte.
    with closing(Session(config, is_checked=from_run is not None)) as session:
        questions = session.eval_questions()
        if not questions:
            raise ValueError(
                "eval: data.eval must name held-out questions, got none; set data.eval"
            )
        progress = Progress(num_batches=0, live=config.run.live, quiet=config.run.quiet)
        name = f"evaluation of {path}"
        tell_plan(progress, name, session, num_held_out=len(questions), dry_run=dry_run)
        if dry_run:
            return {}
        with progress:
            total = len(questions) * config.eval.samples
            progress.phase("evaluation", batch=0, update=0, total=total)
            metrics = session.evaluate(questions, progress.add_rollout)
        drawn = drawn_from([], questions, session.tokenizer)
    try:
        add_evaluation(
            config.folder,
            metrics,
            # A model of the hub with its commit.
            checkpoint=session.config.student.path,
            data=str(config.data.eval),
            measured_by=measured_by(config, drawn),
        )
    # Minutes of work should be shown all the same.
    except (ValueError, OSError, RunFailed) as error:
        warnings.warn(f"eval: nothing was saved ({error})", stacklevel=2)
    return metrics


def rollout_only(config: Config, *, dry_run: bool = False) -> None:
    """Rolls out run.num_batches batches without updates; writes RUN/rollouts, prints metrics.

    The metrics of the batches go to RUN/rollouts/metrics.jsonl: a metrics.jsonl in the folder
    itself is that of a training. Batches of an earlier call are removed.
    """
    folder = config.folder
    if (folder / "metrics.jsonl").exists():
        raise ValueError(
            f"run: {folder} must hold no training run, whose rollouts stay; set run.name"
        )
    lock = nullcontext() if dry_run else run_folder(folder)
    with lock, closing(Session(config)) as session:
        questions = session.train_questions()
        pick_questions(config, questions, 1)  # refuses too few
        sources = sources_of(questions)
        name = f"rollouts of {config.run.name}, without updates"
        num_batches = config.run.num_batches
        progress = Progress(num_batches=num_batches, live=config.run.live, quiet=config.run.quiet)
        tell_plan(progress, name, session, num_questions=len(questions), dry_run=dry_run)
        if dry_run:
            return
        drop_rollouts(folder, after_batch=0)
        path = folder / ROLLOUT_METRICS
        path.parent.mkdir(exist_ok=True)
        with progress, path.open("w", encoding="utf-8") as file:
            watch = GuidanceWatch(progress)
            for batch in range(1, num_batches + 1):
                chosen = pick_questions(config, questions, batch)
                rollouts, perf = roll_out(session, progress, chosen, batch=batch, update=0)
                factors, _ = assign_credit(rollouts, options=credit_options(config))
                write_rollouts(folder, rollouts, chosen, batch=batch)
                metrics = summarize(rollouts, factors, sources) | perf
                row = {"kind": "batch", "batch": batch, "update": 0, **without_nan(metrics)}
                with named_failure(path):
                    append_row(file, row)
                progress.report(metrics, kind="batch", batch=batch, update=0)
                silence = watch.watch_batch(rollouts, metrics)
                if silence and batch < num_batches:
                    session.check_silence(silence)
        progress.end_card(
            f"{name}: finished",
            facts=[("rollouts", str(folder / "rollouts"))],
            next_commands=[command("report", folder)],
        )


def tell_plan(
    progress: Progress,
    name: str,
    session: Session,
    *,
    dry_run: bool,
    num_questions: int = 0,
    num_held_out: int = 0,
    reached: Reached | None = None,
) -> None:
    """Prints what is about to run, and where the student's template deviates.

    Args:
        dry_run: nothing runs, so the plan is shown even if run.quiet is set.
        num_questions, num_held_out, reached: as in run_plan_text.
    """
    tell = progress.warn if dry_run else progress.note
    tell(first_line(name, session.student, session.config.run.device))
    tell(
        run_plan_text(
            session.config,
            memory=session.memory_note,
            num_questions=num_questions,
            num_held_out=num_held_out,
            num_left_out=sum(session.num_left_out.values()),
            reached=reached,
        )
    )
    for note in session.bridge.notes:
        progress.warn(note)
    if dry_run:
        tell(DRY_RUN_END)


def roll_out(
    session: Session, progress: Progress, questions: dict[int, Question], *, batch: int, update: int
) -> tuple[list[Rollout], dict[str, float]]:
    """Rolls out a batch and shows it; returns its rollouts and performance metrics.

    Args:
        questions: by question_idx. The rollouts come in their order.
        update:    the last one before the batch.
    """
    started = time.perf_counter()
    stats_before = session.engine.stats
    total = len(questions) * session.config.rollout.group_size
    progress.phase("rollout", batch=batch, update=update, total=total)
    rollouts = []
    for rollout in session.training_rollouts(list(questions.values()), batch):
        rollouts.append(rollout)
        progress.add_rollout(rollout, questions[rollout.question_idx])
    seconds = time.perf_counter() - started
    perf = rollout_perf(rollouts, stats_before, session.engine.stats, seconds)
    # Rollouts arrive as they finish, which depends on timing. Sorted, everything after this is
    # reproducible.
    order = {question_idx: i for i, question_idx in enumerate(questions)}
    rollouts.sort(key=lambda rollout: (order[rollout.question_idx], rollout.rollout_idx))
    return rollouts, perf
