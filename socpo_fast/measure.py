"""Measures a student without training it: `socpo eval` and `socpo rollout`."""

import shlex
import time
import warnings
from contextlib import closing

from socpo_fast.config import Config
from socpo_fast.files import RunFailed
from socpo_fast.report.evaluations import add_evaluation, without_nan
from socpo_fast.report.folder import run_folder
from socpo_fast.report.printable import tell
from socpo_fast.report.progress import GuidanceWatch, Progress
from socpo_fast.report.rollouts import ROLLOUT_METRICS, write_rollouts
from socpo_fast.report.run_plan import DRY_RUN_END, first_line, run_plan_text
from socpo_fast.report.settings import drawn_from, measured_by
from socpo_fast.report.summary import rollout_perf, sources_of, summarize
from socpo_fast.report.tracker import replace_jsonl
from socpo_fast.run_state import best_checkpoint, last_checkpoint, pick_questions
from socpo_fast.session import Session, credit_options
from socpo_fast.socratic.credit import assign_credit


def evaluate(config: Config, checkpoint: str | None, *, dry_run: bool = False) -> dict[str, float]:
    """Measures the accuracy of a checkpoint on data.eval; adds it to the run's eval.json.

    It takes no lock, so that it may run beside the training whose checkpoint it evaluates.

    Args:
        config:     of the run.
        checkpoint: a folder; "best", the checkpoint of the run's best evaluation; or None, the
                    run's last checkpoint, or student.path if there is none.
        dry_run:    print the plan and return {}.
    """
    requested = best_checkpoint(config.folder) if checkpoint == "best" else checkpoint
    own = requested if checkpoint == "best" else None
    if requested is None:
        own = last_checkpoint(config.folder)
    path = str(requested or own or config.student.path)
    student = config.student.model_copy(update={"path": path})
    config = config.model_copy(update={"student": student})
    # A checkpoint of the run's own has just been checked byte by byte.
    with closing(Session(config, is_checked=own is not None)) as session:
        questions = session.eval_questions()
        if not questions:
            raise ValueError(
                "eval: data.eval must name held-out questions, got none; set data.eval"
            )
        plan = run_plan_text(
            config,
            memory=session.memory_note,
            num_held_out=len(questions),
            num_left_out=sum(session.num_left_out.values()),
        )
        lines = [first_line(f"evaluation of {path}", session.student, config.run.device), plan]
        if dry_run:
            tell("\n".join([*lines, DRY_RUN_END]))
            return {}
        with progress_of(config, lines, num_batches=0) as progress:
            total = len(questions) * config.eval.samples
            progress.phase("evaluation", batch=0, update=0, total=total)
            metrics = session.evaluate(questions, progress.add_rollout)
        drawn = drawn_from([], questions, session.tokenizer)
    try:
        add_evaluation(
            config.folder,
            metrics,
            checkpoint=path,
            data=str(config.data.eval),
            measured_by=measured_by(config, drawn),
        )
    # Minutes of work should be shown all the same.
    except (ValueError, OSError, RunFailed) as error:
        warnings.warn(f"eval: nothing was saved ({error})", stacklevel=2)
    return metrics


def progress_of(config: Config, lines: list[str], *, num_batches: int) -> Progress:
    """Returns a display for rollouts without updates that has printed these lines."""
    run = config.run
    progress = Progress(num_batches=num_batches, live=run.live, quiet=run.quiet)
    for line in lines:
        progress.note(line)
    return progress


def rollout_only(config: Config, *, dry_run: bool = False) -> None:
    """Rolls out run.num_batches batches without updates; writes RUN/rollouts, prints metrics.

    The metrics of the batches go to RUN/rollouts/metrics.jsonl: a metrics.jsonl in the folder
    itself is that of a training.
    """
    folder = config.folder
    if (folder / "metrics.jsonl").exists():
        raise ValueError(
            f"run: {folder} must hold no training run, whose rollouts stay; set run.name"
        )
    with run_folder(folder), closing(Session(config)) as session:
        questions = session.train_questions()
        pick_questions(config, questions, 1)  # refuses too few
        sources = sources_of(questions)
        plan = run_plan_text(
            config,
            memory=session.memory_note,
            num_questions=len(questions),
            num_left_out=sum(session.num_left_out.values()),
        )
        name = f"rollouts of {config.run.name}, without updates"
        lines = [first_line(name, session.student, config.run.device), plan]
        if dry_run:
            tell("\n".join([*lines, DRY_RUN_END]))
            return
        rows = []
        with progress_of(config, lines, num_batches=config.run.num_batches) as progress:
            watch = GuidanceWatch(progress)
            for batch in range(1, config.run.num_batches + 1):
                started = time.perf_counter()
                stats = session.engine.stats
                chosen = pick_questions(config, questions, batch)
                total = len(chosen) * config.rollout.group_size
                progress.phase("rollout", batch=batch, update=0, total=total)
                rollouts = []
                for rollout in session.training_rollouts(list(chosen.values()), batch):
                    rollouts.append(rollout)
                    progress.add_rollout(rollout, chosen[rollout.question_idx])
                perf = rollout_perf(
                    rollouts, stats, session.engine.stats, time.perf_counter() - started
                )
                factors, _ = assign_credit(rollouts, options=credit_options(config))
                write_rollouts(folder, rollouts, chosen, batch=batch)
                metrics = summarize(rollouts, factors, sources) | perf
                row = {"kind": "batch", "batch": batch, "update": 0, **without_nan(metrics)}
                rows.append(row)
                replace_jsonl(folder / ROLLOUT_METRICS, rows)
                progress.report(metrics, kind="batch", batch=batch, update=0)
                silence = watch.watch_batch(rollouts, metrics)
                if silence and batch < config.run.num_batches:
                    session.check_silence(silence)
        progress.end_card(
            f"{name}: finished",
            facts=[("rollouts", str(folder / "rollouts"))],
            next_commands=[f"socpo report {shlex.quote(str(folder))}"],
        )
