"""Adds SocraticPO to TRL 1.16: a GRPOTrainer with our rollouts, credit and loss.

    GRPOTrainer                                what is ours
    _generate_and_score_completions
        rollout_func                           _roll_out: rollouts, credit, metrics
        reward functions, advantages           advantages per token, the sampler's log-probs
    _compute_loss
        model.forward(.., fused_lm_head=True)  model.forward(.., policy_head=..), see trl_loss.py

Read SocraticGRPOTrainer.__init__, then _roll_out. trl_checks.py says which of TRL's options are
taken. This is the only module that imports TRL.

Departures from TRL's own trainer:

- A row is a whole rollout, so max_completion_length bounds one attempt and not the row.
- Decay and advantages are computed over the rollouts of all ranks, and for each attempt.
- With our engine, old log-probs are the sampler's, so the ratio is 1 only up to rounding: that of
  bf16 if args.bf16 (TRL's default) lets an fp32 model train under autocast.
- The column `advantage` of TRL's completions table is TRL's own number, one for each row.
- An evaluation makes first attempts only: nobody helps, so its reward is the unassisted one.
"""

from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import torch
from accelerate.utils import gather_object, is_peft_model
from torch import Tensor

from socpo_fast.engine import Engine
from socpo_fast.integrations.episode import play_episodes
from socpo_fast.integrations.tensors import pad_rollouts
from socpo_fast.integrations.trl_checks import (
    WHERE,
    check_arguments,
    check_trainer,
    question_of_row,
)
from socpo_fast.integrations.trl_loss import add_policy_head, fused_loss
from socpo_fast.model import adopt_student
from socpo_fast.ops import CreditOptions
from socpo_fast.ops._checks import check_rule
from socpo_fast.report.summary import success_rates, summarize
from socpo_fast.socratic.bridge import Bridge
from socpo_fast.socratic.credit import assign_credit
from socpo_fast.socratic.episode import Episode, Limits, RolloutOptions
from socpo_fast.socratic.graders import Grader
from socpo_fast.socratic.rollout import socratic_rollouts
from socpo_fast.socratic.teachers import Teacher, TeacherFunction
from socpo_fast.types import Question, Rollout, SamplingParams

VERSION = "1.16."
try:
    import trl
except ImportError as error:
    raise ImportError(
        f"{WHERE}: TRL must be installed, got {error}; pip install 'trl>=1.16,<1.17'"
    ) from error
if not trl.__version__.startswith(VERSION):
    raise ImportError(
        f"{WHERE}: TRL must be {VERSION}x, whose private methods it overrides, got "
        f"{trl.__version__}; pip install 'trl>=1.16,<1.17'"
    )
from trl import GRPOConfig, GRPOTrainer  # noqa: E402 - only once the version is known

Row = tuple[Question, int]  # the question of one of TRL's rows, and which rollout of it the row is
DEFAULT_CREDIT = CreditOptions()
# In an evaluation advantages only enter its loss, which nobody trains on. This estimator takes any
# batch, however small.
EVAL_CREDIT = CreditOptions(schedule="none", estimator="dr_grpo")
EVAL_METRIC = "success/unassisted"
EVAL_STEP = -1  # stands for the optimizer step to which a generation of an evaluation belongs


def socratic_reward(*, socratic_reward: list[Any], **_columns: Any) -> list[Any]:
    """Hands _roll_out's rewards to TRL, for its metrics: of the last attempt, after decay."""
    return socratic_reward


