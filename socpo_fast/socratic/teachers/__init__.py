"""The frozen guides: one protocol (base), four kinds (simple, local, endpoint), chosen by make_teacher."""

from __future__ import annotations

from socpo_fast.config import TeacherConfig
from socpo_fast.engine import Engine
from socpo_fast.model import load_student
from socpo_fast.socratic.bridge import Bridge, load_tokenizer
from socpo_fast.socratic.plugin import load_function
from socpo_fast.socratic.teachers.base import SYSTEM_PROMPT, USER_TEMPLATE, Teacher, TeacherPrompt
from socpo_fast.socratic.teachers.endpoint import EndpointTeacher
from socpo_fast.socratic.teachers.local import LocalTeacher
from socpo_fast.socratic.teachers.simple import RETRY_TEXT, RuleTeacher, retry_teacher
from socpo_fast.types import SamplingParams

__all__ = [
    "EndpointTeacher",
    "LocalTeacher",
    "RuleTeacher",
    "Teacher",
    "TeacherPrompt",
    "make_teacher",
    "retry_teacher",
]

_PAGE_SIZE = 32  # tokens
_BUILTIN_RULE = "socpo_fast.socratic.tasks.molar_mass:tutor"


def make_teacher(config: TeacherConfig, *, seed: int, dtype: str = "float32", device: str = "cpu") -> Teacher:
    """The teacher that a config's section describes; seed, dtype and device are for kind local.

    Raises:
        ValueError: a setting that the kind needs is missing, or one of them is refused by the teacher itself.
    """
    if config.kind == "rule":
        return RuleTeacher(load_function("teacher.rule", _BUILTIN_RULE if config.rule == "builtin" else config.rule))
    if config.kind == "retry":
        return retry_teacher(RETRY_TEXT if config.retry_text is None else config.retry_text)
    prompt = TeacherPrompt(
        SYSTEM_PROMPT if config.system_prompt is None else config.system_prompt,
        USER_TEMPLATE if config.user_template is None else config.user_template,
    )
    if config.kind == "local":
        return _local_teacher(config, prompt, seed=seed, dtype=dtype, device=device)
    return EndpointTeacher(
        _needed("url", config.url, "endpoint"),
        model=_needed("model", config.model, "endpoint"),
        prompt=prompt,
        api_key_env=config.api_key_env,
        temperature=config.temperature,
        max_new_tokens=config.max_new_tokens,
        timeout_s=config.timeout_s,
        max_retries=config.max_retries,
        max_concurrency=config.max_concurrency,
    )


def _local_teacher(config: TeacherConfig, prompt: TeacherPrompt, *, seed: int, dtype: str, device: str) -> LocalTeacher:
    folder = _needed("path", config.path, "local")
    bridge = Bridge(load_tokenizer(folder), guidance_limit=config.max_new_tokens)
    model = load_student(folder, dtype=dtype, device=device)
    engine = Engine(model, kv_cache_gib=config.kv_cache_gib, page_size=_PAGE_SIZE)
    params = SamplingParams(
        temperature=config.temperature, max_new_tokens=config.max_new_tokens, eos_ids=bridge.eos_ids, seed=seed
    )
    context_limit = min(model.config.max_position_embeddings, engine.stats.pages_total * _PAGE_SIZE)
    return LocalTeacher(engine, bridge=bridge, prompt=prompt, params=params, context_limit=context_limit)


def _needed(name: str, value: str | None, kind: str) -> str:
    if not value:
        raise ValueError(f"teacher.{name} must be set with teacher.kind {kind}, got none")
    return value
