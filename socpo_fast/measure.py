"""Measures a student without training it: `socpo eval` and `socpo rollout`."""

from contextlib import closing

from socpo_fast.config import Config
from socpo_fast.report.folder import run_folder
from socpo_fast.report.progress import GuidanceWatch, Progress
from socpo_fast.report.rollouts import write_rollouts
from socpo_fast.report.summary import sources_of, summarize
from socpo_fast.run_state import best_checkpoint, last_checkpoint, pick_questions
from socpo_fast.session import Session, credit_options
from socpo_fast.socratic.credit import assign_credit


def evaluate(config: Config, checkpoint: str | None) -> dict[str, float]:
    """Measures the accuracy of a checkpoint on data.eval.

    Args:
        config:     of the run.
        checkpoint: a folder; "best", the checkpoint of the run's best evaluation; or None, the
                    run's last checkpoint, or student.path if there is none.
    """
    requested = best_checkpoint(config.folder) if checkpoint == "best" else checkpoint
    path = requested or last_checkpoint(config.folder) or config.student.path
    student = config.student.model_copy(update={"path": str(path)})
    with closing(Session(config.model_copy(update={"student": student}))) as session:
        questions = session.eval_questions()
        if not questions:
            raise ValueError(
                "eval: data.eval must name held-out questions, got none; set data.eval"
            )
        return session.evaluate(questions)


def rollout_only(config: Config) -> None:
    """Rolls out run.num_batches batches without updates; writes RUN/rollouts, prints metrics."""
    if (config.folder / "metrics.jsonl").exists():
        raise ValueError(
            f"run: {config.folder} must hold no training run, whose rollouts stay; set run.name"
        )
    with run_folder(config.folder), closing(Session(config)) as session:
        questions = session.train_questions()
        sources = sources_of(questions)
        with Progress(num_batches=config.run.num_batches, live=config.run.live) as progress:
            progress.note(session.memory_note)
            watch = GuidanceWatch(progress)
            for batch in range(1, config.run.num_batches + 1):
                chosen = pick_questions(config, questions, batch)
                rollouts = list(session.training_rollouts(list(chosen.values()), batch))
                factors, _ = assign_credit(rollouts, options=credit_options(config))
                write_rollouts(config.folder, rollouts, chosen, batch=batch)
                metrics = summarize(rollouts, factors, sources)
                progress.report(metrics, kind="batch", batch=batch, update=0)
                silence = watch.watch_batch(rollouts, metrics)
                if silence and batch < config.run.num_batches:
                    session.check_silence(silence)
