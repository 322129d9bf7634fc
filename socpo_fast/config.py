"""Configuration: typed, frozen sections; TOML below, `section.key` overrides on top; wrong values stop at the door.

Read load_config, then the sections; the rules between them stand in rules.py. A section is a pydantic model: each
field carries its range and a description with unit, which `socpo train --help` shows and error messages quote. "none"
is the word for an absent value, in TOML and on the command line. Relative paths are relative to the working directory;
"builtin" stands for what the package ships. Torch is not imported here, so a typing error costs no start-up.
"""

from __future__ import annotations

import tomllib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from socpo_fast.rules import contradiction, doubts
from socpo_fast.validation import explain, from_text, to_toml


def load_config(toml_path: str | Path | None = None, overrides: Mapping[str, object] | None = None) -> Config:
    """The configuration of a TOML file with overrides on top; what neither names keeps its default.

    Args:
        toml_path: file of `[section]` tables; None = defaults only.
        overrides: "section.key" -> value. Text is read as the field's type, as from the command line.

    Raises:
        ValueError: no such file, broken TOML, an unknown key, a value outside its range, values that contradict.
    """
    tables = {} if toml_path is None else read_toml(toml_path)
    for name, value in (overrides or {}).items():
        section, _, key = name.rpartition(".")
        table = tables.setdefault(section, {}) if section else tables
        if not isinstance(table, dict):
            raise ValueError(
                f"config: {section} must be a table, got {table!r}; write [{section}] and key = value lines"
            )
        table[key] = from_text(Config, name, value) if isinstance(value, str) else value
    try:
        return Config.model_validate(tables)
    except ValidationError as error:
        raise ValueError(explain(Config, error)) from None


def read_toml(toml_path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file, unchecked."""
    try:
        return tomllib.loads(Path(toml_path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"config: {toml_path} must be a readable file: {error.strerror}") from None
    except ValueError as error:  # broken TOML or not UTF-8
        raise ValueError(f"config: {toml_path} must be TOML: {error}") from None


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _none_is_a_word(cls, value: object, info: ValidationInfo) -> object:
        nullable = type(None) in get_args(cls.model_fields[str(info.field_name)].annotation)
        return None if nullable and value == "none" else value


class RunConfig(Section):
    """The run: its name, folder, seed, length and machine."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="folder name under run.dir")
    dir: str = Field(default="runs", min_length=1, description="folder that holds all runs")
    seed: int = Field(default=0, ge=0, lt=2**31, description="seed of data order and sampling noise")
    resume: str = Field(
        default="auto", min_length=1, description="auto = the run's last checkpoint; never; a checkpoint to begin from"
    )
    num_batches: int = Field(default=100, ge=1, description="batches to train on")
    checkpoint_every_updates: int = Field(default=20, ge=0, description="updates between saves, 0 = at the end only")
    keep_checkpoints: int = Field(default=2, ge=1, description="newest checkpoints that are kept")
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:[0-9]+)?)$", description="cpu, cuda or cuda:INDEX")
    threads: int = Field(default=0, ge=0, le=4096, description="CPU threads, 0 = all cores (or OMP_NUM_THREADS)")
    live: bool = Field(default=True, description="live progress display on a terminal; otherwise one line a batch")


class StudentConfig(Section):
    """The model that is trained."""

    path: str = Field(default="builtin", min_length=1, description="Hugging Face folder, or builtin")
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="parameter type; float32 on a CPU")
    enable_thinking: bool | None = Field(
        default=None, description="for chat templates that ask (Qwen3: false = no thinking); none = the template's own"
    )


class DataConfig(Section):
    """Questions and how an answer is graded."""

    train: str = Field(default="builtin", min_length=1, description="parquet or JSONL file, hub data set, or builtin")
    eval: str | None = Field(default="builtin", description="held-out questions, the same kinds; none = no evaluation")
    train_split: str = Field(default="train", min_length=1, description="split of a folder or hub data set to train on")
    eval_split: str = Field(default="test", min_length=1, description="split of a folder or hub data set held out")
    subset: str | None = Field(default=None, description="subset of a hub data set that has several; none = it has one")
    grader: str = Field(
        default="exact", description="sciknoweval, mcq, exact, math, or module:function(text, question)"
    )
    max_prompt_tokens: int = Field(default=2048, ge=1, description="longest prompt in tokens; longer ones are left out")
    builtin_train_questions: int = Field(default=20_000, ge=1, description="built-in training questions")
    builtin_eval_questions: int = Field(default=200, ge=1, description="built-in held-out questions")


class GraderConfig(Section):
    """From a grader's verdict to right or wrong."""

    correct_at: float = Field(default=1.0, gt=0, le=1, description="reward from which an attempt counts as correct")


