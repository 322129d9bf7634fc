"""SocraticPO on one node: rollout -> credit -> update, one method a phase. Read Trainer.run first, then run_batch.

Departures from the textbook: rollout engine and trainer are one process and one copy of the weights; every random
draw is a counter (seed, batch, question, ..), so a run goes on from its batch index alone; a checkpoint lies between
two batches, where nothing is in flight. SIGTERM and Ctrl-C save first: at once while rolling out or evaluating, when
the weights are still those of the last batch's end, and after the batch's last update otherwise.
"""

from __future__ import annotations

import time
import warnings
from contextlib import ExitStack, closing
from pathlib import Path

from socpo_fast.config import Config
from socpo_fast.metrics import MetricsWriter, replace_file
from socpo_fast.ops import available_impls
from socpo_fast.report.progress import Progress
from socpo_fast.report.rollouts import write_rollouts
from socpo_fast.report.write import write_report
from socpo_fast.socratic.advantage import assign_advantages
from socpo_fast.socratic.data import batch_questions, question_order
from socpo_fast.socratic.decay import assign_rewards
from socpo_fast.socratic.session import Session
from socpo_fast.socratic.summary import mean, sources_of, summarize
from socpo_fast.stopping import RunFailed, StopRequested, StopSignals
from socpo_fast.train.checkpoint import latest_checkpoint, load_checkpoint, prune_checkpoints, save_checkpoint
from socpo_fast.train.update import Updater
from socpo_fast.types import Question, Rollout

RECORD_VERSION = 2  # of what a run folder holds; rollouts are written turn by turn
UPDATE_ORDER_SEED = 2**31  # keeps the order of updates apart from the order of questions; run.seed is below it


def train(config: Config) -> None:
    """Train, or go on where the run stopped; writes the run folder. Source: Liu et al. 2026, arXiv:2606.09887."""
    Trainer(config).run()


def evaluate(config: Config, checkpoint: str | None) -> dict[str, float]:
    """Accuracy on data.eval of a checkpoint folder; None: the run's last one, or student.path when it has none."""
    path = checkpoint or latest_checkpoint(config.folder / "checkpoints") or config.student.path
    student = config.student.model_copy(update={"path": str(path)})
    with closing(Session(config.model_copy(update={"student": student}))) as session:
        questions = session.eval_questions()
        if not questions:
            raise ValueError("eval: data.eval must name held-out questions, got none; set data.eval")
        return session.evaluate(questions)


def rollout_only(config: Config) -> None:
    """Roll out run.num_batches batches without any update; writes RUN/rollouts and prints what they amount to."""
    if (config.folder / "metrics.jsonl").exists():
        raise ValueError(f"run: {config.folder} must hold no training run, whose rollouts stay; set run.name")
    with closing(Session(config)) as session:
        questions = session.train_questions()
        sources = sources_of(questions)
        make_folder(config.folder)
        with Progress(num_batches=config.run.num_batches, live=config.run.live) as progress:
            progress.note(session.engine.kv_cache.note)
            for batch in range(1, config.run.num_batches + 1):
                chosen = {q.question_idx: q for q in pick_questions(config, questions, batch)}
                rollouts = list(session.training_rollouts(list(chosen.values()), batch))
                factors = assign_rewards(rollouts, **config.reward.model_dump())
                write_rollouts(config.folder, rollouts, chosen, batch=batch)
                metrics = summarize(rollouts, chosen, factors, sources)
                progress.report(metrics, kind="batch", batch=batch, update=0)


