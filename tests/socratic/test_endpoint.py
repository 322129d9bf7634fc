"""The endpoint teacher against a real HTTP server on loopback that misbehaves on request."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from socpo_fast.socratic.teachers import EndpointTeacher, TeacherPrompt
from socpo_fast.types import Guidance, GuidanceRequest, RolloutKey
from tests.socratic.faulty_server import Handler, Server, close, drip, flood, half, hang, raw, reply, running_server

KEY = "sk-very-secret"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("SOCPO_TEST_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with running_server() as server:
        yield server


def request(rollout_idx: int = 0) -> GuidanceRequest:
    return GuidanceRequest(
        question="1 + 1?",
        student_answer="It is 3.",
        ground_truth=None,
        reference_solution=None,
        key=RolloutKey(0, 0),
        rollout_idx=rollout_idx,
        attempt_idx=0,
    )


def ask(
    server: Server,
    script: list[Callable[[Handler], None]],
    num_calls: int = 1,
    *,
    at_once: bool = False,
    **settings: Any,
) -> tuple[list[Guidance | None], EndpointTeacher]:
    """num_calls guidances, one after the other unless at_once, with limits that keep a test short."""
    server.script = script
    defaults = {"timeout_s": 0.3, "max_retries": 2, "backoff_s": 0.01, "api_key_env": "SOCPO_TEST_KEY"}

    async def run() -> tuple[list[Guidance | None], EndpointTeacher]:
        teacher = EndpointTeacher(server.url, model="m", prompt=TeacherPrompt(), **(defaults | settings))
        if at_once:
            answers = await asyncio.gather(*(teacher.guide(request(i)) for i in range(num_calls)))
        else:
            answers = [await teacher.guide(request(i)) for i in range(num_calls)]
        await teacher.aclose()
        return list(answers), teacher

    return asyncio.run(run())


def test_a_good_answer(server: Server) -> None:
    (guidance,), teacher = ask(server, [reply("<think>hm</think> Check the sum.\n")])
    assert guidance is not None
    assert guidance.text == "Check the sum."
    assert not teacher.failures
    (seen,) = server.seen
    assert seen["path"] == "/v1/chat/completions"
    assert seen["headers"]["Authorization"] == f"Bearer {KEY}"
    assert (seen["body"]["model"], seen["body"]["temperature"], seen["body"]["max_tokens"]) == ("m", 0.2, 1024)
    assert [message["role"] for message in seen["body"]["messages"]] == ["system", "user"]


@pytest.mark.parametrize(
    ("fault", "num_requests", "reason"),
    [
        (raw(500, b"oops"), 3, "status_500"),
        (raw(429, b""), 3, "status_429"),
        (raw(503, b"", {"Retry-After": "nonsense"}), 3, "status_503"),
        (raw(401, b"who are you"), 1, "status_401"),
        (raw(404, b""), 1, "status_404"),
        (raw(204, b""), 1, "status_204"),
        (hang, 3, "timeout"),
        (drip, 3, "timeout"),
        (close, 3, "connection"),
        (half, 3, "connection"),
        (flood, 1, "too_large"),
        (raw(200, b"\xff\xfe garbage"), 1, "garbage"),
        (raw(200, b"[" * 100_000), 1, "garbage"),
        (raw(200, b'{"choices": []}'), 1, "garbage"),
        (raw(200, b"[1]"), 1, "garbage"),
        (raw(200, b'{"choices": [{"message": {"content": "x"}}]}', {"Content-Length": "7"}), 1, "garbage"),
        (reply(["x"]), 1, "garbage"),
        (reply(None), 1, "empty"),
        (reply("  "), 1, "empty"),
        (reply("<think> on and on"), 1, "empty"),
    ],
)
def test_a_fault_costs_one_guidance(
    server: Server, fault: Callable[[Handler], None], num_requests: int, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    since = time.perf_counter()
    (guidance,), teacher = ask(server, [fault], max_response_bytes=2**18)
    assert guidance is None
    assert dict(teacher.failures) == {reason: 1}
    assert len(server.seen) == num_requests
    assert teacher.num_retries == num_requests - 1
    assert time.perf_counter() - since < 3 * 0.3 + 2.0
    assert KEY not in caplog.text


def test_a_fault_that_passes_is_retried(server: Server) -> None:
    (guidance,), teacher = ask(server, [raw(500, b""), close, reply()])
    assert guidance is not None
    assert (teacher.num_retries, dict(teacher.failures)) == (2, {})


def test_retry_after_is_obeyed(server: Server) -> None:
    since = time.perf_counter()
    (guidance,), _ = ask(server, [raw(429, b"", {"Retry-After": "1"}), reply()])
    assert guidance is not None
    assert time.perf_counter() - since >= 1.0


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_not_followed(server: Server, status: int) -> None:
    with running_server() as other:
        redirect = raw(status, b"", {"Location": f"{other.url}/chat/completions"})
        (guidance,), teacher = ask(server, [redirect])
    assert guidance is None
    assert dict(teacher.failures) == {"redirect": 1}
    assert other.seen == []


def test_nobody_listens(server: Server) -> None:
    closed = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    closed.server_close()
    server.server_address = closed.server_address
    (guidance,), teacher = ask(server, [reply()])
    assert guidance is None
    assert dict(teacher.failures) == {"connection": 1}


def test_calls_in_flight_are_capped(server: Server) -> None:
    answers, _ = ask(server, [reply(delay_s=0.03)], 12, at_once=True, max_concurrency=3, timeout_s=2.0)
    assert all(answers)
    assert 1 < server.most_in_flight <= 3


def test_one_bad_call_does_not_harm_its_neighbours(server: Server) -> None:
    answers, teacher = ask(server, [hang, reply()], 6, at_once=True, max_retries=0)
    assert sum(answer is None for answer in answers) == 1
    assert dict(teacher.failures) == {"timeout": 1}


def test_circuit_opens_and_closes(server: Server) -> None:
    async def run() -> EndpointTeacher:
        teacher = EndpointTeacher(
            server.url, model="m", prompt=TeacherPrompt(), max_retries=0, breaker_failures=3, breaker_pause_s=0.1
        )
        server.script = [*[raw(500, b"")] * 4, reply()]
        for _ in range(5):  # three reach the server, two are turned away
            assert await teacher.guide(request()) is None
        assert (len(server.seen), teacher.failures["circuit_open"]) == (3, 2)
        await asyncio.sleep(0.12)
        assert await teacher.guide(request()) is None  # the trial call fails: open again
        assert await teacher.guide(request()) is None
        assert (len(server.seen), teacher.failures["circuit_open"]) == (4, 3)
        await asyncio.sleep(0.12)
        answers = await asyncio.gather(*(teacher.guide(request(i)) for i in range(3)))
        assert sum(answer is not None for answer in answers) == 1  # one trial at a time; it succeeds: closed
        assert await teacher.guide(request()) is not None
        await teacher.aclose()
        return teacher

    assert asyncio.run(run()).failures["status_500"] == 4


def test_a_call_can_be_cancelled(server: Server) -> None:
    async def run() -> None:
        server.script = [hang, reply()]
        teacher = EndpointTeacher(server.url, model="m", prompt=TeacherPrompt(), max_concurrency=1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(teacher.guide(request()), 0.1)
        assert await teacher.guide(request()) is not None
        assert not teacher.failures
        await teacher.aclose()

    asyncio.run(run())


def test_urls() -> None:
    for url in ("ftp://h/v1", "http://", "h/v1", f"http://user:{KEY}@h/v1", "http://h:port"):
        with pytest.raises(ValueError, match="teacher.url must be") as error:
            EndpointTeacher(url, model="m", prompt=TeacherPrompt())
        assert KEY not in str(error.value)
    for url in ("http://h/v1", "http://h/v1/", "http://h/v1/chat/completions"):
        teacher = EndpointTeacher(url, model="m", prompt=TeacherPrompt())
        assert teacher._url == httpx.URL("http://h/v1/chat/completions")
