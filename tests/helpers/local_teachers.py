"""Runs a tiny local teacher: asked from another thread, stepped on this one."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from socpo_fast.config import Config, LocalTeacherConfig, RunConfig
from socpo_fast.socratic.teachers import LocalTeacher, make_teacher
from socpo_fast.socratic.teachers.calls import background
from socpo_fast.types import Guidance, GuidanceFailed, GuidanceRequest, RolloutKey
from tests.helpers.tiny_tokenizers import CHATML, tiny_tokenizer

SETTINGS = {
    "kind": "local",
    "temperature": 1.0,
    "max_new_tokens": 12,
    "kv_cache_gib": 0.01,
    "user_template": "{student_answer}",
}


def save_teacher(path: Path) -> Path:
    """Saves a tiny Llama with its tokenizer as a folder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=402,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tiny_tokenizer(CHATML).save_pretrained(path)
    return path


def local_teacher(folder: Path, device: str = "cpu", **settings: object) -> LocalTeacher:
    """Returns the local teacher that a config with these settings makes."""
    config = Config(
        run=RunConfig(seed=7),
        teacher=LocalTeacherConfig(path=str(folder), **{**SETTINGS, **settings}),
    )  # type: ignore[arg-type]
    teacher = make_teacher(config, device=device)
    assert isinstance(teacher, LocalTeacher)
    assert not teacher.immediate
    return teacher


def request(
    rollout_idx: int = 0, *, question: int = 0, answer: str = "It is 3."
) -> GuidanceRequest:
    """Returns a request for guidance after a wrong first attempt."""
    return GuidanceRequest(
        question="1 + 1?",
        student_answer=answer,
        ground_truth=None,
        reference_solution=None,
        key=RolloutKey(-1, question),
        rollout_idx=rollout_idx,
        attempt_idx=0,
    )


def wait_until(condition: Callable[[], bool]) -> None:
    """Waits until the condition holds; fails after 30 seconds."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline


def ask(teacher: LocalTeacher, requests: list[GuidanceRequest]) -> list[str]:
    """Returns the guidance for each request, all asked at once, or failures in brackets."""
    futures = [background(teacher.guide_in_time(request, None)) for request in requests]
    wait_until(lambda: not teacher.step() and all(future.done() for future in futures))
    return [heard(future) for future in futures]


def heard(future: Future[Guidance]) -> str:
    """Returns the text of the guidance, or the kind of failure in brackets."""
    try:
        return future.result(timeout=30).text
    except GuidanceFailed as failure:
        return f"[{failure.kind}]"
