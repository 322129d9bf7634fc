"""A whole SocraticPO batch, rollouts with second attempts and the update: ours beside TRL's.

    python -m bench.batch --student FOLDER --data TRAIN.parquet [--questions 4] [--rounds 3]

ours        socratic_rollouts, credit, policy_gradients (tree packing) and our optimizer
trl         SocraticGRPOTrainer with TRL's own generation (transformers) and TRL's own loss, at its
            fastest number of rows a microbatch, which is tried first
trl+ours    the same trainer with our engine on TRL's parameters, and our loss

The work is the same: the questions are real, every attempt has exactly --new tokens (the end of a
turn is never sampled), and every first attempt counts as wrong and is followed by one sentence of
guidance. Rewards differ by what was sampled, so all advantages count. Decay is off. One round runs
each once, in fp32 on the CPU; `ours is` is paired by rounds. The update holds forward, backward,
clipping and AdamW. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from zlib import crc32

import torch

from bench import machine, measure
from bench.trl_peer import TRL_SETTINGS
from socpo_fast.engine import Engine
from socpo_fast.model import load_student
from socpo_fast.ops import CreditOptions
from socpo_fast.socratic.bridge import Bridge, load_tokenizer
from socpo_fast.socratic.credit import assign_credit
from socpo_fast.socratic.data import load_questions
from socpo_fast.socratic.episode import RolloutOptions
from socpo_fast.socratic.rollout import socratic_rollouts
from socpo_fast.socratic.teachers import retry_teacher
from socpo_fast.training.optimizer import Optimizer
from socpo_fast.training.step import policy_gradients
from socpo_fast.types import Question, Rollout, SamplingParams

GUIDANCE = "That is not right. Look at what each option claims, and compare the options again."
CREDIT = CreditOptions(schedule="none")
LR = 1e-6  # small, so that all rounds have the same weights but for the last digits
TEMPERATURE = 1.0
MICROBATCHES = (4, 8)
HEADINGS = ("", "median s", "p20-p80", "rollouts s", "update s", "sampled", "tok/s", "ours is")
WIDTHS = (-9, 8, 13, 10, 8, 7, 6, 8)


def grade(text: str, _question: Question) -> float:
    """Returns a reward below 1, so no attempt is right, that differs from text to text."""
    return 0.5 * crc32(text.encode()) / 2**32


@dataclass
class Timed:
    """What one batch took."""

    rollouts_s: float
    update_s: float
    rollouts: list[Rollout] = field(repr=False)

    @property
    def num_sampled(self) -> int:
        return sum(attempt.num_tokens for rollout in self.rollouts for attempt in rollout.attempts)


class Ours:
    """Our own loop, as the trainer makes it."""

    def __init__(self, args: argparse.Namespace, questions: list[Question]):
        self.student = load_student(args.student)
        self.engine = Engine(self.student)
        self.optimizer = Optimizer(self.student, lr=LR, warmup_updates=0)
        self.bridge = Bridge(load_tokenizer(args.student), guidance_limit=64)
        self.questions = questions
        self.options = RolloutOptions(
            group_size=args.group_size, attempt_limit=args.new, guidance_limit=64
        )
        self.params = SamplingParams(
            temperature=TEMPERATURE,
            max_new_tokens=args.new,
            eos_ids=self.bridge.eos_ids,
            ignore_eos=True,
        )

    def batch(self) -> Timed:
        """Rolls out all questions and makes one update."""
        started_s = time.perf_counter()
        rollouts = list(
            socratic_rollouts(
                self.engine,
                self.bridge.tokenizer,
                self.questions,
                teacher=retry_teacher(GUIDANCE),
                grader=grade,
                params=self.params,
                options=self.options,
                bridge=self.bridge,
            )
        )
        # Neighbours in the list share a tree, so groups must stand together.
        rollouts.sort(key=lambda rollout: (rollout.question_idx, rollout.rollout_idx))
        rolled_out_s = time.perf_counter()
        assign_credit(rollouts, options=CREDIT)
        policy_gradients(self.student, rollouts, token_budget=4096, temperature=TEMPERATURE)
        self.optimizer.step()
        self.engine.bump_policy_version()
        done_s = time.perf_counter()
        return Timed(rolled_out_s - started_s, done_s - rolled_out_s, rollouts)


class InTrl:
    """SocraticGRPOTrainer, one optimizer step at a time."""

    def __init__(self, args: argparse.Namespace, questions: list[Question], *, with_ours: bool):
        # Slow to import; tests of this module's other parts do without.
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
        from trl import GRPOConfig

        from socpo_fast.integrations.trl import SocraticGRPOTrainer

        logging.disable_progress_bar()
        num_rows = len(questions) * args.group_size
        self.rows = [
            {"prompt": list(question.messages), "ground_truth": question.ground_truth}
            for question in questions
            for _ in range(args.group_size)
        ]
        with tempfile.TemporaryDirectory() as output_dir, warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            settings = GRPOConfig(
                **TRL_SETTINGS,
                output_dir=output_dir,
                learning_rate=LR,
                temperature=TEMPERATURE,
                max_completion_length=args.new,
                num_generations=args.group_size,
                per_device_train_batch_size=num_rows,
                # TRL's generation has no other way to go on behind the end of a turn.
                generation_kwargs=None if with_ours else {"min_new_tokens": args.new},
            )
            self.trainer: Any = SocraticGRPOTrainer(
                AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.float32),
                args=settings,
                train_dataset=Dataset.from_list(self.rows),
                processing_class=AutoTokenizer.from_pretrained(args.student),
                teacher=retry_teacher(GUIDANCE),
                grader=grade,
                options=RolloutOptions(
                    group_size=args.group_size, attempt_limit=args.new, guidance_limit=64
                ),
                credit=CREDIT,
                generation="engine" if with_ours else "trl",
                loss="fused" if with_ours else "trl",
            )
        self.trainer.create_optimizer()
        self.generate = self.trainer._generate_and_score_completions
        self.trainer._generate_and_score_completions = self._timed_generation
        self.microbatch = num_rows
        self._rollouts_s = 0.0

    def _timed_generation(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        started_s = time.perf_counter()
        output = self.generate(inputs)
        self._rollouts_s = time.perf_counter() - started_s
        return output

    def batch(self) -> Timed:
        """Makes one optimizer step the way TRL's training loop does."""
        trainer = self.trainer
        num_microbatches = len(self.rows) // self.microbatch
        trainer.args.steps_per_generation = num_microbatches
        trainer.args.gradient_accumulation_steps = num_microbatches
        trainer.current_gradient_accumulation_steps = num_microbatches
        trainer._step = 0  # a new generation is due
        started_s = time.perf_counter()
        for _ in range(num_microbatches):
            trainer.training_step(trainer.model, self.rows, None)
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        trainer.state.global_step += 1
        seconds = time.perf_counter() - started_s
        return Timed(self._rollouts_s, seconds - self._rollouts_s, list(trainer.rollouts))

    def choose_microbatch(self) -> None:
        """Takes the number of rows with the fastest update."""
        seconds = {}
        for self.microbatch in (n for n in MICROBATCHES if len(self.rows) % n == 0):
            seconds[self.microbatch] = self.batch().update_s
        self.microbatch = min(seconds, key=seconds.__getitem__)