class SocraticGRPOTrainer(GRPOTrainer):
    """Trains with SocraticPO where TRL's GRPOTrainer trains with GRPO.

    Args:
        model, args, **trl_arguments: GRPOTrainer's own, by name; without reward_funcs, since the
                      grader is the reward. A row of a data set has TRL's `prompt` (messages) and
                      `ground_truth`, and may have `reference_solution`.
        teacher:      a Teacher, or a plain or async function of the GuidanceRequest.
        grader:       text, question -> a bool, a number in [0, 1], or named parts of one.
        options:      the rules of an episode; default: as many rollouts as args.num_generations.
        credit:       decay and advantages; they take the place of args.scale_rewards.
        generation:   "engine": our paged engine, on the storage of TRL's parameters. "trl": TRL's
                      own generation, as when args.use_vllm or
                      args.use_transformers_continuous_batching is set.
        kv_cache_gib: GiB of the engine's pages; "auto": see Engine.
        loss:         "fused": our op. "trl": TRL's own, which knows more options.

    A run that resumes from a checkpoint draws what it would have drawn without the break, if the
    checkpoint was made where a generation begins (as always with num_iterations 1 and
    steps_per_generation at most gradient_accumulation_steps).

    Raises:
        ValueError: an option that cannot be had, with the reason and what to do.
        ImportError: on import of this module, if TRL is missing or another version.
    """

    # TRL declares wider types, for what can be None or of many kinds elsewhere.
    args: Any
    model: Any
    processing_class: Any
    max_completion_length: int
    num_generations_eval: int

    def __init__(
        self,
        model: Any,
        *,
        args: Any = None,
        teacher: Teacher | TeacherFunction,
        grader: Grader,
        options: RolloutOptions | None = None,
        credit: CreditOptions = DEFAULT_CREDIT,
        generation: Literal["engine", "trl"] = "engine",
        kv_cache_gib: float | Literal["auto"] = "auto",
        loss: Literal["fused", "trl"] = "fused",
        **trl_arguments: Any,
    ):
        args = args or GRPOConfig("SocraticPO")
        if args.use_vllm or args.use_transformers_continuous_batching:
            generation = "trl"
        self.options = options or RolloutOptions(
            group_size=args.num_generations, attempt_limit=args.max_completion_length
        )
        check_arguments(model, args, trl_arguments, self.options, generation, loss)
        super().__init__(model, [socratic_reward], args, **trl_arguments)
        check_trainer(self, generation, loss)
        self.rollout_func = self._roll_out
        self.teacher = teacher
        self.grader = grader
        self.credit = credit
        self.loss = loss
        self.bridge = Bridge(
            self.processing_class,
            guidance_limit=self.options.guidance_limit,
            **(args.chat_template_kwargs or {}),
        )
        self.rollouts: list[Rollout] = []  # of this rank, in the order of TRL's rows
        self.kv_cache_gib = kv_cache_gib
        self.generation = generation
        # Number of generations so far: of the optimizer step, or the evaluation, that came last.
        self._generations: dict[int, int] = {}
        # Our engine stops at all ids below; TRL's generation only at its own.
        check_rule(
            WHERE,
            "model.generation_config.eos_token_id",
            self.eos_token_ids,
            generation == "engine" or self.bridge.end_of_turn_id in self.eos_token_ids,
            f"with the end of turn, {self.bridge.end_of_turn_id}, for generation='trl'",
            "add it",
        )
        self.bridge.eos_ids = tuple(dict.fromkeys([*self.bridge.eos_ids, *self.eos_token_ids]))
        self.eos_token_ids = list(self.bridge.eos_ids)  # TRL counts truncated rows by them
        if loss == "fused":
            is_peft = is_peft_model(self.model)
            add_policy_head(self.model.get_base_model() if is_peft else self.model)

    @cached_property
    def engine(self) -> Engine:
        """The paged engine on TRL's parameters.

        It is made at the first rollout: accelerate may move the model to other storage before.
        """
        student = adopt_student(self.accelerator.unwrap_model(self.model), share=True)
        return Engine(student, kv_cache_gib=self.kv_cache_gib)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Adds our advantages and the sampler's log-probs to TRL's batch."""
        self._rows = inputs  # TRL hands only the prompts to rollout_func
        output = super()._generate_and_score_completions(inputs)
        is_sampled_BC = (output["completion_mask"] * output["tool_mask"]).bool()
        advantages_N = self._advantages_N.to(is_sampled_BC.device)
        zeros_BC = advantages_N.new_zeros(is_sampled_BC.shape)
        output["advantages"] = zeros_BC.masked_scatter(is_sampled_BC, advantages_N)
        if self.generation == "engine":
            # Else TRL takes the current log-probs for the old ones, or computes them once more.
            output["old_per_token_logps"] = output["sampling_per_token_logps"]
        return output

    def _roll_out(self, prompts: list[Any], _trainer: GRPOTrainer) -> dict[str, Any]:
        """Is TRL's rollout_func: rollouts of this rank's rows, credited with those of all ranks."""
        mode = "train" if self.model.training else "eval"
        options = self.options
        if mode == "eval":
            options = replace(options, group_size=self.num_generations_eval, max_attempts=1)
        # TRL numbers the rows of all ranks in this order. num_generations neighbours are a group.
        first = self.accelerator.process_index * len(prompts)
        rows = [
            (question_of_row(row, idx // options.group_size), idx % options.group_size)
            for idx, row in enumerate(self._rows, start=first)
        ]
        is_ours = self.generation == "engine"
        roll_out = self._roll_out_engine if is_ours else self._roll_out_trl
        rollouts = roll_out(rows, options, self._batch_idx())
        # Decay, baselines and whitening need the attempts of all ranks. They are few, and metrics
        # need them as well, so every rank gets all rollouts and credits them as one batch.
        everyone: list[Rollout] = gather_object(rollouts)
        if mode == "train":
            factors, _ = assign_credit(everyone, options=self.credit)
            metrics = summarize(everyone, factors)
        else:
            assign_credit(everyone, options=EVAL_CREDIT)
            metrics = {EVAL_METRIC: success_rates(everyone)[EVAL_METRIC]}
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)
        self.rollouts = everyone[first : first + len(prompts)]
        # By itself each rollout is a row without padding.
        padded = [pad_rollouts([rollout], rows="rollout", pad_id=0) for rollout in self.rollouts]
        self._advantages_N = torch.cat([row.advantages_BL[row.loss_mask_BL] for row in padded])
        logprobs = self._completions([row.logprobs_BL for row in padded])
        return {
            "prompt_ids": [rollout.prompt_ids for rollout in self.rollouts],
            "completion_ids": self._completions([row.ids_BL for row in padded]),
            "logprobs": logprobs if is_ours or self.use_vllm else None,
            "env_mask": self._completions([row.loss_mask_BL.int() for row in padded]),
            "socratic_reward": [rollout.turns[-1].reward for rollout in self.rollouts],
        }

    def _roll_out_engine(
        self, rows: list[Row], options: RolloutOptions, batch_idx: int
    ) -> list[Rollout]:
        """Returns the rollouts of whole groups, by our engine."""
        check_rule(
            WHERE,
            "rows of a rank",
            len(rows),
            len(rows) % options.group_size == 0,
            f"whole groups of {options.group_size} for generation='engine'",
            "change the batch size of a device, or num_generations_eval",
        )
        self.engine.update_weights()  # TRL's optimizer writes them; here the engine looks
        rollouts = socratic_rollouts(
            self.engine,
            self.bridge.tokenizer,
            [question for question, rollout_idx in rows if rollout_idx == 0],
            teacher=self.teacher,
            grader=self.grader,
            params=SamplingParams(
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                min_p=self.min_p or 0.0,
                max_new_tokens=self.max_completion_length,
                eos_ids=self.bridge.eos_ids,
                seed=self.args.seed,
            ),
            options=options,
            batch_idx=batch_idx,
            bridge=self.bridge,
        )
        return sorted(rollouts, key=lambda rollout: (rollout.question_idx, rollout.rollout_idx))

    def _roll_out_trl(
        self, rows: list[Row], options: RolloutOptions, batch_idx: int
    ) -> list[Rollout]:
        """Returns one rollout for each row, by TRL's own generation."""
        max_tokens = self.args.vllm_max_model_length
        max_tokens = max_tokens or self.model.config.get_text_config().max_position_embeddings
        episodes = [
            Episode(
                question,
                bridge=self.bridge,
                grader=self.grader,
                options=options,
                limits=Limits(self.max_completion_length, max_tokens),
                rollout_idx=rollout_idx,
            )
            for question, rollout_idx in rows
        ]
        # vLLM samples a prompt n times where the rows hold it n times, as in first attempts.
        copies = iter([options.group_size])

        def generate(contexts: list[list[int]]) -> tuple[list[list[int]], list[Any] | None]:
            # Some of TRL's backends need every rank, so one that has nothing left samples a dummy.
            prompts = contexts or [episodes[0].rollout.prompt_ids]
            return self._generate_single_turn(prompts, None, {}, next(copies, 1))

        play_episodes(
            episodes,
            generate=generate,
            teacher=self.teacher,
            batch_idx=batch_idx,
            goes_on=lambda num_live: any(gather_object([num_live])),
            where=WHERE,
        )
        return [episode.rollout for episode in episodes]

    def _batch_idx(self) -> int:
        """Returns what names the sampling noise: the same number in a run that resumes."""
        # An optimizer step may need several generations, which must not share their noise.
        step = self.state.global_step if self.model.training else EVAL_STEP
        nth = self._generations.get(step, 0)
        self._generations = {step: nth + 1}
        first = step * self.args.gradient_accumulation_steps
        return first + nth if self.model.training else -1 - nth

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluates as TRL does; the same weights give the same numbers with our engine."""
        self._generations = {}
        return super().evaluate(*args, **kwargs)

    def _completions(self, rows_1L: list[Tensor]) -> list[list[Any]]:
        """Returns what TRL calls the completions: the rows without the prompts."""
        pairs = zip(rows_1L, self.rollouts, strict=True)
        return [row_1L[0, len(rollout.prompt_ids) :].tolist() for row_1L, rollout in pairs]

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Computes the loss of a microbatch with our op, or as TRL does."""
        if self.loss == "fused":
            return fused_loss(self, model, inputs)
        return super()._compute_loss(model, inputs)
