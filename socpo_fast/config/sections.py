"""Defines the sections of a configuration, in the order in which a batch meets them.

The teacher's sections are in teachers.py. config/__init__.py puts all sections together. A section
is a frozen pydantic model. Each field carries its range, which error messages quote, and a
description with its unit. `socpo train --help` shows both, and the docstring of each section.
"none" is the word for an absent value, in TOML and on the command line. Relative paths are relative
to the working directory. "builtin" names what the package ships.
"""

import os
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, Union, get_args

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from socpo_fast.config.text import LocalPath, one_of
from socpo_fast.registries import ESTIMATORS, LR_SCHEDULES, SCHEDULES, Schedule

# Limits that no run needs to pass. Beyond them a slip of the keyboard would fill the memory or
# never end, where it should be refused.
MOST_TOKENS = 2**24
MOST_ROLLOUTS = 2**18
MOST_THREADS = max(64, os.cpu_count() or 1)
Count = Annotated[int, Field(le=10**9)]  # of what comes one by one; and limits that may be no limit
Tokens = Annotated[int, Field(le=MOST_TOKENS)]
Rollouts = Annotated[int, Field(le=MOST_ROLLOUTS)]


class Section(BaseModel):
    # strict: a file that says "8" where a number is needed is refused rather than converted. Text
    # from the command line is converted before, by text.from_text.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _replace_none_word(cls, table: object) -> object:
        """Replaces the word "none" by None in fields that may be absent: TOML has no null."""
        if not isinstance(table, dict):
            return table
        nullable = {
            key
            for key, field in cls.model_fields.items()
            if type(None) in get_args(field.annotation)
        }
        return {
            key: None if key in nullable and value == "none" else value
            for key, value in table.items()
        }


class RunConfig(Section):
    """The run: its name, folder, seed, length and machine."""

    name: str = Field(
        default="run",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="folder name under run.dir",
    )
    dir: LocalPath = Field(default="runs", min_length=1, description="folder that holds all runs")
    seed: int = Field(
        default=0, ge=0, lt=2**31, description="seed of data order and sampling noise"
    )
    resume: LocalPath = Field(
        default="auto",
        min_length=1,
        description="auto = the run's last checkpoint; never; a checkpoint to begin from",
    )
    accept_changes: bool = Field(
        default=False,
        description="go on although settings or data that decide results have changed, once",
    )
    num_batches: Count = Field(default=100, ge=1, description="batches to train on")
    checkpoint_every_updates: Count = Field(
        default=20, ge=0, description="updates between saves, 0 = at the end only"
    )
    keep_checkpoints: Count = Field(
        default=2, ge=1, description="newest checkpoints kept, beside the best one"
    )
    device: str = Field(
        default="cpu", pattern=r"^(cpu|cuda(:[0-9]+)?)$", description="cpu, cuda or cuda:INDEX"
    )
    threads: int = Field(
        default=0,
        ge=0,
        le=MOST_THREADS,
        description="CPU threads, 0 = all cores (or OMP_NUM_THREADS)",
    )
    trace_batches: Count = Field(
        default=0,
        ge=0,
        description="first batches whose student, teacher and phases are traced for "
        "ui.perfetto.dev",
    )
    live: bool = Field(
        default=True, description="live progress display on a terminal; otherwise one line a batch"
    )
    quiet: bool = Field(default=False, description="show nothing but warnings and how the run ends")


class StudentConfig(Section):
    """The model that is trained."""

    path: LocalPath = Field(
        default="builtin",
        min_length=1,
        description="Hugging Face folder, OWNER/NAME[@REVISION] of the hub, or builtin",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="parameter type; bfloat16 (on a card): the high half of an exact fp32 master",
    )
    enable_thinking: bool | None = Field(
        default=None,
        description="for chat templates that ask (Qwen3: false = no thinking); none = the "
        "template's own",
    )