def check_work(timed: Timed, name: str, args: argparse.Namespace) -> None:
    """Refuses to time a batch with other work than that of the bench."""
    lengths = {
        tuple(attempt.num_tokens for attempt in rollout.attempts) for rollout in timed.rollouts
    }
    num_rollouts = args.questions * args.group_size
    # Our engine within TRL has no way to ignore the end of a turn; a shorter attempt is less work,
    # and its sampled tokens are told.
    if len(timed.rollouts) != num_rollouts or (
        name != "trl+ours" and lengths != {(args.new, args.new)}
    ):
        raise RuntimeError(
            f"bench: {name} must make {num_rollouts} rollouts of two attempts of {args.new} "
            f"tokens, got {len(timed.rollouts)} with {sorted(lengths)[:3]}"
        )


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    card = machine.measure_card(args.threads, args.device, args.dtype)
    machine.print_card(card)
    bridge = Bridge(load_tokenizer(args.student), guidance_limit=64)
    with warnings.catch_warnings():  # it tells how many questions are longer
        warnings.simplefilter("ignore", UserWarning)
        questions = load_questions(args.data, bridge=bridge, max_prompt_tokens=args.max_prompt)
    questions = questions[: args.questions]
    contenders: dict[str, Ours | InTrl] = {
        "ours": Ours(args, questions),
        "trl": InTrl(args, questions, with_ours=False),
        "trl+ours": InTrl(args, questions, with_ours=True),
    }
    for name, contender in contenders.items():
        check_work(contender.batch(), name, args)  # warms up as well
        if isinstance(contender, InTrl) and not args.quick:
            contender.choose_microbatch()
    runs: list[Callable[[], Timed]] = [contender.batch for contender in contenders.values()]
    rounds = [[run() for run in runs] for _ in range(args.rounds)]
    measure.print_row(HEADINGS, WIDTHS)
    report = {}
    for idx, name in enumerate(contenders):
        results = [timed[idx] for timed in rounds]
        report[name] = summarize(results, [timed[0] for timed in rounds])
        print_result(name, report[name])
    for name in ("trl", "trl+ours"):
        report[name]["microbatch"] = contenders[name].microbatch
    words = vars(args) | {"device": str(args.device), "dtype": str(args.dtype)}
    whole = {"bench": "batch", "card": card, "args": words, "contenders": report}
    if args.json:
        args.json.write_text(json.dumps(whole, default=str) + "\n", encoding="utf-8")
    print(json.dumps({"bench": "batch"} | report))