class RolloutConfig(Section):
    """How the student answers in training."""

    questions_per_batch: int = Field(default=32, ge=1, description="questions rolled out together")
    group_size: int = Field(default=8, ge=1, description="rollouts a question")
    max_attempts: int = Field(default=2, ge=1, description="K, attempts a rollout; 1 = plain REINFORCE++, no teacher")
    temperature: float = Field(default=1.0, gt=0, le=10, description="sampling temperature, also that of the loss")
    max_new_tokens: int = Field(default=1024, ge=1, description="longest attempt, tokens")
    attempt_limit: int = Field(default=1024, ge=1, description="tokens of an attempt that the next one sees (its head)")
    guidance_limit: int = Field(default=2048, ge=1, description="longest guidance, student tokens")
    context: Literal["tokens", "template"] = Field(
        default="tokens",
        description="the next attempt sees what was sampled, or what the chat template makes of it (no old <think>)",
    )


class TeacherConfig(Section):
    """Who guides after a wrong attempt (unused when rollout.max_attempts is 1)."""

    kind: Literal["rule", "local", "endpoint", "retry"] = Field(
        default="rule",
        description="a Python function, a Hugging Face folder, an OpenAI-compatible server, or a fixed sentence",
    )
    rule: str = Field(
        default="builtin", description="kind rule: module:function(request) -> text, or builtin (molar masses)"
    )
    retry_text: str | None = Field(default=None, description="kind retry: the sentence; none = our wording")
    path: str | None = Field(default=None, min_length=1, description="kind local: Hugging Face folder")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="kind local: parameter type; auto = bfloat16 on a card, float32 on a CPU",
    )
    kv_cache_gib: float = Field(default=1.0, gt=0, le=4096, description="kind local: KV cache, GiB")
    url: str | None = Field(
        default=None, pattern=r"^https?://[^@\s]+$", repr=False, description="kind endpoint: base URL, such as HOST/v1"
    )
    model: str | None = Field(default=None, min_length=1, description="kind endpoint: model name sent to the server")
    api_key_env: str | None = Field(
        default=None,
        pattern=r"^[A-Z_][A-Z0-9_]*$",
        repr=False,
        description="kind endpoint: NAME of the variable with the key",
    )
    timeout_s: float = Field(default=60.0, gt=0, le=3600, description="kind endpoint: time limit of one call, seconds")
    max_retries: int = Field(default=2, ge=0, le=20, description="kind endpoint: repeats of a failed call")
    max_concurrency: int = Field(default=16, ge=1, le=4096, description="kind endpoint: calls in flight")
    guidance_timeout_s: float = Field(
        default=600.0, gt=0, le=86400, description="any kind: longest wait for one guidance, repeats included, seconds"
    )
    temperature: float = Field(default=0.2, ge=0, le=10, description="sampling temperature, 0 = greedy")
    max_new_tokens: int = Field(default=1024, ge=1, description="longest guidance, teacher tokens")
    reveal_answer: bool = Field(default=False, description="the teacher sees ground_truth")
    show_reference: bool = Field(default=False, description="the teacher sees reference_solution")
    view: Literal["head_tail", "head"] = Field(
        default="head_tail", description="what the teacher sees of an attempt over rollout.attempt_limit"
    )
    on_leak: Literal["keep", "drop", "mask"] = Field(
        default="keep",
        description="guidance that states the answer: shown; not shown and the rollout ends; shown with [...] instead",
    )
    system_prompt: str | None = Field(default=None, description="system message; none = our wording")
    user_template: str | None = Field(
        default=None,
        description="with {question} {student_answer} {reference_solution} {ground_truth}; none = our wording",
    )


class RewardConfig(Section):
    """What a correct answer after guidance is worth."""

    schedule: Literal["batch_mean", "constant", "none"] = Field(
        default="batch_mean",
        description="batch_mean = times the mean decayed reward of earlier attempts; constant = factor ** attempt",
    )
    factor: float | None = Field(default=None, ge=0, le=1, description="schedule constant: reward factor an attempt")


class AdvantageConfig(Section):
    """From rewards to advantages, over one batch."""

    estimator: Literal["reinforce_plus_plus_baseline", "reinforce_plus_plus", "grpo", "dr_grpo", "rloo"] = Field(
        default="reinforce_plus_plus_baseline", description="baseline and scale; the first two whiten over tokens"
    )
    baseline_group: Literal["question", "question_attempt"] = Field(
        default="question", description="attempts that share a baseline; the second cancels decay"
    )
    eps: float = Field(default=1e-6, gt=0, le=1, description="grpo: added to the group's standard deviation")


