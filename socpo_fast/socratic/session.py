"""Everything that rollouts need, from a config: student, engine, bridge, teacher, grader, questions; and evaluation."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from socpo_fast.config import Config
from socpo_fast.device import select_device, set_threads
from socpo_fast.engine import Engine
from socpo_fast.model import Decoder, load_student
from socpo_fast.socratic.bridge import Bridge, load_tokenizer
from socpo_fast.socratic.data import load_questions
from socpo_fast.socratic.graders import make_grader
from socpo_fast.socratic.rollout import background, socratic_rollouts
from socpo_fast.socratic.summary import mean, success_rates
from socpo_fast.socratic.tasks import molar_mass
from socpo_fast.socratic.teachers import Teacher, make_teacher, retry_teacher
from socpo_fast.types import Question, Rollout, SamplingParams

EVAL_BATCH = -1  # names the noise of evaluations: the same draws every time, none of them training's
BUILTIN_EVAL_SEED = 0  # the held-out questions are the same for every run


class Session:
    """The student and those around it. `student_folder` is where weights and tokenizer were read."""

    def __init__(self, config: Config):
        self.config = config
        set_threads(config.run.threads)
        device = select_device(config.run.device)
        path = config.student.path
        self.student_folder = molar_mass.STUDENT_DIR if path == "builtin" else Path(path).expanduser()
        self.tokenizer = load_tokenizer(self.student_folder)
        self.bridge = Bridge(self.tokenizer, guidance_limit=config.rollout.guidance_limit)
        self.grader = make_grader(config.data.grader)
        self.student = load_student(self.student_folder, dtype=config.student.dtype, device=str(device))
        self.engine = Engine(
            self.student,
            kv_cache_gib=config.engine.kv_cache_gib,
            page_size=config.engine.page_size,
            max_running=config.engine.max_running,
            token_budget=config.engine.token_budget,
        )
        self.uses_teacher = config.rollout.max_attempts > 1
        self.teacher: Teacher = (
            make_teacher(config.teacher, seed=config.run.seed, dtype=config.student.dtype, device=str(device))
            if self.uses_teacher
            else retry_teacher()  # never asked
        )

    def close(self) -> None:
        background(self.teacher.aclose()).result()

    def load_reference(self) -> Decoder:
        """The student as it was before training, frozen, for the KL term."""
        weight = self.student.lm_head.weight
        return load_student(self.student_folder, dtype=self.config.student.dtype, device=weight.device)

    @property
    def max_prompt_tokens(self) -> int:
        """Prompts that can be rolled out: data.max_prompt_tokens, or less where model or KV cache hold less."""
        return min(self.config.data.max_prompt_tokens, self.engine.max_tokens - self.config.rollout.max_new_tokens)

    def train_questions(self) -> list[Question]:
        data = self.config.data
        if data.train == "builtin":
            return molar_mass.questions(self.config.run.seed, data.builtin_train_questions, "train")
        return load_questions(data.train, bridge=self.bridge, max_prompt_tokens=self.max_prompt_tokens)

    def eval_questions(self) -> list[Question]:
        """The held-out questions, [] when the config names none."""
        data = self.config.data
        if data.eval is None:
            return []
        if data.eval == "builtin":
            questions = molar_mass.questions(BUILTIN_EVAL_SEED, data.builtin_eval_questions, "eval")
        else:
            questions = load_questions(
                data.eval, split="test", bridge=self.bridge, max_prompt_tokens=self.max_prompt_tokens
            )
        return questions[: self.config.eval.max_questions]

    def training_rollouts(self, questions: Sequence[Question], batch_idx: int) -> Iterator[Rollout]:
        rollout = self.config.rollout
        return self._rollouts(
            questions,
            self._params(temperature=rollout.temperature, top_p=1.0),
            group_size=rollout.group_size,
            max_attempts=rollout.max_attempts,
            batch_idx=batch_idx,
        )

    def evaluate(self, questions: Sequence[Question]) -> dict[str, float]:
        """Unassisted avg@k of the student as it is, and with eval.assisted the teacher's help on top, told apart.

        The same noise every time, and the first attempts of the assisted episodes are the unassisted ones.
        """
        config, started = self.config.eval, time.perf_counter()
        assisted = config.assisted and self.uses_teacher
        rollouts = list(
            self._rollouts(
                questions,
                self._params(temperature=config.temperature, top_p=config.top_p),
                group_size=config.samples,
                max_attempts=self.config.rollout.max_attempts if assisted else 1,
                batch_idx=EVAL_BATCH,
            )
        )
        rates = success_rates(rollouts)
        if not assisted:
            del rates["success/assisted"]
        attempts = [rollout.attempts[0] for rollout in rollouts]
        return rates | {
            "rollout/attempt_tokens": mean([float(attempt.num_tokens) for attempt in attempts]),
            "rollout/truncated": mean([float(attempt.finish_reason == "length") for attempt in attempts]),
            "time/total_s": time.perf_counter() - started,
        }

    def _params(self, *, temperature: float, top_p: float) -> SamplingParams:
        return SamplingParams(
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=self.config.rollout.max_new_tokens,
            eos_ids=self.bridge.eos_ids,
            seed=self.config.run.seed,
        )

    def _rollouts(
        self,
        questions: Sequence[Question],
        params: SamplingParams,
        *,
        group_size: int,
        max_attempts: int,
        batch_idx: int,
    ) -> Iterator[Rollout]:
        rollout, teacher = self.config.rollout, self.config.teacher
        return socratic_rollouts(
            self.engine,
            self.tokenizer,
            questions,
            teacher=self.teacher,
            grader=self.grader,
            params=params,
            group_size=group_size,
            max_attempts=max_attempts,
            bridge=self.bridge,
            batch_idx=batch_idx,
            attempt_limit=rollout.attempt_limit,
            view=teacher.view,
            reveal_answer=teacher.reveal_answer,
            show_reference=teacher.show_reference,
            timeout_s=teacher.guidance_timeout_s,
        )
