"""Calls an endpoint teacher and returns its guidance as text."""

import asyncio
from collections.abc import Callable
from typing import Any

from socpo_fast.socratic.teachers import EndpointTeacher, TeacherPrompt
from socpo_fast.types import GuidanceFailed, GuidanceRequest, RolloutKey
from tests.helpers.faulty_server import Handler, Server

KEY = "sk-very-secret"


def request(rollout_idx: int = 0) -> GuidanceRequest:
    """Returns a request for guidance after a wrong first attempt."""
    return GuidanceRequest(
        question="1 + 1?",
        student_answer="It is 3.",
        ground_truth=None,
        reference_solution=None,
        key=RolloutKey(0, 0),
        rollout_idx=rollout_idx,
        attempt_idx=0,
    )


async def hear(teacher: EndpointTeacher, rollout_idx: int = 0) -> str:
    """Returns the text of the guidance, or the kind of failure in brackets."""
    try:
        return (await teacher.guide_in_time(request(rollout_idx), None)).text
    except GuidanceFailed as failure:
        return f"[{failure.kind}]"


def ask(
    server: Server,
    script: list[Callable[[Handler], None]],
    num_calls: int = 1,
    *,
    at_once: bool = False,
    **settings: Any,
) -> list[str]:
    """Returns what each of num_calls calls answered, under short time limits.

    Calls run one after the other, or all concurrently with at_once.
    """
    server.script = script
    defaults = {
        "timeout_s": 0.3,
        "max_retries": 2,
        "backoff_s": 0.01,
        "api_key_env": "SOCPO_TEST_KEY",
    }

    async def run() -> list[str]:
        teacher = EndpointTeacher(
            server.url, model="m", prompt=TeacherPrompt(), **(defaults | settings)
        )
        if at_once:
            answers = await asyncio.gather(*(hear(teacher, i) for i in range(num_calls)))
        else:
            answers = [await hear(teacher, i) for i in range(num_calls)]
        await teacher.aclose()
        return list(answers)

    return asyncio.run(run())
