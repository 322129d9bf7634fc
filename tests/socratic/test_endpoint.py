"""The endpoint teacher against a real HTTP server on loopback that misbehaves on request."""

import asyncio
import json
import logging
import time
import traceback
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from typing import Any

import pytest

from socpo_fast.socratic.teachers import EndpointTeacher, TeacherPrompt
from socpo_fast.types import Guidance, GuidanceFailed
from tests.helpers.endpoints import KEY, ask, hear, request
from tests.helpers.faulty_server import (
    Handler,
    Server,
    close,
    drip,
    flood,
    half,
    hang,
    raw,
    reply,
    running_server,
)


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def test_a_good_answer(server: Server) -> None:
    guidance = ask(server, [reply("<think>hm</think> Check the sum.\n")])
    assert guidance == ["Check the sum."]
    (http_request,) = server.seen
    assert http_request["path"] == "/v1/chat/completions"
    assert http_request["headers"]["Authorization"] == f"Bearer {KEY}"
    body = http_request["body"]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.2, 1024)
    assert [message["role"] for message in body["messages"]] == ["system", "user"]


def test_fields_of_the_request_are_settings(server: Server) -> None:
    extra = {
        "temperature": "none",
        "max_tokens": "none",
        "max_completion_tokens": 9,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    ask(server, [reply()], extra_body=extra)
    ((body),) = (http_request["body"] for http_request in server.seen)
    assert body.keys() == {
        "model",
        "stream",
        "messages",
        "max_completion_tokens",
        "chat_template_kwargs",
    }
    assert body["chat_template_kwargs"] == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("message", "finish_reason", "keep_cut", "expected"),
    [
        ({"content": [text_part("Look "), text_part("up.")]}, "stop", False, "Look up."),
        ({"content": [{"type": "thinking"}, text_part("Look.")]}, "stop", False, "Look."),
        ({"content": "Look.", "reasoning_content": "It is 2."}, "stop", False, "Look."),
        ({"content": "Look up", "reasoning_content": "It is 2."}, "length", False, "Look up"),
        ({"content": None, "reasoning_content": "It is 2, so I"}, "length", True, "[cut]"),
        ({"content": "", "reasoning": "It is 2, so I"}, "length", False, "[cut]"),
        ({"content": "Okay, the answer is 2, and"}, "length", False, "[cut]"),
        ({"content": "Okay, the answer is 2, and"}, "length", True, "Okay, the answer is 2, and"),
        ({"content": "It is 2.</think>Look up the"}, "length", False, "Look up the"),
        ({"content": "<thinking>It is 2, so"}, "stop", True, "[cut]"),
        ({"content": [{"text": "no type"}]}, "stop", False, "[not_json]"),
    ],
)  # fmt: skip
def test_thoughts_are_not_guidance(
    server: Server, message: dict[str, Any], finish_reason: str, keep_cut: bool, expected: str
) -> None:
    payload = {"choices": [{"message": message, "finish_reason": finish_reason}]}
    answer = raw(200, json.dumps(payload).encode())
    assert ask(server, [answer], keep_cut=keep_cut) == [expected]


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
        (raw(200, b"\xff\xfe garbage"), 1, "not_json"),
        (raw(200, b"[" * 100_000), 1, "not_json"),
        (raw(200, b'{"choices": []}'), 1, "not_json"),
        (raw(200, b"[1]"), 1, "not_json"),
        (
            raw(200, b'{"choices": [{"message": {"content": "x"}}]}', {"Content-Length": "7"}),
            1,
            "not_json",
        ),
        (reply(["x"]), 1, "not_json"),
        (reply(None), 1, "none"),
        (reply("  "), 1, "none"),
        (reply("<think> on and on"), 1, "cut"),
    ],
)
def test_a_fault_costs_one_guidance(
    server: Server,
    fault: Callable[[Handler], None],
    num_requests: int,
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    started = time.perf_counter()
    guidance = ask(server, [fault], max_response_bytes=2**18)
    assert guidance == [f"[{reason}]"]
    assert len(server.seen) == num_requests
    assert time.perf_counter() - started < 3 * 0.3 + 2.0
    assert KEY not in caplog.text


def test_a_fault_that_passes_is_retried(server: Server) -> None:
    assert ask(server, [raw(500, b""), close, reply()]) == ["Check the sum."]
    assert len(server.seen) == 3


def test_retry_after_is_obeyed(server: Server) -> None:
    started = time.perf_counter()
    assert ask(server, [raw(429, b"", {"Retry-After": "1"}), reply()]) == ["Check the sum."]
    assert time.perf_counter() - started >= 1.0


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_not_followed(server: Server, status: int) -> None:
    with running_server() as other:
        redirect = raw(status, b"", {"Location": f"{other.url}/chat/completions"})
        assert ask(server, [redirect]) == ["[redirect]"]
    assert other.seen == []


def test_refused_connection_is_a_failure(server: Server) -> None:
    closed = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    closed.server_close()
    server.server_address = closed.server_address
    assert ask(server, [reply()]) == ["[connection]"]


def test_calls_in_flight_are_capped(server: Server) -> None:
    answers = ask(server, [reply(delay_s=0.03)], 12, at_once=True, max_concurrency=3, timeout_s=2.0)
    assert answers == ["Check the sum."] * 12
    assert 1 < server.most_in_flight <= 3


def test_one_bad_call_does_not_harm_its_neighbours(server: Server) -> None:
    answers = ask(server, [hang, reply()], 6, at_once=True, max_retries=0)
    assert sorted(answers) == ["Check the sum."] * 5 + ["[timeout]"]


def test_the_reason_names_status_and_words_but_no_key(server: Server) -> None:
    async def run() -> None:
        server.script = [raw(404, f"no model m\nfor {KEY}".encode())]
        teacher = EndpointTeacher(
            server.url, model="m", prompt=TeacherPrompt(), api_key_env="SOCPO_TEST_KEY"
        )
        with pytest.raises(GuidanceFailed, match=r"^status 404: no model m for \[\.\.\.\]$"):
            await teacher.guide_in_time(request(), None)

    asyncio.run(run())


def echo_badly(handler: Handler) -> None:
    """Sends a header line without a colon, which the client quotes in its error."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nAuthorization " + KEY.encode() + b"\r\n\r\n")
    handler.close_connection = True


@pytest.mark.parametrize(
    "fault",
    [
        raw(200, f"Authorization: Bearer {KEY}".encode()),
        raw(401, b"x" * 290 + KEY.encode()),
        raw(500, b"x" * 194 + KEY.encode()),
        echo_badly,
    ],
)
def test_failure_reason_never_shows_the_key(
    server: Server, fault: Callable[[Handler], None]
) -> None:
    async def run() -> str:
        server.script = [fault]
        prompt = TeacherPrompt()
        env = "SOCPO_TEST_KEY"
        teacher = EndpointTeacher(
            server.url, model="m", prompt=prompt, api_key_env=env, max_retries=0
        )
        with pytest.raises(GuidanceFailed) as failed:
            await teacher.guide_in_time(request(), 5)
        return str(failed.value)

    assert KEY[:6] not in (reason := asyncio.run(run()))
    assert len(reason) <= 300


def test_a_reason_is_one_printable_line(server: Server) -> None:
    async def run() -> str:
        server.script = [raw(404, b"\x1b[2J\x07gone\r\nthere")]
        teacher = EndpointTeacher(server.url, model="m", prompt=TeacherPrompt())
        with pytest.raises(GuidanceFailed) as failed:
            await teacher.guide_in_time(request(), 5)
        return str(failed.value)

    assert asyncio.run(run()) == "status 404: [2Jgone there"


@pytest.mark.parametrize(
    "reply_text",
    ["sk/ab\u200b+c-SECRET", "sk\\/ab+c-SECRET", "no key provided", "x" * 290 + "sk/ab+c-SECRET"],
)
def test_a_key_is_hidden_however_it_is_spelled(
    reply_text: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOCPO_TEST_KEY", "sk/ab+c-SECRET")

    async def run() -> GuidanceFailed:
        server.script = [raw(404, reply_text.encode())]
        teacher = EndpointTeacher(
            server.url, model="m", prompt=TeacherPrompt(), api_key_env="SOCPO_TEST_KEY"
        )
        with pytest.raises(GuidanceFailed) as failed:
            await teacher.guide_in_time(request(), 5)
        return failed.value

    failure = asyncio.run(run())
    assert "SECRET" not in "".join(traceback.format_exception(failure))
    assert ("no key provided" in str(failure)) == (reply_text == "no key provided")


@pytest.mark.parametrize("key", ["sk-\nsecond", "sk-\u2019", "sk-\x7f"])
def test_key_invalid_in_a_header_is_refused_unseen(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOCPO_TEST_KEY", key)
    with pytest.raises(ValueError, match="teacher.api_key_env must name a variable") as refused:
        EndpointTeacher("http://h", model="m", prompt=TeacherPrompt(), api_key_env="SOCPO_TEST_KEY")
    assert "sk-" not in str(refused.value)


def test_queueing_does_not_count_as_timeout(server: Server) -> None:
    """The timeout of one guidance is longer than a call, but shorter than the whole queue."""

    async def run() -> list[Guidance]:
        server.script = [reply(delay_s=0.1)]
        teacher = EndpointTeacher(server.url, model="m", prompt=TeacherPrompt(), max_concurrency=2)
        calls = (teacher.guide_in_time(request(i), 0.6) for i in range(16))
        return await asyncio.gather(*calls)

    assert len(asyncio.run(run())) == 16


def test_guidance_timeout_includes_retries(server: Server) -> None:
    """Retries and their pauses count; the TimeoutError is no further fault for the breaker."""

    async def run() -> None:
        server.script = [raw(503, b"", {"Retry-After": "9"}), hang]
        teacher = EndpointTeacher(server.url, model="m", prompt=TeacherPrompt(), timeout_s=5)
        started = time.perf_counter()
        with pytest.raises(TimeoutError):
            await teacher.guide_in_time(request(), 0.3)
        assert time.perf_counter() - started < 3

    asyncio.run(run())


def test_a_call_can_be_cancelled(server: Server) -> None:
    async def run() -> None:
        server.script = [hang, reply()]
        teacher = EndpointTeacher(server.url, model="m", prompt=TeacherPrompt(), max_concurrency=1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(teacher.guide_in_time(request(), None), 0.1)
        assert await hear(teacher) == "Check the sum."
        await teacher.aclose()

    asyncio.run(run())
