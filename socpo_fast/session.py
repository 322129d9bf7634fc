"""Makes everything that rollouts need from a config, and evaluates the student.

That is the student, tokenizer, bridge, engine, teacher, grader and questions. Read Session from its
__init__, then training_rollouts and evaluate. UserParts are what a caller in Python gives instead.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from socpo_fast.config import Config, LocalTeacherConfig
from socpo_fast.device import bound_kernel_caches, select_device, set_threads
from socpo_fast.engine import Engine
from socpo_fast.model import Decoder, load_student
from socpo_fast.model.hub import model_folder, pin_models
from socpo_fast.ops import CreditOptions
from socpo_fast.ops._checks import check_rule
from socpo_fast.report.cards import GIB
from socpo_fast.report.memory_plan import settle
from socpo_fast.report.plan import plan_table
from socpo_fast.report.printable import tell_loading
from socpo_fast.report.summary import Scores
from socpo_fast.socratic.bridge import Bridge, load_tokenizer
from socpo_fast.socratic.data import load_questions, questions_from_rows
from socpo_fast.socratic.episode import RolloutOptions
from socpo_fast.socratic.graders import check_ground_truth
from socpo_fast.socratic.question_rows import Columns
from socpo_fast.socratic.rollout import socratic_rollouts
from socpo_fast.socratic.tasks import molar_mass
from socpo_fast.socratic.teachers import ask, background, make_teacher, result_of
from socpo_fast.socratic.user_parts import UserParts
from socpo_fast.training.checkpoint import check_undamaged
from socpo_fast.training.optimizer import gradient_bytes
from socpo_fast.types import (
    GuidanceFailed,
    GuidanceRequest,
    Question,
    Rollout,
    RolloutKey,
    SamplingParams,
)

# The batch index in the keys of evaluation's sampling noise. The draws are therefore the same in
# every evaluation and differ from those of every training batch.
EVAL_BATCH = -1
# Rollouts of one slice of an evaluation. At the end of a slice the engine runs half empty, so there
# should be many times max_running between two ends.
EVAL_SLICE_ROLLOUTS = 4096
CLOSE_S = 5.0  # time for a teacher to close its connections; a hung one is abandoned
BUILTIN_EVAL_SEED = 0  # the held-out questions are the same for every run


class Session:
    """The student and everything that its rollouts need.

    With for_training the student is trainable, and `reference` is loaded, the frozen copy of the
    start, if loss.kl_coef needs one. `parts` are used in place of what the settings name.
    is_checked says that the caller has just compared the bytes of the student's checkpoint.

    Attributes:
        student_folder: the folder of the weights and the tokenizer.
        config:         the settings, with "auto" replaced where it decides about memory.
        plan:           the memory plan that replaced it, on a card; None on a CPU.
    """

    def __init__(
        self,
        config: Config,
        parts: UserParts | None = None,
        *,
        for_training: bool = False,
        is_checked: bool = False,
    ):
        self.parts = parts or UserParts()
        self.parts.check(config)
        set_threads(config.run.threads)
        bound_kernel_caches()
        device = select_device(config.run.device)
        config = pin_models(config)
        tell_loading(f"the student {config.student.path}", quiet=config.run.quiet)
        self.student_folder = find_student(config)
        if not is_checked:
            check_undamaged(self.student_folder)
        self.config, self.plan = settle(
            config, self.student_folder, device, is_training=for_training
        )
        config = self.config
        self.grader = self.parts.make_grader(config)
        self.student = self._load_student(device).requires_grad_(for_training)
        # After the model, whose loader gives the better message for a bad config.json.
        self.tokenizer = load_tokenizer(self.student_folder)
        self.bridge = Bridge(
            self.tokenizer,
            guidance_limit=config.rollout.guidance_limit,
            enable_thinking=config.student.enable_thinking,
        )
        self.params = SamplingParams(
            temperature=config.rollout.temperature,
            max_new_tokens=config.rollout.max_new_tokens,
            eos_ids=self.bridge.eos_ids,
            seed=config.run.seed,
        )
        self.options = rollout_options(config)
        self.uses_teacher = self.options.max_attempts > 1
        if self.uses_teacher and isinstance(config.teacher, LocalTeacherConfig):
            tell_loading(f"the teacher {config.teacher.path}", quiet=config.run.quiet)
        self.teacher = self.parts.teacher or make_teacher(config, device=str(device))
        self._is_teacher_tried = False
        self._is_peak_told = False
        self.num_left_out: dict[str, int] = {}  # by "train" and "eval", once they are loaded
        self.reference: Decoder | None = None
        if for_training and config.loss.kl_coef > 0:
            self.reference = self._load_student(device).requires_grad_(False)
        # The engine comes last: its KV cache takes the memory that the others leave. It is at least
        # as large as the gradients, because updates store their gradients in it (lend_memory).
        self.engine = Engine(
            self.student,
            **config.engine.model_dump(),
            min_memory_bytes=sum(
                gradient_bytes(p for p in self.student.parameters() if p.requires_grad)
            ),
            stream_priority=-1,
        )
        # For the longest context of a first attempt, and of any attempt.
        self.engine.prepare(self.max_prompt_tokens + self.params.max_new_tokens)
        self.engine.prepare(self._longest_context())

    @property
    def memory_note(self) -> str:
        """Returns a note for the user on how memory is used: one line; on a card, the plan."""
        if self.plan is not None:
            return plan_table(self.plan)
        parameters = list(self.student.parameters())
        weights_gib = sum(p.nbytes for p in parameters) / GIB
        adamw_gib = sum(8 * p.numel() for p in parameters if p.requires_grad) / GIB
        adamw = f", AdamW {adamw_gib:.2g} GiB" * (adamw_gib > 0)
        return f"{self.engine.kv_cache.note}, weights {weights_gib:.2g} GiB{adamw}, and activations"

    def peak_memory(self, tell: Callable[[str], None]) -> dict[str, float]:
        """Returns the peak memory of tensors on a card; tells once if the plan was 10 % off."""
        if self.plan is None:
            return {}
        peak_gib = torch.cuda.max_memory_allocated(self.config.run.device) / GIB
        planned_gib = self.plan.peak_bytes / GIB
        if not self._is_peak_told and abs(peak_gib - planned_gib) > 0.1 * planned_gib:
            tell(f"memory: the first batch took {peak_gib:.1f} GiB, {planned_gib:.1f} were planned")
        self._is_peak_told = True
        return {"perf/peak_memory_gib": peak_gib}

    def close(self) -> None:
        """Closes the teacher's connections, but does not wait for a hung one."""
        if self.parts.teacher is None:  # else it is the caller's
            wait([background(self.teacher.aclose())], timeout=CLOSE_S)

    def _load_student(self, device: torch.device) -> Decoder:
        """Loads the weights of student_folder, for the student or for the reference."""
        return load_student(self.student_folder, dtype=self.config.student.dtype, device=device)

    @property
    def max_prompt_tokens(self) -> int:
        """Returns the longest allowed prompt: data.max_prompt_tokens, or less in a short model."""
        positions = self.student.config.max_position_embeddings
        return min(
            self.config.data.max_prompt_tokens, positions - self.config.rollout.max_new_tokens
        )

    def _longest_context(self) -> int:
        """Returns the tokens of the longest possible context; refuses a smaller KV cache."""
        # If the cache holds every single rollout, its size changes only the speed, never a result.
        rollout = self.config.rollout
        positions = self.student.config.max_position_embeddings
        check_rule(
            "rollout",
            "rollout.max_new_tokens",
            rollout.max_new_tokens,
            self.max_prompt_tokens >= 1,
            f"below the model's {positions} positions",
            "lower it",
        )
        # What each attempt but the last adds to the context of the next one.
        num_seen = (
            min(rollout.attempt_limit, rollout.max_new_tokens)
            + rollout.guidance_limit
            + len(self.bridge.bridge_ids("", ended=False))
        )
        longest_row = (
            self.max_prompt_tokens + (rollout.max_attempts - 1) * num_seen + rollout.max_new_tokens
        )
        needed = min(longest_row, positions)
        capacity = self.engine.max_tokens
        if needed > capacity:
            raise ValueError(
                f"engine: engine.kv_cache_gib must hold the longest context, {needed} tokens, "
                f"got room for {capacity} ({self.engine.kv_cache.note}); "
                "raise it, or lower data.max_prompt_tokens, rollout.max_new_tokens or "
                "rollout.guidance_limit"
            )
        return needed

    def train_questions(self) -> list[Question]:
        """Returns the questions to train on."""
        data = self.config.data
        return self._questions(
            "train",
            path=data.train,
            split=data.train_split,
            seed=self.config.run.seed,
            number=data.builtin_train_questions,
        )

    def eval_questions(self) -> list[Question]:
        """Returns the held-out questions; [] if the config names none."""
        data = self.config.data
        if data.eval is None:
            return []
        questions = self._questions(
            "eval",
            path=data.eval,
            split=data.eval_split,
            seed=BUILTIN_EVAL_SEED,
            number=data.builtin_eval_questions,
        )
        return questions[: self.config.eval.max_questions]

    def _questions(
        self, setting: Literal["train", "eval"], *, path: str, split: str, seed: int, number: int
    ) -> list[Question]:
        """Returns the questions of a path, or `number` built-in ones drawn with `seed`."""
        data = self.config.data
        rows = self.parts.train if setting == "train" else self.parts.eval
        if rows is not None or path != "builtin":
            tell_loading(f"questions {path}", quiet=self.config.run.quiet)
            checks: dict[str, Any] = {
                "grader": data.grader,
                "bridge": self.bridge,
                "max_prompt_tokens": self.max_prompt_tokens,
                "truths_as_json": data.truths_as_json,
                "columns": Columns(
                    question=data.question_column,
                    ground_truth=data.ground_truth_column,
                    reference_solution=data.reference_solution_column,
                    system=data.system_column,
                ),
            }
            loaded = (
                load_questions(path, split=split, subset=data.subset, **checks)
                if rows is None
                else questions_from_rows(rows, name=setting, **checks)
            )
            self.num_left_out[setting] = loaded.num_left_out
            return loaded
        questions = molar_mass.questions(seed, number, setting)
        # With some graders no answer to a built-in question could be correct.
        try:
            check_ground_truth(data.grader, questions[0])
        except ValueError as error:
            raise ValueError(f"data: data.{setting} builtin: {error}") from None
        return questions

    def training_rollouts(self, questions: Sequence[Question], batch_idx: int) -> Iterator[Rollout]:
        """Yields the rollouts of a batch, in the order in which they finish."""
        return self._rollouts(questions, self.params, batch_idx, self.options)

    def evaluate(
        self,
        questions: Sequence[Question],
        on_rollout: Callable[[Rollout, Question], None] = lambda *_: None,
    ) -> dict[str, float]:
        """Measures the student's unassisted success and, with eval.assisted, its assisted success.

        The sampling noise is the same every time. One set of rollouts gives both numbers: their
        first attempts are the unassisted ones. Questions go through the engine in slices, and only
        counts are kept. How they are sliced changes no number.
        """
        config = self.config.eval
        started = time.perf_counter()
        assisted = config.assisted and self.uses_teacher
        scores = Scores(questions, samples=config.samples, assisted=assisted)
        size = max(EVAL_SLICE_ROLLOUTS // config.samples, 1)
        by_idx = {question.question_idx: question for question in questions}
        options = replace(
            self.options,
            group_size=config.samples,
            max_attempts=self.options.max_attempts if assisted else 1,
        )
        params = replace(self.params, temperature=config.temperature, top_p=config.top_p)
        for start in range(0, len(questions), size):
            part = questions[start : start + size]
            for rollout in self._rollouts(part, params, EVAL_BATCH, options):
                scores.add(rollout)
                on_rollout(rollout, by_idx[rollout.question_idx])
        return scores.metrics() | {"time/total_s": time.perf_counter() - started}

    def _rollouts(
        self,
        questions: Sequence[Question],
        params: SamplingParams,
        batch_idx: int,
        options: RolloutOptions,
    ) -> Iterator[Rollout]:
        """Yields rollouts with these parameters; tries a remote teacher before the first ones."""
        # A server is tried once per session, and only when it is about to be needed.
        if options.max_attempts > 1 and self.teacher.is_remote and not self._is_teacher_tried:
            self._is_teacher_tried = True
            self._try_teacher(questions[0])
        return socratic_rollouts(
            self.engine,
            self.tokenizer,
            questions,
            teacher=self.teacher,
            grader=self.grader,
            params=params,
            options=options,
            batch_idx=batch_idx,
            bridge=self.bridge,
        )

    def _try_teacher(self, question: Question) -> None:
        """Calls the teacher once before anything is sampled: a wrong key must not cost a batch."""
        request = GuidanceRequest(
            question=question.text,
            student_answer="I do not know.",
            ground_truth=None,
            reference_solution=None,
            key=RolloutKey(EVAL_BATCH, question.question_idx),
            rollout_idx=0,
            attempt_idx=0,
        )
        answer = ask(self.teacher, request, self.options.guidance_timeout_s)
        wait([answer])
        outcome = result_of(answer, self.teacher)
        # "cut" and "none" came from a server that works: only this one answer was unusable.
        if isinstance(outcome, GuidanceFailed) and outcome.kind not in ("cut", "none"):
            self.check_silence(
                f"teacher: the first call got no guidance, {outcome.kind}: {outcome}"
            )

    def check_silence(self, line: str) -> None:
        """Ends the run with `line`, unless teacher.on_silence allows a silent teacher."""
        if self.config.teacher.on_silence == "stop":
            raise ValueError(f"{line}; mend it, or set teacher.on_silence continue")


def find_student(config: Config, *, weights: bool = True) -> Path:
    """Returns the folder that student.path names; a model of the hub is downloaded."""
    path = config.student.path
    if path == "builtin":
        return molar_mass.STUDENT_DIR
    return model_folder("student.path", path, weights=weights)


def rollout_options(config: Config) -> RolloutOptions:
    """Collects the options of training rollouts from their sections."""
    rollout = config.rollout
    teacher = config.teacher
    return RolloutOptions(
        group_size=rollout.group_size,
        max_attempts=rollout.max_attempts,
        attempt_limit=rollout.attempt_limit,
        guidance_limit=rollout.guidance_limit,
        context=rollout.context,
        on_leak=teacher.on_leak,
        view=teacher.view,
        reveal_answer=teacher.reveal_answer,
        show_reference=teacher.show_reference,
        guidance_timeout_s=teacher.guidance_timeout_s,
    )


def credit_options(config: Config) -> CreditOptions:
    """Collects the options of rewards and advantages from their sections."""
    return CreditOptions(**config.reward.model_dump(), **config.advantage.model_dump())
