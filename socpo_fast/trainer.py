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
from contextlib import ExitStack, closing, nullcontext
from itertools import groupby
from typing import NoReturn

import torch

from socpo_fast.config import Config
from socpo_fast.files import RunFailed, StopRequested, replace_file
from socpo_fast.measure import roll_out, tell_plan
from socpo_fast.metrics import Kind
from socpo_fast.report.folder import run_folder
from socpo_fast.report.printable import one_line
from socpo_fast.report.progress import GuidanceWatch, Progress
from socpo_fast.report.rollouts import drop_rollouts, write_rollouts
from socpo_fast.report.run_end import run_end
from socpo_fast.report.run_plan import Reached, num_evaluations
from socpo_fast.report.settings import config_text, deciding, drawn_from, measured_by, settings_text
from socpo_fast.report.summary import sources_of, summarize
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
from socpo_fast.types import Rollout


def train(config: Config, *, dry_run: bool = False) -> None:
    """Trains, or continues where the run stopped; writes the run folder.

    A dry run loads everything, prints what would be done, and writes nothing.

    Source: Liu et al. 2026, arXiv:2606.09887.
    """
    # A dry run needs no lock, so that it works beside a training.
    with nullcontext() if dry_run else run_folder(config.folder):
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

        A dry run only prints the plan. A run that is finished already shows its end again, and
        records changed settings.
        """
        with ExitStack() as stack:
            stack.callback(self.session.close)
            if not dry_run:
                self.open_folder(stack)
            self.progress = self.new_progress()
            self.guidance_watch = GuidanceWatch(self.progress)
            outcome = "finished"
            if self.is_finished:
                outcome = f"already finished at batch {self.state.batch}, nothing was done"
            else:
                self.tell_plan(dry_run=dry_run)
                if dry_run:
                    return
                stack.enter_context(self.progress)
                stack.enter_context(self.signals)
                self.run_to_the_end()
        if not dry_run and (note := report_note(self.config.folder)):
            self.progress.note(note)
        self.end_card(outcome)

    def run_to_the_end(self) -> None:
        """Runs what is left; if it ends early, saves and says how far it came."""
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
                reason = one_line(str(error)) or type(error).__name__
                self.end_card(f"stopped by an error: {reason}")
            raise

    @property
    def is_finished(self) -> bool:
        """Whether no batch, evaluation or save is left to do."""
        state = self.state
        is_measured = state.batch >= self.config.run.num_batches and not state.eval_due
        return is_measured and state.is_saved

    @property
    def reached(self) -> Reached:
        """Returns how far the run is."""
        return Reached(self.state.batch, self.optimizer.num_updates, self.state.eval_due)

    def end_card(self, outcome: str) -> None:
        """Prints what the run came to, and what to do next."""
        facts, commands = run_end(
            self.config,
            best=self.state.best,
            last=self.last_checkpoint,
            goes_on_to=2 * self.state.batch if self.is_finished else None,
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

    def new_progress(self) -> Progress:
        """Returns the display of the run, with what its earlier starts measured."""
        run = self.config.run
        return Progress(
            num_batches=run.num_batches,
            first_batch=self.state.batch + 1,
            num_evals=num_evaluations(self.config, self.reached) if self.eval_questions else 0,
            num_tokens=self.state.num_tokens,
            earlier=read_metrics(self.config.folder / "metrics.jsonl"),
            live=run.live,
            quiet=run.quiet,
        )

    def tell_plan(self, *, dry_run: bool) -> None:
        """Prints the first lines of a run: its name, its sizes, and notes on the template."""
        start = "from the start" if self.resumed_from is None else f"from {self.resumed_from.name}"
        tell_plan(
            self.progress,
            f"run {self.config.run.name} {start}",
            self.session,
            dry_run=dry_run,
            num_questions=len(self.train_questions),
            num_held_out=len(self.eval_questions),
            reached=self.reached,
        )

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
        with self.signals.stop_at(1):
            rollouts, metrics = roll_out(
                self.session, self.progress, questions, batch=batch, update=updates_before
            )
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
        metrics |= self.session.peak_memory(self.progress.warn)
        self.record(metrics, kind="batch", batch=batch)
        silence = self.guidance_watch.watch_batch(rollouts, metrics)
        # After the last batch there is nothing left to stop.
        if silence and not is_last:
            self.session.check_silence(silence)

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
        with (
            self.engine.lend_memory() as memory,
            self.optimizer.gradients_in(memory),
            # Closed, so that an exception in the loop also ends the blocks that it is amid.
            closing(self.updater.microbatches(groups, order, advantages_A)) as microbatches,
        ):
            for progress in microbatches:
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
