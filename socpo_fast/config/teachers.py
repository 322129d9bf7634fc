"""Defines the sections of the teacher, one for each value of teacher.kind.

TeacherConfig                      what all teachers share
  +- RuleTeacherConfig             a Python function, the default
  +- RetryTeacherConfig            a fixed sentence
  +- ModelTeacherConfig            what teachers with a language model share
       +- LocalTeacherConfig       runs in this process
       +- EndpointTeacherConfig    an OpenAI-compatible server
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from socpo_fast.config.sections import MOST_TOKENS, Section
from socpo_fast.config.text import LocalPath


class TeacherConfig(Section):
    """Who guides after a wrong attempt (unused when rollout.max_attempts is 1)."""

    kind: str
    guidance_timeout_s: float = Field(
        default=600.0,
        gt=0,
        le=86400,
        description="limit of one guidance from when it is sent, repeats included, seconds",
    )
    on_silence: Literal["stop", "continue"] = Field(
        default="stop",
        description="what a run does when a batch, or a server's first call, gets no guidance",
    )
    reveal_answer: bool = Field(default=False, description="the teacher sees ground_truth")
    show_reference: bool = Field(default=False, description="the teacher sees reference_solution")
    view: Literal["head_tail", "head"] = Field(
        default="head_tail",
        description="what the teacher sees of an attempt over rollout.attempt_limit",
    )
    on_leak: Literal["keep", "drop", "mask"] = Field(
        default="keep",
        description="guidance that states the answer: shown; not shown and the rollout ends; "
        "shown with [...] instead",
    )


class RuleTeacherConfig(TeacherConfig):
    """A Python function."""

    kind: Literal["rule"] = Field(default="rule", description="a Python function")
    rule: str = Field(
        default="builtin", description="module:function(request) -> text, or builtin (molar masses)"
    )


class RetryTeacherConfig(TeacherConfig):
    """A fixed sentence, the ablation."""

    kind: Literal["retry"] = Field(default="retry", description="a fixed sentence")
    retry_text: str | None = Field(default=None, description="the sentence; none = our wording")


class ModelTeacherConfig(TeacherConfig):
    """The settings that teachers with a language model share."""

    temperature: float = Field(
        default=0.2, ge=0, le=10, description="sampling temperature, 0 = greedy"
    )
    max_new_tokens: int = Field(
        default=1024, ge=1, le=MOST_TOKENS, description="longest guidance, teacher tokens"
    )
    system_prompt: str | None = Field(
        default=None, description="system message; none = our wording"
    )
    user_template: str | None = Field(
        default=None,
        description="with {question} {student_answer} {reference_solution} {ground_truth}; none = "
        "our wording",
    )


class LocalTeacherConfig(ModelTeacherConfig):
    """A Hugging Face model, run in this process."""

    kind: Literal["local"] = Field(default="local", description="a Hugging Face model")
    path: LocalPath = Field(
        min_length=1, description="Hugging Face folder, or OWNER/NAME[@REVISION] of the hub"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="parameter type; auto = bfloat16 on a card, float32 on a CPU"
    )
    kv_cache_gib: float = Field(default=1.0, gt=0, le=4096, description="KV cache, GiB")
    device: str | None = Field(
        default=None,
        pattern=r"^(cpu|cuda(:[0-9]+)?)$",
        description="cpu, cuda or cuda:INDEX, a card of its own; none = run.device",
    )
    enable_thinking: bool | None = Field(
        default=None, description="for chat templates that ask, as student.enable_thinking"
    )


class EndpointTeacherConfig(ModelTeacherConfig):
    """An OpenAI-compatible server."""

    kind: Literal["endpoint"] = Field(default="endpoint", description="an OpenAI-compatible server")
    # repr=False: people paste keys into url and api_key_env. Error messages hide their values.
    url: str = Field(
        pattern=r"^https?://[^@?#\s]+$", repr=False, description="base URL, such as HOST/v1"
    )
    model: str = Field(min_length=1, description="model name sent to the server")
    api_key_env: str | None = Field(
        default=None,
        pattern=r"^[A-Z_][A-Z0-9_]*$",
        repr=False,
        description="NAME of the variable with the key",
    )
    timeout_s: float = Field(
        default=60.0, gt=0, le=3600, description="time limit of one call, seconds"
    )
    max_retries: int = Field(default=2, ge=0, le=20, description="repeats of a failed call")
    max_concurrency: int = Field(default=16, ge=1, le=4096, description="calls in flight")
    keep_cut: bool = Field(
        default=False,
        description="a message cut at max_new_tokens is guidance (else it may be thoughts)",
    )
    extra_body: dict[str, Any] = Field(
        default={},
        description="more fields of the request, as JSON on the command line; none leaves one out",
    )


# To add a kind of teacher: write its section, list it here, and write its maker in
# socratic/teachers. The first one in this list is the default.
AnyTeacher = Annotated[
    RuleTeacherConfig | LocalTeacherConfig | EndpointTeacherConfig | RetryTeacherConfig,
    Field(discriminator="kind"),
]
