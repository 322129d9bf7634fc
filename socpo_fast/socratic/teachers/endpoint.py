"""A teacher behind an OpenAI-compatible server. Read guide_in_time, then _call, then _Breaker.

Whatever the server does (slow, down, garbage, a flood, a closed connection) costs at most the
guidance asked for: after a bounded time guide raises GuidanceFailed, which says why. The text it
does return is still untrusted.
"""

import asyncio
import json
import os
import random
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import httpx

from socpo_fast.socratic.teachers.base import Teacher, TeacherPrompt, clean_guidance
from socpo_fast.types import Guidance, GuidanceFailed, GuidanceRequest

_RETRIED_STATUS = {408, 425, 429, 500, 502, 503, 504}
_MAX_BACKOFF_S = 30.0
_LOOPBACK = re.compile(r"localhost|127[.\d]+|::1")
_SHELL = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")


class _Failure(GuidanceFailed):
    """retry_after_s: None when a repeat would not help, else the server's wish or 0.

    is_servers: the server is down, slow or overloaded, whatever it is asked.
    """

    def __init__(
        self,
        kind: str,
        reason: str,
        retry_after_s: float | None = None,
        is_servers: bool = False,
    ):
        super().__init__(kind, reason)
        self.retry_after_s = retry_after_s
        self.is_servers = is_servers


