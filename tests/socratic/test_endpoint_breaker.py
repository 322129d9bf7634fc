"""The circuit breaker: faults of the server in a row open it, any sign of life closes it.

While it is open, calls fail at once. After a pause one trial call goes through.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from socpo_fast.socratic.teachers import EndpointTeacher, TeacherPrompt
from tests.helpers.endpoints import hear, request
from tests.helpers.faulty_server import Handler, Server, flood, half, hang, raw, reply


def test_circuit_opens_and_closes(server: Server) -> None:
    async def run() -> None:
        teacher = teacher_with_breaker(server)
        server.script = [*[raw(500, b"")] * 4, reply()]
        heard = [await hear(teacher) for _ in range(5)]
        assert heard == ["[status_500]"] * 3 + ["[circuit_open]"] * 2
        await asyncio.sleep(0.12)
        # The trial call fails: open again.
        assert [await hear(teacher) for _ in range(2)] == ["[status_500]", "[circuit_open]"]
        await asyncio.sleep(0.12)
        answers = await asyncio.gather(*(hear(teacher, i) for i in range(3)))
        # One trial at a time; it succeeds: closed.
        assert sorted(answers) == ["Check the sum.", "[circuit_open]", "[circuit_open]"]
        assert await hear(teacher) == "Check the sum."
        await teacher.aclose()

    asyncio.run(run())


def teacher_with_breaker(server: Server, **settings: Any) -> EndpointTeacher:
    defaults = {"max_retries": 0, "breaker_failures": 3, "breaker_pause_s": 0.1}
    return EndpointTeacher(server.url, model="m", prompt=TeacherPrompt(), **(defaults | settings))


@pytest.mark.parametrize(
    "fault",
    [
        *[raw(status, b"") for status in (400, 401, 404, 413, 422)],
        raw(200, b"garbage"),
        half,
        flood,
        reply("<think>on and on"),
    ],
)
def test_a_request_s_own_fault_opens_no_circuit(
    server: Server, fault: Callable[[Handler], None]
) -> None:
    """It shows that the server is alive, so faults before and behind it are not in a row."""

    async def run() -> list[str]:
        teacher = teacher_with_breaker(server, max_response_bytes=2**18)
        server.script = [
            raw(500, b""),
            raw(500, b""),
            *[fault] * 6,
            raw(500, b""),
            raw(500, b""),
            reply(),
        ]
        return [await hear(teacher) for _ in range(11)]

    assert asyncio.run(run())[-1] == "Check the sum."


@pytest.mark.parametrize("end", ["cancelled", "raised"])
def test_interrupted_trial_call_is_over(
    server: Server, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        teacher = teacher_with_breaker(server)
        server.script = [*[raw(500, b"")] * 3, *[hang] * (end == "cancelled"), reply()]
        assert [await hear(teacher) for _ in range(3)] == ["[status_500]"] * 3
        await asyncio.sleep(0.12)
        if end == "cancelled":
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(teacher.guide_in_time(request(), None), 0.1)
        else:
            with monkeypatch.context() as patch:
                patch.setattr(httpx.AsyncClient, "stream", lambda *_, **__: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    await teacher.guide_in_time(request(), None)
        assert await hear(teacher) == "Check the sum."

    asyncio.run(run())