class LossConfig(Section):
    """The clipped policy loss."""

    agg: Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm"] = Field(
        default="token_mean", description="weight of each loss token"
    )
    clip_low: float = Field(default=0.2, ge=0, lt=1, description="ratios below 1 - clip_low are clipped")
    clip_high: float = Field(default=0.2, ge=0, description="ratios above 1 + clip_high are clipped")
    dual_clip: float | None = Field(default=3.0, gt=1, description="cap on the loss at negative advantage, x |A|")
    entropy_coef: float = Field(default=0.0, ge=0, description="entropy bonus, per nat")
    kl_coef: float = Field(default=0.0, ge=0, description="KL to the frozen start, in the loss, per nat; 0 = none")
    kl_estimator: Literal["k1", "k2", "k3"] = Field(default="k3", description="estimator of that KL")
    tis_clip: float | None = Field(default=None, gt=0, description="truncated importance sampling: cap of the weight")
    old_logprobs: Literal["auto", "sampler", "recompute"] = Field(
        default="auto", description="auto = the sampler's if within 1e-3 nats, else recomputed"
    )


class TrainConfig(Section):
    """Updates."""

    questions_per_update: int = Field(default=8, ge=1, description="questions of an optimizer step, all their rollouts")
    epochs: int = Field(default=1, ge=1, le=100, description="passes over a batch")
    lr: float = Field(default=1e-6, gt=0, le=1, description="AdamW learning rate after warm-up")
    warmup_updates: int = Field(default=10, ge=0, description="updates of linear warm-up")
    weight_decay: float = Field(default=0.01, ge=0, le=1, description="decoupled weight decay, times lr an update")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW: decay of the gradient's mean")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW: decay of the squared gradient's mean")
    max_grad_norm: float = Field(default=1.0, gt=0, description="gradients are scaled down to this norm")
    token_budget: int = Field(default=8192, ge=1, description="tokens of a microbatch; a longer group is taken alone")
    packing: Literal["tree", "rows"] = Field(
        default="tree", description="tree = every shared token forwarded once; rows = one row a rollout"
    )
    checkpointing: bool = Field(default=False, description="recompute layers in the backward: less memory, more time")
    max_bad_updates: int = Field(default=5, ge=1, description="stop after so many non-finite updates in a row")


class EngineConfig(Section):
    """The rollout engine."""

    kv_cache_gib: Annotated[float, Field(gt=0, le=4096)] | Literal["auto"] = Field(
        default="auto",
        description="KV cache, GiB; auto = 1 on a CPU, on a card what weights and updates leave",
    )
    page_size: int = Field(default=32, ge=1, le=1024, description="tokens of a KV page")
    max_running: int = Field(default=256, ge=1, le=65536, description="attempts decoded together")
    token_budget: int = Field(default=2048, ge=1, description="tokens of one engine step, prefill and decode")
    attention: Literal["auto", "flash"] = Field(default="auto", description="flash: flash-attn, page_size 256, a GPU")


class EvalConfig(Section):
    """Evaluation on data.eval: unassisted accuracy, the headline, and assisted."""

    every_updates: int = Field(default=20, ge=0, description="updates between evaluations, 0 = start and end only")
    temperature: float = Field(default=0.6, ge=0, le=10, description="sampling temperature, 0 = greedy")
    top_p: float = Field(default=0.95, gt=0, le=1, description="nucleus mass, 1 = off")
    samples: int = Field(default=16, ge=1, description="samples a question (the k of avg@k)")
    max_questions: int | None = Field(default=None, ge=1, description="first questions of data.eval; none = all")
    assisted: bool = Field(default=True, description="also let the teacher help, and report that apart")


class Config(Section):
    """Everything a run is told. Sections in the order of a batch."""

    run: RunConfig = RunConfig()
    student: StudentConfig = StudentConfig()
    data: DataConfig = DataConfig()
    grader: GraderConfig = GraderConfig()
    rollout: RolloutConfig = RolloutConfig()
    teacher: TeacherConfig = TeacherConfig()
    reward: RewardConfig = RewardConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    engine: EngineConfig = EngineConfig()
    eval: EvalConfig = EvalConfig()

    @property
    def folder(self) -> Path:
        """The run folder, run.dir/run.name."""
        return Path(self.run.dir) / self.run.name

    def to_toml(self) -> str:
        """TOML that load_config reads back to an equal Config. Holds no secret: of the key only its variable's name."""
        return to_toml(self)

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if broken := contradiction(self):
            raise ValueError(f"config: {broken}")
        for doubt in doubts(self):
            warnings.warn(f"config: {doubt}", stacklevel=2)
        return self
