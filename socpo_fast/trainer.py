"""Trains with SocraticPO on one node: rollout -> credit -> update, one method per phase.

Read Trainer.run first, then run_batches and run_batch. run_state.py keeps the state of a run.

Departures from the textbook:

- The rollout engine and the trainer are one process with one copy of the weights.
- Every random draw is a function of counters (seed, batch, question, ..). A run therefore resumes
  from its batch index; there is no generator state to save.
- A checkpoint is made between two batches, when nothing is in flight.
- SIGTERM, SIGHUP and Ctrl-C save before the run ends. During rollouts and evaluations this happens
  at once, because the weights are still those at the end of the last batch. During updates it
  happens after the last update of the batch; a second signal ends the run without waiting.
"""

import time
from contextlib import ExitStack
from itertools import groupby
from typing import NoReturn

import torch

from socpo_fast.config import Config
from socpo_fast.files import RunFailed, StopRequested, replace_file
from socpo_fast.metrics import Kind
from socpo_fast.report.folder import run_folder
from socpo_fast.report.printable import one_line, tell
from socpo_fast.report.progress import GuidanceWatch, Progress
from socpo_fast.report.rollouts import drop_rollouts, write_rollouts
from socpo_fast.report.run_end import finished_line, run_end
from socpo_fast.report.run_plan import (
    DRY_RUN_END,
    Reached,
    first_line,
    num_evaluations,
    run_plan_text,
)
from socpo_fast.report.settings import config_text, deciding, drawn_from, measured_by, settings_text
from socpo_fast.report.summary import rollout_perf, sources_of, summarize
from socpo_fast.report.tracker import MetricsWriter, read_metrics
from socpo_fast.report.write import report_note
from socpo_fast.run_state import (
    RunState,
    find_checkpoint,
    is_due,
    mark_none_yet,
    pick_questions,
    update_order,
)
from socpo_fast.session import Session, credit_options
from socpo_fast.socratic.credit import assign_credit
from socpo_fast.socratic.user_parts import UserParts
from socpo_fast.stopping import StopSignals
from socpo_fast.trace import note_span, recording
from socpo_fast.training.checkpoint import load_checkpoint, prune_checkpoints, save_checkpoint
from socpo_fast.training.update import Updater
from socpo_fast.types import Question, Rollout


def train(config: Config, *, dry_run: bool = False) -> None:
    """Trains, or continues where the run stopped; writes the run folder.

    A dry run loads everything, prints what would be done, and writes nothing.

    Source: Liu et al. 2026, arXiv:2606.09887.
    """
    with run_folder(config.folder):
        Trainer(config).run(dry_run=dry_run)