class Trainer:
    """One run: its session, optimizer and place. `batch` counts finished batches; updates are the optimizer's."""

    def __init__(self, config: Config):
        self.config = config
        checkpoint = find_checkpoint(config)
        make_folder(config.folder)
        self.session = Session(config, for_training=True)
        self.train_questions, self.eval_questions = self.session.train_questions(), self.session.eval_questions()
        self.sources = sources_of(self.train_questions)
        pick_questions(config, self.train_questions, 1)  # too few questions are refused before anything is written
        self.student, self.engine = self.session.student, self.session.engine
        self.updater = Updater(self.student, config, reference=self.session.reference)
        self.optimizer = self.updater.optimizer
        self.batch, self.eval_due, self.save_due = 0, bool(self.eval_questions), False
        self.between_batches = True  # the weights are those of the last batch's end
        if checkpoint is not None:
            state = load_checkpoint(checkpoint, self.student, self.optimizer)
            if state.get("record_version") != RECORD_VERSION:
                raise ValueError(
                    f"run: {checkpoint} must be of record version {RECORD_VERSION}, got "
                    f"{state.get('record_version', 1)}, from an earlier socpo_fast; choose another run.name"
                )
            self.batch, self.eval_due = state["batch"], state["eval_due"] and bool(self.eval_questions)
            self.engine.policy_version = state["policy_version"]
            if state.get("drawn_from", self.drawn_from) != self.drawn_from:  # absent in checkpoints of before
                warnings.warn(
                    f"run: questions were drawn from {state['drawn_from']} and are now from {self.drawn_from}; "
                    "some of this epoch will come twice and some not at all",
                    stacklevel=2,
                )
        self.resumed_from, self.saved_at = checkpoint, None if checkpoint is None else self.place
        replace_file(config.folder / "config.toml", config.to_toml())
        self.signals = StopSignals()

    @property
    def drawn_from(self) -> dict[str, int]:
        """What decides which questions a batch gets."""
        run, rollout = self.config.run, self.config.rollout
        per_batch, num_questions = rollout.questions_per_batch, len(self.train_questions)
        return {"seed": run.seed, "questions_per_batch": per_batch, "questions": num_questions}

    @property
    def place(self) -> tuple[int, int, bool]:
        return self.batch, self.optimizer.num_updates, self.eval_due

    def run(self) -> None:
        """Batches until run.num_batches, with evaluation and checkpoints where they are due, then the report."""
        resumed = None if self.resumed_from is None else self.optimizer.num_updates
        with ExitStack() as stack:
            stack.callback(self.session.close)
            self.writer = stack.enter_context(MetricsWriter(self.config.folder, resume_after_update=resumed))
            live, num_batches = self.config.run.live, self.config.run.num_batches
            progress = Progress(num_batches=num_batches, first_batch=self.batch + 1, live=live)
            self.progress = stack.enter_context(progress)
            for note in (self.first_line(), self.engine.kv_cache.note, *self.session.bridge.notes):
                progress.note(note)
            stack.enter_context(self.signals)
            try:
                while True:
                    if self.eval_due:
                        self.evaluate()
                    if self.save_due:  # after the evaluation, so that no checkpoint owes one
                        self.save()
                    if self.batch >= num_batches:
                        break
                    self.run_batch()
                    self.signals.check()
            except StopRequested:
                self.save()
                self.progress.note(f"stopped and saved after batch {self.batch}; run.resume auto goes on from there")
                assert self.signals.received is not None
                raise SystemExit(128 + self.signals.received) from None
            except Exception as error:  # a grader, memory, ..: it costs the batch it came in, not those before
                if self.between_batches and not isinstance(error, RunFailed):  # which may be the disk's
                    self.save()
                raise
            self.save()
        self.progress.note(f"report: {write_report(self.config.folder)}")

    def run_batch(self) -> None:
        """One batch: roll out, credit, update, record; then whatever is due."""
        config, started, before = self.config, time.perf_counter(), self.optimizer.num_updates
        batch = self.batch + 1
        questions = {q.question_idx: q for q in pick_questions(config, self.train_questions, batch)}
        rollouts, metrics = self.roll_out(questions, batch)
        factors = assign_rewards(rollouts, **config.reward.model_dump())
        assign_advantages(rollouts, **config.advantage.model_dump())
        metrics |= summarize(rollouts, questions, factors, self.sources)
        write_rollouts(config.folder, rollouts, questions, batch=batch)
        update_started, self.between_batches = time.perf_counter(), False
        self.update(rollouts, batch)
        self.batch, self.between_batches, after = batch, True, self.optimizer.num_updates
        metrics["time/update_s"] = time.perf_counter() - update_started
        metrics["time/total_s"] = time.perf_counter() - started
        self.writer.write(metrics, kind="batch", batch=batch, update=after)
        self.progress.report(metrics, kind="batch", batch=batch, update=after)
        last = batch == config.run.num_batches
        self.eval_due = bool(self.eval_questions) and (last or is_due(before, after, config.eval.every_updates))
        self.save_due = is_due(before, after, config.run.checkpoint_every_updates)

    def roll_out(self, questions: dict[int, Question], batch: int) -> tuple[list[Rollout], dict[str, float]]:
        """All rollouts of the batch, in the order of (question, rollout) however they finished, and what it took."""
        total, stats, started = len(questions) * self.config.rollout.group_size, self.engine.stats, time.perf_counter()
        self.progress.phase("rollout", batch=batch, update=self.optimizer.num_updates, total=total)
        rollouts = []
        with self.signals.at_once():
            for rollout in self.session.training_rollouts(list(questions.values()), batch):
                rollouts.append(rollout)
                self.progress.advance(num_tokens=sum(attempt.num_tokens for attempt in rollout.attempts))
        seconds, now = time.perf_counter() - started, self.engine.stats
        place = {question_idx: i for i, question_idx in enumerate(questions)}
        rollouts.sort(key=lambda rollout: (place[rollout.question_idx], rollout.rollout_idx))
        sampled = sum(attempt.num_tokens for rollout in rollouts for attempt in rollout.attempts)
        return rollouts, {
            "perf/rollout_tok_s": sampled / seconds,
            "perf/prefill_tokens": float(now.prefill_tokens - stats.prefill_tokens),
            "perf/decode_tokens": float(now.decode_tokens - stats.decode_tokens),
            "perf/preemptions": float(now.preemptions - stats.preemptions),
            "time/rollout_s": seconds,
            "time/teacher_wait_s": mean([rollout.teacher_wait_s for rollout in rollouts if len(rollout.turns) > 1]),
        }

    def update(self, rollouts: list[Rollout], batch: int) -> None:
        """The batch's updates: questions in seeded order, questions_per_update at a time, epochs times over."""
        size, epochs = self.config.train.questions_per_update, self.config.train.epochs
        by_question: dict[int, list[Rollout]] = {}
        for rollout in rollouts:
            by_question.setdefault(rollout.question_idx, []).append(rollout)
        groups, order = list(by_question.values()), []
        for epoch in range((batch - 1) * epochs, batch * epochs):
            shuffled = question_order(UPDATE_ORDER_SEED + self.config.run.seed, epoch, len(groups))
            order += [shuffled[start : start + size] for start in range(0, len(groups), size)]
        self.progress.phase("update", batch=batch, update=self.optimizer.num_updates, total=len(groups) * epochs)
        for num_groups, metrics in self.updater.updates(groups, order):
            self.engine.bump_policy_version()
            self.writer.write(metrics, kind="update", batch=batch, update=self.optimizer.num_updates)
            self.progress.advance(num_groups)

    def evaluate(self) -> None:
        update = self.optimizer.num_updates
        total = len(self.eval_questions) * self.config.eval.samples
        self.progress.phase("evaluation", batch=self.batch, update=update, total=total)
        with self.signals.at_once():
            metrics = self.session.evaluate(self.eval_questions, on_rollout=self.progress.advance)
        self.writer.write(metrics, kind="eval", batch=self.batch, update=update)
        self.progress.report(metrics, kind="eval", batch=self.batch, update=update)
        self.eval_due = False

    def save(self) -> None:
        """A checkpoint of the present place, unless there is one already."""
        if self.saved_at == self.place:
            return
        folder = self.config.folder / "checkpoints"
        save_checkpoint(
            folder,
            student=self.student,
            optimizer=self.optimizer,
            trainer_state={
                "record_version": RECORD_VERSION,
                "batch": self.batch,
                "eval_due": self.eval_due,
                "policy_version": self.engine.policy_version,
                "drawn_from": self.drawn_from,
            },
            tokenizer_from=self.session.student_folder,
        )
        prune_checkpoints(folder, self.config.run.keep_checkpoints)
        self.saved_at, self.save_due = self.place, False

    def first_line(self) -> str:
        """Which run, which model, and which implementation each op uses."""
        millions = sum(parameter.numel() for parameter in self.student.parameters()) / 1e6
        start = f"from {self.resumed_from.name}" if self.resumed_from is not None else "from the start"
        impls = ", ".join(f"{op}={impl}" for op, impl in available_impls(self.config.run.device).items())
        return f"run {self.config.run.name} {start}: {millions:.1f}M parameters, {self.config.run.device}; ops: {impls}"