class GraderConfig(Section):
    """From a grader's verdict to right or wrong."""

    correct_at: float = Field(
        default=1.0, gt=0, le=1, description="reward from which an attempt counts as correct"
    )
    timeout_s: float = Field(
        default=60.0,
        gt=0,
        le=86400,
        description="limit of one verdict, seconds; longer stops the run",
    )


class RolloutConfig(Section):
    """How the student answers in training."""

    questions_per_batch: Rollouts = Field(
        default=32, ge=1, description="questions rolled out together"
    )
    group_size: Rollouts = Field(default=8, ge=1, description="rollouts a question")
    max_attempts: int = Field(
        default=2, ge=1, le=256, description="K, attempts a rollout; 1 = REINFORCE++, no teacher"
    )
    temperature: float = Field(
        default=1.0, gt=0, le=10, description="sampling temperature, also that of the loss"
    )
    max_new_tokens: Tokens = Field(
        default=1024,
        ge=1,
        description="longest attempt, tokens; with the built-in student 128 is the default",
    )
    attempt_limit: Count = Field(
        default=1024, ge=1, description="tokens of an attempt that the next one sees (its head)"
    )
    guidance_limit: Count = Field(
        default=2048, ge=1, description="longest guidance, student tokens"
    )
    context: Literal["tokens", "template"] = Field(
        default="tokens",
        description="the next attempt sees what was sampled, or what the chat template makes of "
        "it (no old <think>)",
    )

    @model_validator(mode="after")
    def _check_num_rollouts(self) -> Self:
        """Refuses a batch that no machine holds; each factor alone may be in its range."""
        num_rollouts = self.questions_per_batch * self.group_size
        if num_rollouts > MOST_ROLLOUTS:
            raise ValueError(
                "config: rollout.questions_per_batch * rollout.group_size must be <= "
                f"{MOST_ROLLOUTS}, got {num_rollouts}; lower one of them"
            )
        return self


class RewardConfig(Section):
    """What a correct answer after guidance is worth."""

    # reward_section narrows this field to one schedule in each subclass.
    schedule: str = next(iter(SCHEDULES))
    credit: Literal["attempt", "trajectory"] = Field(
        default="attempt",
        description="an attempt earns its own reward, or that of its rollout's last attempt",
    )


def reward_section(name: str, schedule: Schedule) -> type[RewardConfig]:
    """Makes the section of one reward schedule; `factor` exists only where the schedule uses it."""
    fields: dict[str, Any] = {
        "schedule": (Literal[name], Field(default=name, description=schedule.meaning))
    }
    if schedule.takes_factor:
        fields["factor"] = (float, Field(ge=0, le=1, description="factor of one attempt more"))
    return create_model(
        f"RewardConfig_{name}", __base__=RewardConfig, __doc__=RewardConfig.__doc__, **fields
    )


REWARDS = tuple(reward_section(name, schedule) for name, schedule in SCHEDULES.items())

# The union is made from the table of schedules at import. A type checker cannot follow that, so it
# sees the base class.
if TYPE_CHECKING:
    AnyReward = RewardConfig
else:
    AnyReward = Annotated[Union[REWARDS], Field(discriminator="schedule")]  # noqa: UP007


class AdvantageConfig(Section):
    """From rewards to advantages, over one batch."""

    estimator: Annotated[str, *one_of(ESTIMATORS)] = Field(
        default="reinforce_plus_plus_baseline",
        description="baseline and scale; the first two whiten over tokens",
    )
    baseline_group: Literal["question", "question_attempt"] = Field(
        default="question", description="attempts that share a baseline; the second cancels decay"
    )
    eps: float = Field(
        default=1e-6, gt=0, description="grpo: added to the group's standard deviation"
    )


