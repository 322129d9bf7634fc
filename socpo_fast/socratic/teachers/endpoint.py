"""A teacher behind an OpenAI-compatible server. Read guide, then _call, then _Breaker.

Whatever the server does (slow, down, garbage, a flood, a closed connection) costs at most the guidance asked for:
guide returns None after a bounded time, and `failures` counts why. The text it does return is still untrusted.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter
from email.utils import parsedate_to_datetime

import httpx

from socpo_fast.socratic.teachers.base import TeacherPrompt, clean_guidance
from socpo_fast.types import Guidance, GuidanceRequest

_RETRIED_STATUS = {408, 425, 429, 500, 502, 503, 504}
_MAX_BACKOFF_S = 30.0


class _Failure(Exception):
    """Why a call gave no guidance. retry_after_s: None when a repeat would not help, else the server's wish or 0."""

    def __init__(self, reason: str, retry_after_s: float | None = None):
        super().__init__(reason)
        self.reason, self.retry_after_s = reason, retry_after_s


class EndpointTeacher:
    """Guidance over `/chat/completions`, one pooled client for all calls; lives on one event loop.

    Args:
        url:                base URL, usually ending in /v1; redirects are not followed, to any host.
        model:              the name the server knows the model by.
        prompt:             the words it is asked in.
        api_key_env:        NAME of the environment variable that holds the key; None sends none. Never logged.
        temperature:        sampling temperature, >= 0.
        max_new_tokens:     teacher tokens of one message, at most.
        timeout_s:          time limit of one call from connect to the last byte, seconds.
        max_retries:        repeats after status 408, 425, 429 or 5xx, a time-out or a broken connection, >= 0.
        max_concurrency:    calls in flight; further ones wait.
        max_response_bytes: size of an answer at most.
        backoff_s:          the first wait before a repeat; doubled each time, jittered down by up to half. A longer
                            Retry-After is obeyed. At most 30 s.
        breaker_failures:   after this many failed calls in a row, calls fail at once ("circuit_open") ..
        breaker_pause_s:    .. for so long; then one call is let through, and its outcome closes or reopens the circuit.

    Attributes:
        failures:    Counter of why calls gave no guidance: timeout, connection, status_NNN, redirect, too_large,
                     garbage, empty, circuit_open.
        num_retries: repeats so far.

    Raises:
        ValueError: url is not an http(s) URL without a password in it, or the named variable is not set.
    """

    immediate = False

    def __init__(
        self,
        url: str,
        *,
        model: str,
        prompt: TeacherPrompt,
        api_key_env: str | None = None,
        temperature: float = 0.2,
        max_new_tokens: int = 1024,
        timeout_s: float = 60.0,
        max_retries: int = 2,
        max_concurrency: int = 16,
        max_response_bytes: int = 2**20,
        backoff_s: float = 0.5,
        breaker_failures: int = 5,
        breaker_pause_s: float = 30.0,
    ):
        self._url = _chat_url(url)
        # Compressed answers are not asked for: their size would be known only once they are unpacked.
        headers = {"Accept-Encoding": "identity"}
        if api_key_env is not None:
            key = os.environ.get(api_key_env, "").strip()
            if not key:
                raise ValueError(f"teacher.api_key_env must name a variable that is set, got {api_key_env}; export it")
            headers["Authorization"] = f"Bearer {key}"
        self._client = httpx.AsyncClient(
            headers=headers,
            timeout=timeout_s,
            limits=httpx.Limits(max_connections=max_concurrency, max_keepalive_connections=max_concurrency),
            follow_redirects=False,
        )
        self._prompt = prompt
        self._body = {"model": model, "temperature": temperature, "max_tokens": max_new_tokens, "stream": False}
        self._timeout_s, self._max_retries, self._backoff_s = timeout_s, max_retries, backoff_s
        self._max_response_bytes = max_response_bytes
        self._slots = asyncio.Semaphore(max_concurrency)
        self._breaker = _Breaker(breaker_failures, breaker_pause_s)
        self._jitter = random.Random()  # its own: waiting must not draw from a generator that a run is seeded with
        self.failures: Counter[str] = Counter()
        self.num_retries = 0

    async def guide(self, request: GuidanceRequest) -> Guidance | None:
        body = self._body | {"messages": self._prompt.messages(request)}
        async with self._slots:
            if not self._breaker.admits():
                self.failures["circuit_open"] += 1
                return None
            try:
                text = await self._call_with_retries(body)
            except _Failure as failure:
                self.failures[failure.reason] += 1
                self._breaker.record(ok=False)
                return None
            except asyncio.CancelledError:
                self._breaker.record(ok=None)
                raise
        self._breaker.record(ok=True)
        return Guidance(text=text)

    def step(self) -> bool:
        return False

    async def aclose(self) -> None:
        await self._client.aclose()

    async def _call_with_retries(self, body: dict[str, object]) -> str:
        for repeat in range(self._max_retries + 1):
            try:
                return await self._call(body)
            except _Failure as failure:
                if failure.retry_after_s is None or repeat == self._max_retries:
                    raise
                backoff_s = self._backoff_s * 2**repeat * self._jitter.uniform(0.5, 1.0)
                wait_s = min(max(backoff_s, failure.retry_after_s), _MAX_BACKOFF_S)
            self.num_retries += 1
            await asyncio.sleep(wait_s)
        raise AssertionError("the last repeat returns or raises")

    async def _call(self, body: dict[str, object]) -> str:
        payload = bytearray()
        try:
            async with asyncio.timeout(self._timeout_s):  # of the whole call; httpx's limits start anew at each byte
                async with self._client.stream("POST", self._url, json=body) as response:
                    _check_status(response)
                    async for chunk in response.aiter_raw():
                        payload += chunk
                        if len(payload) > self._max_response_bytes:
                            raise _Failure("too_large")
        except (TimeoutError, httpx.TimeoutException) as error:
            raise _Failure("timeout", 0.0) from error
        except httpx.TransportError as error:
            raise _Failure("connection", 0.0) from error
        return _message_text(payload)