class Trainer:
    """One run: its session, its optimizer (it counts the updates) and its state. Read run first.

    The caller holds the lock of the run's folder (run_folder). Nothing is written to the folder
    before run().
    """

    def __init__(self, config: Config, parts: UserParts | None = None):
        self.config = config
        self.resumed_from = find_checkpoint(config)
        self.checkpoints = config.folder / "checkpoints"
        self.session = Session(config, parts, for_training=True)
        self.student = self.session.student
        self.engine = self.session.engine
        self.train_questions = self.session.train_questions()
        self.eval_questions = self.session.eval_questions()
        self.sources = sources_of(self.train_questions)
        # Too few questions are refused here, before anything is written.
        pick_questions(config, self.train_questions, 1)
        self.credit = credit_options(config)
        self.updater = Updater(self.student, self.session.config, reference=self.session.reference)
        self.optimizer = self.updater.optimizer
        self.state, self.config_text = self.start_or_resume()
        self.last_checkpoint = self.resumed_from if self.state.is_saved else None
        self.signals = StopSignals()

    def start_or_resume(self) -> tuple[RunState, str]:
        """Loads the checkpoint to resume from, if any; returns the state and the config.toml."""
        data_hashes = drawn_from(self.train_questions, self.eval_questions, self.session.tokenizer)
        self.measured_by = measured_by(self.config, data_hashes)
        if self.resumed_from is None:
            return (
                RunState(drawn_from=data_hashes, eval_due=bool(self.eval_questions)),
                config_text(self.config),
            )
        # find_checkpoint has compared the hashes, so the sizes are enough here.
        record = load_checkpoint(self.resumed_from, self.student, self.optimizer, thorough=False)
        run_dir = self.resumed_from.absolute().parent.parent
        state = RunState.from_record(
            record,
            checkpoint=self.resumed_from,
            drawn_from=data_hashes,
            measured_by=self.measured_by,
            is_own=run_dir == self.config.folder.absolute(),
        )
        # The engine would notice the loaded weights and count them as an update. But attempts carry
        # the policy version, and a resumed run must count on as an unbroken one would.
        self.engine.bump_policy_version()
        self.engine.policy_version = state.policy_version
        return state, settings_text(
            self.config,
            run_dir / "config.toml",
            now=deciding(self.session.config),
            num_updates=self.optimizer.num_updates,
            before=record,
            data=data_hashes,
            is_own=state.is_saved,
        )

    def run(self, *, dry_run: bool = False) -> None:
        """Runs batches until run.num_batches, then writes the report; saves if it ends early.

        A dry run only prints the plan. A run that is finished already only says so, and records
        changed settings.
        """
        with ExitStack() as stack:
            stack.callback(self.session.close)
            finished = self.finished_line
            if dry_run:
                tell(finished or "\n".join([*self.plan_lines(), DRY_RUN_END]))
                return
            self.open_folder(stack)
            if finished:
                tell(finished)
                return
            self.open_display(stack)
            stack.enter_context(self.signals)
            try:
                # Saves only if the run starts from another run's checkpoint. From here on it has
                # a checkpoint of its own.
                self.save()
                self.run_batches()
                self.save()
                self.signals.check()
            except StopRequested:
                self.end_early()
            except (Exception, KeyboardInterrupt) as error:
                # A failing grader, a lack of memory, .. costs the current batch, not earlier ones.
                # After RunFailed nothing is saved, because the disk itself may have failed.
                if self.state.between_batches and not isinstance(error, RunFailed):
                    self.save()
                # Before anything was measured there is nothing to sum up.
                if any(self.progress.status.scores.values()):
                    self.end_card(f"stopped by an error: {one_line(str(error))}")
                raise
        self.progress.note(report_note(self.config.folder))
        self.end_card("finished")

    @property
    def finished_line(self) -> str | None:
        """Returns what to say if a start finds no batch, evaluation or save left to do."""
        state = self.state
        if state.batch < self.config.run.num_batches or state.eval_due or not state.is_saved:
            return None
        return finished_line(self.config, state.batch, self.last_checkpoint)

    @property
    def reached(self) -> Reached:
        """Returns how far the run is."""
        return Reached(self.state.batch, self.optimizer.num_updates, self.state.eval_due)

    def plan_lines(self) -> list[str]:
        """Returns the first lines of a run: its name, its sizes, and notes on the template."""
        run = self.config.run
        start = "from the start" if self.resumed_from is None else f"from {self.resumed_from.name}"
        plan = run_plan_text(
            self.config,
            memory=self.session.memory_note,
            num_questions=len(self.train_questions),
            num_held_out=len(self.eval_questions),
            num_left_out=sum(self.session.num_left_out.values()),
            reached=self.reached,
        )
        first = first_line(f"run {run.name} {start}", self.student, run.device)
        return [first, plan, *self.session.bridge.notes]

    def end_card(self, outcome: str) -> None:
        """Prints what the run came to, and what to do next."""
        facts, commands = run_end(
            self.config.folder,
            best=self.state.best,
            last=self.last_checkpoint,
            goes_on_to=2 * self.config.run.num_batches if outcome == "finished" else None,
            is_evaluated=bool(self.eval_questions),
            is_loadable=self.session.parts == UserParts(),
        )
        self.progress.end_card(
            f"run {self.config.run.name}: {outcome}", facts=facts, next_commands=commands
        )

    def end_early(self) -> NoReturn:
        """Saves, unless a second signal came during updates; then ends the process."""
        if self.optimizer.num_updates == 0:
            outcome = "before the first update; there is nothing to save"
        elif self.state.between_batches:
            self.save()
            outcome = (
                f"and saved after batch {self.state.batch}; run.resume auto goes on from there"
            )
        else:
            outcome = f"amid the updates of batch {self.state.batch + 1}; the last checkpoint stays"
        self.end_card(f"stopped {outcome}")
        raise SystemExit(128 + (self.signals.received or 0)) from None

    def open_folder(self, stack: ExitStack) -> None:
        """Opens what the run writes to until the stack closes; removes what a later part left."""
        config = self.config
        resumed = None if self.resumed_from is None else self.optimizer.num_updates
        self.writer = stack.enter_context(MetricsWriter(config.folder, resume_after_update=resumed))
        replace_file(config.folder / "config.toml", self.config_text)
        # A killed run may have left rollouts of batches after its last checkpoint. The resumed run
        # makes them again.
        drop_rollouts(config.folder, after_batch=self.state.batch)
        mark_none_yet(self.checkpoints)

    def open_display(self, stack: ExitStack) -> None:
        """Shows the run until the stack closes, and prints its first lines."""
        run = self.config.run
        self.progress = Progress(
            num_batches=run.num_batches,
            first_batch=self.state.batch + 1,
            num_evals=num_evaluations(self.config, self.reached) if self.eval_questions else 0,
            num_tokens=self.state.num_tokens,
            earlier=read_metrics(self.writer.path),
            live=run.live,
            quiet=run.quiet,
        )
        stack.enter_context(self.progress)
        self.guidance_watch = GuidanceWatch(self.progress)
        for line in self.plan_lines():
            self.progress.note(line)

    def run_batches(self) -> None:
        """Runs what is due (evaluation, save) and then a batch, until run.num_batches are done."""
        while True:
            if self.state.eval_due:
                self.evaluate()
            # After the evaluation, so that a run resumed from here need not repeat it.
            if self.state.save_due:
                self.save()
            if self.state.batch >= self.config.run.num_batches:
                return
            with recording(self.config.folder, self.state.batch + 1, self.config.run.trace_batches):
                self.run_batch()
            self.signals.check()

    def run_batch(self) -> None:
        """Runs one batch: rollouts, credit, updates, metrics; notes what is due after it."""
        config = self.config
        started = time.perf_counter()
        updates_before = self.optimizer.num_updates
        batch = self.state.batch + 1
        questions = pick_questions(config, self.train_questions, batch)
        rollouts, metrics = self.roll_out(questions, batch)
        note_span("trainer", "rollout", since=started)
        factors, advantages_A = assign_credit(
            rollouts, options=self.credit, device=config.run.device
        )
        metrics |= summarize(rollouts, factors, self.sources)
        num_tokens = self.state.num_tokens + sum(rollout.num_sampled for rollout in rollouts)
        metrics["perf/tokens_total"] = float(num_tokens)
        # Before the updates: if one of them fails, the rollouts that caused it can be read.
        write_rollouts(config.folder, rollouts, questions, batch=batch)
        update_started = time.perf_counter()
        # enable_grad: a function of the user's (grader, teacher) may have turned gradients off.
        with self.signals.stop_at(2), torch.enable_grad():
            self.state.begin_updates()
            self.update(rollouts, batch, advantages_A)
        self.state.num_tokens = num_tokens
        updates_after = self.optimizer.num_updates
        is_last = batch == config.run.num_batches
        self.state.end_batch(
            policy_version=self.engine.policy_version,
            eval_due=bool(self.eval_questions)
            and (is_last or is_due(updates_before, updates_after, config.eval.every_updates)),
            save_due=is_due(updates_before, updates_after, config.run.checkpoint_every_updates),
        )
        note_span("trainer", "update", since=update_started)
        metrics["time/update_s"] = time.perf_counter() - update_started
        metrics["time/total_s"] = time.perf_counter() - started
        metrics |= self.session.peak_memory(self.progress.note)
        self.record(metrics, kind="batch", batch=batch)
        silence = self.guidance_watch.watch_batch(rollouts, metrics)
        # After the last batch there is nothing left to stop.
        if silence and not is_last:
            self.session.check_silence(silence)

    def roll_out(
        self, questions: dict[int, Question], batch: int
    ) -> tuple[list[Rollout], dict[str, float]]:
        """Returns all rollouts of a batch, in the order of questions, and performance metrics."""
        started = time.perf_counter()
        stats_before = self.engine.stats
        total = len(questions) * self.config.rollout.group_size
        self.progress.phase("rollout", batch=batch, update=self.optimizer.num_updates, total=total)
        rollouts = []
        with self.signals.stop_at(1):
            for rollout in self.session.training_rollouts(list(questions.values()), batch):
                rollouts.append(rollout)
                self.progress.add_rollout(rollout, questions[rollout.question_idx])
        perf = rollout_perf(
            rollouts, stats_before, self.engine.stats, time.perf_counter() - started
        )
        # Rollouts arrive as they finish, which depends on timing. Sorted, everything after this is
        # reproducible.
        order = {question_idx: i for i, question_idx in enumerate(questions)}
        rollouts.sort(key=lambda rollout: (order[rollout.question_idx], rollout.rollout_idx))
        return rollouts, perf

    def update(self, rollouts: list[Rollout], batch: int, advantages_A: torch.Tensor) -> None:
        """Makes the updates of a batch: questions_per_update questions each, `epochs` passes."""
        # groupby needs neighbours; roll_out has sorted the rollouts by question.
        groups = [
            list(group) for _, group in groupby(rollouts, key=lambda rollout: rollout.question_idx)
        ]
        order = update_order(self.config, len(groups), batch)
        self.progress.phase(
            "update", batch=batch, update=self.optimizer.num_updates, total=len(order)
        )
        # During updates the engine is empty, so its KV cache holds the gradients.
        with self.engine.lend_memory() as memory, self.optimizer.gradients_in(memory):
            for progress in self.updater.microbatches(groups, order, advantages_A):
                self.progress.work(progress.work, progress.done, progress.total)
                if progress.metrics is not None:
                    self.engine.bump_policy_version()
                    self.record(progress.metrics, kind="update", batch=batch)
                    self.progress.advance()

    def evaluate(self) -> None:
        """Evaluates the current student and records the result."""
        self.progress.phase(
            "evaluation",
            batch=self.state.batch,
            update=self.optimizer.num_updates,
            total=len(self.eval_questions) * self.config.eval.samples,
        )
        with self.signals.stop_at(1):
            metrics = self.session.evaluate(self.eval_questions, self.progress.add_rollout)
        self.record(metrics, kind="eval", batch=self.state.batch)
        success = metrics["success/unassisted"]
        update = self.optimizer.num_updates
        if self.state.end_evaluation(update=update, success=success, measured_by=self.measured_by):
            line = f"best evaluation so far: {success:.1%} unassisted; update {update} is kept"
            self.progress.note(line)

    def save(self) -> None:
        """Saves a checkpoint, unless it exists already or no update was made yet."""
        if self.state.is_saved or self.optimizer.num_updates == 0:
            return
        newest = save_checkpoint(
            self.checkpoints,
            student=self.student,
            optimizer=self.optimizer,
            trainer_state=self.state.to_record() | {"settings": deciding(self.session.config)},
            tokenizer_from=self.session.student_folder,
        )
        mark_none_yet(self.checkpoints)
        prune_checkpoints(
            newest, self.config.run.keep_checkpoints, (self.state.best or {}).get("update")
        )
        self.last_checkpoint = newest
        self.state.end_save()

    def record(self, metrics: dict[str, float], *, kind: Kind, batch: int) -> None:
        """Writes metrics of a finished batch, update or evaluation, and shows them."""
        update = self.optimizer.num_updates
        self.writer.write(metrics, kind=kind, batch=batch, update=update)
        self.progress.report(metrics, kind=kind, batch=batch, update=update)