class LossConfig(Section):
    """The clipped policy loss."""

    agg: Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm"] = Field(
        default="token_mean", description="weight of each loss token"
    )
    clip_low: float = Field(
        default=0.2, ge=0, le=1, description="ratios below 1 - clip_low are clipped"
    )
    clip_high: float = Field(
        default=0.2, ge=0, description="ratios above 1 + clip_high are clipped"
    )
    dual_clip: float | None = Field(
        default=3.0, gt=1, description="cap on the loss at negative advantage, x |A|"
    )
    entropy_coef: float = Field(default=0.0, description="entropy bonus, per nat")
    kl_coef: float = Field(
        default=0.0, ge=0, description="KL to the frozen start, in the loss, per nat; 0 = none"
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        default="k3", description="estimator of that KL"
    )
    tis_clip: float | None = Field(
        default=None, gt=0, description="truncated importance sampling: cap of the weight"
    )
    old_logprobs: Literal["auto", "sampler", "recompute"] = Field(
        default="auto",
        description="auto = the sampler's if within 1e-3 nats in fp32; "
        "else none for the first update, recomputed for the others",
    )


class TrainConfig(Section):
    """Updates."""

    questions_per_update: Rollouts = Field(
        default=8, ge=1, description="questions of an optimizer step, all their rollouts"
    )
    epochs: int = Field(default=1, ge=1, le=100, description="passes over a batch")
    lr: float = Field(default=1e-6, gt=0, le=1, description="AdamW learning rate after warm-up")
    warmup_updates: Count = Field(default=10, ge=0, description="updates of linear warm-up")
    lr_schedule: Annotated[str, *one_of(LR_SCHEDULES)] = Field(
        default="constant",
        description="how the learning rate falls from the end of the warm-up to that of the run",
    )
    min_lr_ratio: float = Field(
        default=0.0, ge=0, lt=1, description="where it falls to, as a share of lr"
    )
    weight_decay: float = Field(
        default=0.01, ge=0, le=1, description="decoupled weight decay, times lr an update"
    )
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW: decay of the gradient's mean")
    beta2: float = Field(
        default=0.999, ge=0, lt=1, description="AdamW: decay of the squared gradient's mean"
    )
    max_grad_norm: float = Field(
        default=1.0, gt=0, description="gradients are scaled down to this norm"
    )
    token_budget: Annotated[Tokens, Field(ge=1)] | Literal["auto"] = Field(
        default="auto",
        description="tokens of a microbatch, a longer rollout alone; auto = 8192 on a CPU, what "
        "fits a card",
    )
    packing: Literal["tree", "rows"] = Field(
        default="tree",
        description="tree = every shared token forwarded once; rows = one row a rollout",
    )
    checkpointing: bool | Literal["auto"] = Field(
        default="auto",
        description="recompute layers in the backward: less memory, more time; auto = where it "
        "must be, on a card",
    )
    max_bad_updates: Count = Field(
        default=5, ge=1, description="stop after so many non-finite updates in a row"
    )


class EngineConfig(Section):
    """The rollout engine."""

    kv_cache_gib: Annotated[float, Field(gt=0, le=4096)] | Literal["auto"] = Field(
        default="auto",
        description="KV cache, GiB; auto = 1 on a CPU, on a card what weights and updates leave",
    )
    page_size: int = Field(default=32, ge=1, le=1024, description="tokens of a KV page")
    max_running: int = Field(default=256, ge=1, le=65536, description="attempts decoded together")
    token_budget: Tokens = Field(
        default=2048, ge=1, description="tokens of one engine step, prefill and decode"
    )
    attention: Literal["auto", "flash"] = Field(
        default="auto", description="flash: flash-attn, page_size 256, a GPU"
    )


class EvalConfig(Section):
    """Evaluation on data.eval: unassisted accuracy, the headline, and assisted."""

    every_updates: Count = Field(
        default=20, ge=0, description="updates between evaluations, 0 = start and end only"
    )
    temperature: float = Field(
        default=0.6, ge=0, le=10, description="sampling temperature, 0 = greedy"
    )
    top_p: float = Field(default=0.95, gt=0, le=1, description="nucleus mass, 1 = off")
    samples: int = Field(
        default=16, ge=1, le=4096, description="samples a question (the k of avg@k)"
    )
    max_questions: Count | None = Field(
        default=None, ge=1, description="first questions of data.eval; none = all"
    )
    assisted: bool = Field(
        default=True, description="also let the teacher help, and report that apart"
    )
