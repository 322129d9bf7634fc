"""The frozen guides: one protocol (base), four kinds (simple, local, endpoint), chosen by make_teacher."""

from __future__ import annotations

from socpo_fast.config import Config
from socpo_fast.engine import Engine
from socpo_fast.model import load_student
from socpo_fast.socratic.bridge import Bridge, load_tokenizer
from socpo_fast.socratic.plugin import load_function
from socpo_fast.socratic.teachers.base import SYSTEM_PROMPT, USER_TEMPLATE, Teacher, TeacherPrompt
from socpo_fast.socratic.teachers.endpoint import EndpointTeacher
from socpo_fast.socratic.teachers.local import LocalTeacher
from socpo_fast.socratic.teachers.simple import RETRY_TEXT, RuleTeacher, retry_teacher
from socpo_fast.types import SamplingParams

_BUILTIN_RULE = "socpo_fast.socratic.tasks.molar_mass:tutor"


def make_teacher(config: Config, *, device: str = "cpu") -> Teacher:
    """The teacher of a config, ready to be asked; of a config with one attempt none that matters, as it never is.

    That a kind's own settings are there, the config has seen to (config.find_conflicts). A local one
    is frozen, and has its weights and its KV cache on the device when this returns.

    Raises:
        ValueError: a setting is refused by the teacher itself.
    """
    teacher = config.teacher
    if config.rollout.max_attempts == 1:
        return retry_teacher()
    if teacher.kind == "rule":
        return RuleTeacher(load_function("teacher.rule", _BUILTIN_RULE if teacher.rule == "builtin" else teacher.rule))
    if teacher.kind == "retry":
        return retry_teacher(RETRY_TEXT if teacher.retry_text is None else teacher.retry_text)
    prompt = TeacherPrompt(
        SYSTEM_PROMPT if teacher.system_prompt is None else teacher.system_prompt,
        USER_TEMPLATE if teacher.user_template is None else teacher.user_template,
    )
    if teacher.kind == "local":
        return _local_teacher(config, prompt, device)
    assert teacher.url is not None and teacher.model is not None
    return EndpointTeacher(
        teacher.url,
        model=teacher.model,
        prompt=prompt,
        api_key_env=teacher.api_key_env,
        temperature=teacher.temperature,
        max_new_tokens=teacher.max_new_tokens,
        timeout_s=teacher.timeout_s,
        max_retries=teacher.max_retries,
        max_concurrency=teacher.max_concurrency,
    )


def _local_teacher(config: Config, prompt: TeacherPrompt, device: str) -> LocalTeacher:
    teacher = config.teacher
    assert teacher.path is not None
    bridge = Bridge(load_tokenizer(teacher.path), guidance_limit=teacher.max_new_tokens)
    dtype = teacher.dtype
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    model = load_student(teacher.path, dtype=dtype, device=device)
    model.requires_grad_(False)
    params = SamplingParams(
        temperature=teacher.temperature,
        max_new_tokens=teacher.max_new_tokens,
        eos_ids=bridge.eos_ids,
        seed=config.run.seed,
    )
    return LocalTeacher(Engine(model, kv_cache_gib=teacher.kv_cache_gib), bridge=bridge, prompt=prompt, params=params)