class EndpointTeacher(Teacher):
    """Guidance over `/chat/completions`, one pooled client for all calls; lives on one event loop.

    Args:
        url:                base URL, usually ending in /v1; redirects are not followed, to any
                            host.
        model:              the name the server knows the model by.
        prompt:             the words it is asked in.
        api_key_env:        NAME of the environment variable that holds the key; None sends none.
                            Never logged.
        temperature:        sampling temperature, >= 0.
        max_new_tokens:     teacher tokens of one message, at most.
        keep_cut:           a message that ends at max_new_tokens is guidance, though it may be
                            nothing but thoughts whose mark stood in the prompt.
        extra_body:         fields of the request beside these or in place of them, but for
                            messages; "none" leaves one out.
        timeout_s:          time limit of one call from connect to the last byte, seconds.
        max_retries:        repeats after status 408, 425, 429 or 5xx, a time-out or a broken
                            connection, >= 0.
        max_concurrency:    calls in flight; further ones wait in line, which no clock counts.
        max_response_bytes: size of an answer at most.
        backoff_s:          the first wait before a repeat; doubled each time, jittered down by up
                            to half. A longer Retry-After, in seconds, is obeyed. At most 30 s.
        breaker_failures:   after this many calls in a row in which the server was at fault, calls
                            fail at once ("circuit_open") ..
        breaker_pause_s:    .. for so long; then one call is let through, and its outcome closes or
                            reopens the circuit.

    Raises:
        ValueError: url is not an http(s) URL without a password in it, the named variable is not
            set, or the shell's proxy and TLS variables do not suit an HTTP client.
    """

    is_remote = True

    def __init__(
        self,
        url: str,
        *,
        model: str,
        prompt: TeacherPrompt,
        api_key_env: str | None = None,
        temperature: float = 0.2,
        max_new_tokens: int = 1024,
        keep_cut: bool = False,
        extra_body: Mapping[str, Any] | None = None,
        timeout_s: float = 60.0,
        max_retries: int = 2,
        max_concurrency: int = 16,
        max_response_bytes: int = 2**20,
        backoff_s: float = 0.5,
        breaker_failures: int = 5,
        breaker_pause_s: float = 30.0,
    ):
        self._url = _chat_url(url)
        # Compressed answers are not asked for: their size would be known only once unpacked.
        headers = {"Accept-Encoding": "identity"}
        self._key = ""
        if api_key_env is not None:
            self._key = os.environ.get(api_key_env, "").strip()
            if not self._key or not (self._key.isascii() and self._key.isprintable()):
                raise ValueError(
                    "teacher.api_key_env must name a variable that is set, got one that is not, "
                    "or to "
                    "more than ASCII (not shown here, as it may be a pasted key); export it"
                )
            headers["Authorization"] = f"Bearer {self._key}"
        self._client = _client(
            self._url,
            headers=headers,
            timeout=timeout_s,
            limits=httpx.Limits(
                max_connections=max_concurrency, max_keepalive_connections=max_concurrency
            ),
        )
        self._prompt = prompt
        fields = {
            "model": model,
            "temperature": temperature,
            "max_tokens": max_new_tokens,
            "stream": False,
            **(extra_body or {}),
        }
        self._body = {key: field for key, field in fields.items() if field not in (None, "none")}
        self._keep_cut = keep_cut
        self._timeout_s = timeout_s
        self._max_retries = max_retries
        self._backoff_s = backoff_s
        self._max_response_bytes = max_response_bytes
        self._slots = asyncio.Semaphore(max_concurrency)
        self._breaker = _Breaker(breaker_failures, breaker_pause_s)
        self._jitter = random.SystemRandom()  # not a generator that a run is seeded with

    async def guide_in_time(self, request: GuidanceRequest, timeout_s: float | None) -> Guidance:
        try:
            async with self._slots, self._breaker.watch(), asyncio.timeout(timeout_s):
                payload = await self._call_with_retries(
                    self._body | {"messages": self._prompt.messages(request)}
                )
            return Guidance(text=_message_text(payload, keep_cut=self._keep_cut))
        except GuidanceFailed as failure:
            raise GuidanceFailed(failure.kind, self._public(str(failure))) from None

    def _public(self, reason: str) -> str:
        """A reason for people: one line, without the key, which some servers repeat."""
        line = "".join(letter for letter in " ".join(reason.split()) if letter.isprintable())
        for spelling in {self._key, json.dumps(self._key)[1:-1], self._key.replace("/", "\\/")} - {
            ""
        }:
            line = line.replace(spelling, "[...]")
        return line[:300]

    async def aclose(self) -> None:
        await self._client.aclose()

    async def _call_with_retries(self, body: dict[str, object]) -> bytearray:
        for repeat in range(self._max_retries + 1):
            try:
                return await self._call(body)
            except _Failure as failure:
                if failure.retry_after_s is None or repeat == self._max_retries:
                    raise
                backoff_s = self._backoff_s * 2**repeat * self._jitter.uniform(0.5, 1.0)
                wait_s = min(max(backoff_s, failure.retry_after_s), _MAX_BACKOFF_S)
            await asyncio.sleep(wait_s)
        raise AssertionError("the last repeat returns or raises")

    async def _call(self, body: dict[str, object]) -> bytearray:
        payload = bytearray()
        is_answered = False
        try:
            # Of the whole call; httpx's limits start anew at each byte.
            async with asyncio.timeout(self._timeout_s):
                async with self._client.stream("POST", self._url, json=body) as response:
                    is_answered = response.status_code == 200
                    async for chunk in response.aiter_raw():
                        payload += chunk
                        if len(payload) > self._max_response_bytes:
                            raise _Failure(
                                "too_large",
                                f"the reply is longer than {self._max_response_bytes} bytes",
                            )
        except (TimeoutError, httpx.TimeoutException) as error:
            raise _Failure(
                "timeout",
                f"no reply within teacher.timeout_s {self._timeout_s:g}",
                0.0,
                is_servers=True,
            ) from error
        except httpx.TransportError as error:  # a reply that breaks off may be its request's fault
            raise _Failure(
                "connection",
                f"{type(error).__name__} {error}".strip(),
                0.0,
                is_servers=not is_answered,
            ) from error
        if not is_answered:
            raise _refusal(response, payload)
        return payload