class _Breaker:
    """Closed, open for a pause after too many failures in a row, then half open: one trial call decides."""

    def __init__(self, max_failures: int, pause_s: float):
        self._max_failures, self._pause_s = max_failures, pause_s
        self._failures_in_a_row = 0
        self._open_until: float | None = None  # monotonic seconds
        self._trial_running = False

    def admits(self) -> bool:
        if self._open_until is None:
            return True
        if self._trial_running or time.monotonic() < self._open_until:
            return False
        self._trial_running = True
        return True

    def record(self, *, ok: bool | None) -> None:
        """ok None: the call was given up by its caller and says nothing about the server."""
        self._trial_running = False
        if ok:
            self._failures_in_a_row, self._open_until = 0, None
        elif ok is False:
            self._failures_in_a_row += 1
            if self._failures_in_a_row >= self._max_failures:
                self._open_until = time.monotonic() + self._pause_s


def _chat_url(url: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url.rstrip("/"))
    except httpx.InvalidURL as error:
        raise ValueError(f"teacher.url must be an http or https URL ({error})") from error
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo:
        raise ValueError("teacher.url must be an http or https URL without a password; keys go to teacher.api_key_env")
    return parsed.copy_with(path=parsed.path.removesuffix("/chat/completions").rstrip("/") + "/chat/completions")


def _check_status(response: httpx.Response) -> None:
    status = response.status_code
    if status in _RETRIED_STATUS:
        raise _Failure(f"status_{status}", _retry_after_s(response.headers.get("Retry-After", "")))
    if status != 200:
        raise _Failure("redirect" if 300 <= status < 400 else f"status_{status}")


def _retry_after_s(value: str) -> float:
    """Retry-After is a number of seconds or a date; anything else asks for nothing."""
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _message_text(payload: bytearray) -> str:
    try:
        content = json.loads(payload)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise _Failure("garbage") from error
    if not isinstance(content, str):
        raise _Failure("garbage" if content is not None else "empty")
    text = clean_guidance(content)
    if text is None:
        raise _Failure("empty")
    return text