def summarize(results: list[Timed], ours: list[Timed]) -> dict[str, Any]:
    """Returns medians over the rounds, and how many times faster ours was in the same rounds."""
    totals = [timed.rollouts_s + timed.update_s for timed in results]
    our_totals = [timed.rollouts_s + timed.update_s for timed in ours]
    return measure.spread(totals)._asdict() | {
        "rollouts_s": median(timed.rollouts_s for timed in results),
        "update_s": median(timed.update_s for timed in results),
        "num_sampled": int(median(timed.num_sampled for timed in results)),
        "ours_is_times_faster": median(x / y for x, y in zip(totals, our_totals, strict=True)),
    }


def print_result(name: str, result: dict[str, Any]) -> None:
    cells = (
        name,
        f"{result['median_s']:.2f}",
        f"{result['p20_s']:.2f}-{result['p80_s']:.2f}",
        f"{result['rollouts_s']:.2f}",
        f"{result['update_s']:.2f}",
        f"{result['num_sampled']}",
        f"{result['num_sampled'] / result['median_s']:.0f}",
        f"{result['ours_is_times_faster']:.2f}x",
    )
    measure.print_row(cells, WIDTHS)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the options."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("bench.batch", description=__doc__, formatter_class=form)
    parser.add_argument("--student", required=True, help="Hugging Face folder")
    parser.add_argument("--data", required=True, help="questions, as for socpo train")
    parser.add_argument("--questions", type=int, default=4)
    words = "tokens; longer prompts are left out. Default: none is"
    parser.add_argument("--max-prompt", type=int, help=words)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--new", type=int, default=64, help="tokens of each attempt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a few tokens: does everything run?")
    parser.add_argument("--json", type=Path, help="file for everything measured")
    machine.add_options(parser)
    args = parser.parse_args(argv)
    machine.settle(parser, args)
    if args.device.type != "cpu":
        parser.error("--device must be cpu")
    if args.quick:
        args.questions = 2
        args.group_size = 2
        args.new = 6
        args.rounds = 1
    return args


if __name__ == "__main__":
    main()