class _Breaker:
    """Closed; open for a pause after too many failures in a row; then a trial call decides."""

    def __init__(self, max_failures: int, pause_s: float):
        self._max_failures = max_failures
        self._pause_s = pause_s
        self._failures_in_a_row = 0
        self._open_until = 0.0  # monotonic seconds, while there are max_failures in a row
        self._trial_running = False

    @asynccontextmanager
    async def watch(self) -> AsyncIterator[None]:
        """One call. It counts for what it says of the server: at fault, there, or nothing."""
        is_trial = self._failures_in_a_row >= self._max_failures
        if is_trial and (self._trial_running or time.monotonic() < self._open_until):
            raise GuidanceFailed(
                "circuit_open",
                "the server failed several times in a row and is left alone for a while",
            )
        self._trial_running |= is_trial
        try:
            yield
            self._failures_in_a_row = 0
        except (_Failure, TimeoutError) as failure:
            if isinstance(failure, _Failure) and not failure.is_servers:
                self._failures_in_a_row = 0
            else:
                self._failures_in_a_row += 1
                self._open_until = time.monotonic() + self._pause_s
            raise
        finally:
            if is_trial:
                self._trial_running = False


def _refusal(response: httpx.Response, payload: bytearray) -> _Failure:
    """Why a reply is no answer, by its status."""
    status = response.status_code
    kind = "redirect" if 300 <= status < 400 else f"status_{status}"
    reason = f"status {status}: {payload.decode('utf-8', 'replace')}"
    if status not in _RETRIED_STATUS:
        return _Failure(kind, reason)
    wish = response.headers.get("Retry-After", "")
    wish_s = float(wish) if wish.isascii() and wish.isdigit() else 0.0
    return _Failure(kind, reason, wish_s, is_servers=True)


def _client(url: httpx.URL, **options: Any) -> httpx.AsyncClient:
    """A client without cookies; loopback is never proxied."""
    try:
        return httpx.AsyncClient(
            verify=httpx.create_ssl_context() if url.scheme == "https" else False,
            trust_env=not _LOOPBACK.fullmatch(url.host),
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            follow_redirects=False,
            **options,
        )
    except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
        names = [name for name in _SHELL if os.environ.get(name) or os.environ.get(name.lower())]
        raise ValueError(
            f"teacher.url: the shell's {', '.join(names) or 'settings'} must suit an HTTP client, "
            f"got {type(error).__name__}; unset or mend what is wrong"
        ) from error


def _chat_url(url: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url.rstrip("/"))
    except httpx.InvalidURL as error:
        raise ValueError("teacher.url must be an http or https URL, got another") from error
    is_web = parsed.scheme in ("http", "https") and parsed.host
    if not is_web or parsed.userinfo or parsed.query or parsed.fragment:
        raise ValueError(
            "teacher.url must be an http or https URL without password or ?query, got another; "
            "keys go to teacher.api_key_env"
        )
    path = parsed.path.removesuffix("/chat/completions").rstrip("/") + "/chat/completions"
    return parsed.copy_with(path=path)


def _message_text(payload: bytearray, *, keep_cut: bool) -> str:
    """The message of a chat completion, whole or in parts, without the model's thoughts."""
    try:
        choice = json.loads(payload)["choices"][0]
        message = choice["message"]
        content = message["content"]
        is_cut = choice.get("finish_reason") in ("length", "max_tokens")
        if isinstance(content, list):
            content = "".join(part["text"] for part in content if part["type"] == "text")
        thinks_apart = any(message.get(name) for name in ("reasoning_content", "reasoning"))
        if not isinstance(content, str | None):
            raise TypeError("content must be text")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise GuidanceFailed(
            "not_json", f"the reply is no chat completion: {payload.decode('utf-8', 'replace')}"
        ) from error
    # Behind a cut that may lie in thoughts whose mark stood in the prompt, nothing is guidance.
    in_thoughts = is_cut and not (content and (keep_cut or thinks_apart))
    return clean_guidance(content or "", in_thoughts=in_thoughts)