def pick_questions(config: Config, questions: list[Question], batch: int) -> list[Question]:
    """The questions of batch 1, 2, .."""
    return batch_questions(questions, config.run.seed, batch - 1, config.rollout.questions_per_batch)


def is_due(before: int, after: int, every: int) -> bool:
    """Whether the updates from `before` to `after` crossed a multiple of `every`; 0 = never."""
    return every > 0 and before // every < after // every


def find_checkpoint(config: Config) -> Path | None:
    """Where run.resume says to go on from; None for a fresh run."""
    latest = latest_checkpoint(config.folder / "checkpoints")
    if config.run.resume == "auto":
        return latest
    if config.run.resume != "never":
        given = Path(config.run.resume).expanduser()
        if latest is not None and given.name < latest.name and given.resolve().parent == latest.resolve().parent:
            raise ValueError(
                f"run: run.resume must be the run's last checkpoint {latest.name} or one of another run, "
                f"got {given.name}; choose another run.name, or remove the later ones"
            )
        return latest or given  # a run that has begun goes on from its own
    if latest is not None:
        raise ValueError(
            f"run: {config.folder} must be new with run.resume never, got one with {latest.name}; "
            "choose another run.name or set run.resume auto"
        )
    return None


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise ValueError(f"run: {folder} must be a writable folder, got {error.strerror}; set run.dir") from None
