"""Makes the teacher that a configuration names.

    base.py        what every teacher is, and the prompt of those with a language model
    calls.py       kinds "rule" (a function) and "retry" (a fixed sentence); how teachers are called
    local.py       kind "local": a model in this process
    endpoint.py    kind "endpoint": a model behind a server

Read base, calls, then the other two. The settings of each kind are in config/teachers.py.
"""

from collections.abc import Callable

from socpo_fast.config import (
    Config,
    EndpointTeacherConfig,
    LocalTeacherConfig,
    RetryTeacherConfig,
    RuleTeacherConfig,
)
from socpo_fast.device import select_device
from socpo_fast.engine import Engine
from socpo_fast.model import load_student
from socpo_fast.model.hub import model_folder
from socpo_fast.socratic.bridge import Bridge, load_tokenizer
from socpo_fast.socratic.plugin import load_function
from socpo_fast.socratic.teachers.base import SYSTEM_PROMPT, USER_TEMPLATE, Teacher, TeacherPrompt
from socpo_fast.socratic.teachers.calls import (
    RETRY_TEXT,
    RuleTeacher,
    TeacherFunction,
    as_teacher,
    ask,
    background,
    result_of,
    retry_teacher,
    wait_if_immediate,
)
from socpo_fast.socratic.teachers.endpoint import EndpointTeacher
from socpo_fast.socratic.teachers.local import LocalTeacher
from socpo_fast.types import SamplingParams

__all__ = [
    "RETRY_TEXT",
    "EndpointTeacher",
    "LocalTeacher",
    "RuleTeacher",
    "Teacher",
    "TeacherFunction",
    "TeacherPrompt",
    "as_teacher",
    "ask",
    "background",
    "make_teacher",
    "result_of",
    "retry_teacher",
    "wait_if_immediate",
]

_BUILTIN_RULE = "socpo_fast.socratic.tasks.molar_mass:tutor"


def make_teacher(config: Config, *, device: str = "cpu") -> Teacher:
    """Returns the teacher of a config, ready to be asked.

    When this returns, a local teacher has its frozen weights and its KV cache on the device.

    Raises:
        ValueError: the teacher refuses one of its settings.
    """
    # With one attempt the teacher is never asked, so nothing is loaded and no server is needed.
    if config.rollout.max_attempts == 1:
        return retry_teacher()
    makers: dict[str, Callable[..., Teacher]] = {
        "rule": make_rule_teacher,
        "retry": make_retry_teacher,
        "local": make_local_teacher,
        "endpoint": make_endpoint_teacher,
    }
    return makers[config.teacher.kind](config.teacher, config, device)


def make_rule_teacher(teacher: RuleTeacherConfig, config: Config, device: str) -> RuleTeacher:
    """Returns the user's function, or the built-in task's tutor, as a teacher."""
    return RuleTeacher(
        load_function("teacher.rule", _BUILTIN_RULE if teacher.rule == "builtin" else teacher.rule)
    )


def make_retry_teacher(teacher: RetryTeacherConfig, config: Config, device: str) -> RuleTeacher:
    """Returns a teacher whose guidance is always the same sentence."""
    return retry_teacher(RETRY_TEXT if teacher.retry_text is None else teacher.retry_text)


def make_endpoint_teacher(
    teacher: EndpointTeacherConfig, config: Config, device: str
) -> EndpointTeacher:
    """Returns a teacher behind an OpenAI-compatible server."""
    return EndpointTeacher(
        teacher.url,
        model=teacher.model,
        prompt=_prompt(teacher),
        api_key_env=teacher.api_key_env,
        temperature=teacher.temperature,
        max_new_tokens=teacher.max_new_tokens,
        timeout_s=teacher.timeout_s,
        max_retries=teacher.max_retries,
        max_concurrency=teacher.max_concurrency,
        keep_cut=teacher.keep_cut,
        extra_body=teacher.extra_body,
    )


def make_local_teacher(teacher: LocalTeacherConfig, config: Config, device: str) -> LocalTeacher:
    """Returns a frozen model with its own engine, in the student's process."""
    prompt = _prompt(teacher)
    folder = model_folder("teacher.path", teacher.path)
    bridge = Bridge(
        load_tokenizer(folder),
        guidance_limit=teacher.max_new_tokens,
        enable_thinking=teacher.enable_thinking,
        single_turn=True,
    )
    device = str(select_device(teacher.device, "teacher.device")) if teacher.device else device
    # Chosen by the teacher's device, which need not be the student's.
    auto_dtype = "float32" if device == "cpu" else "bfloat16"
    model = load_student(
        folder,
        dtype=auto_dtype if teacher.dtype == "auto" else teacher.dtype,
        device=device,
    )
    return LocalTeacher(
        Engine(
            model.requires_grad_(False),
            kv_cache_gib=teacher.kv_cache_gib,
            stream_priority=0,  # the student's stream has -1, which is more urgent
            name="teacher",
        ),
        bridge=bridge,
        prompt=prompt,
        params=SamplingParams(
            temperature=teacher.temperature,
            max_new_tokens=teacher.max_new_tokens,
            eos_ids=bridge.eos_ids,
            seed=config.run.seed,
        ),
    )


def _prompt(teacher: EndpointTeacherConfig | LocalTeacherConfig) -> TeacherPrompt:
    """Returns the prompt of a config, with built-in texts where it sets none."""
    return TeacherPrompt(
        SYSTEM_PROMPT if teacher.system_prompt is None else teacher.system_prompt,
        USER_TEMPLATE if teacher.user_template is None else teacher.user_template,
    )
