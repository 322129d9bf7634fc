"""Asks a teacher behind an OpenAI-compatible server.

Read guide_in_time, then _call, then _Breaker. The server may be slow or down, send garbage or too
much, or close the connection. The damage is one guidance at most: after a bounded time
guide_in_time raises GuidanceFailed, which says why. The text of a good reply is still untrusted.

    guide_in_time     a slot -> the breaker lets it through -> the clock starts
      _call_with_retries     a failed call is repeated after a pause, if that may help
        _call                  one HTTP request, limited in time and size
    _message_text     the reply's message, without the model's thoughts
"""

import asyncio
import json
import os
import random
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import httpx

from socpo_fast.socratic.teachers.base import Teacher, TeacherPrompt, clean_guidance
from socpo_fast.types import Guidance, GuidanceFailed, GuidanceRequest

_RETRIED_STATUS = {408, 425, 429, 500, 502, 503, 504}
_MAX_BACKOFF_S = 30.0
# Hosts on this machine, which are never reached through a proxy.
_LOOPBACK = re.compile(r"localhost|127[.\d]+|::1")
# Variables of the shell that httpx reads; _client names those that are set in its error.
_SHELL = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")


class _Failure(GuidanceFailed):
    """A call that failed.

    retry_after_s: the pause that the server asks for, or 0; None if a repeat would not help.
    is_servers:    whether the server is at fault (down, slow, overloaded), not this request.
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
    """A teacher over `/chat/completions`. One pooled client makes all calls of an event loop.

    Args:
        url:                base URL, usually ending in /v1. Redirects are never followed.
        model:              the server's name of the model.
        prompt:             makes the messages of a request.
        api_key_env:        NAME of the environment variable that holds the key; None sends no key.
                            The key is never logged.
        temperature:        sampling temperature, >= 0.
        max_new_tokens:     most tokens of one message.
        keep_cut:           whether a message that ends at max_new_tokens is guidance. It may be
                            nothing but thoughts whose opening mark was in the prompt.
        extra_body:         more fields of the request. They may replace those above, except
                            messages; the value "none" leaves a field out.
        timeout_s:          time limit of one call from connect to the last byte, seconds.
        max_retries:        repeats after status 408, 425, 429 or 5xx, a time-out or a broken
                            connection, >= 0.
        max_concurrency:    most calls in flight, on each event loop. Further ones wait in a queue;
                            that wait counts against no time limit.
        max_response_bytes: most bytes of a reply.
        backoff_s:          pause before the first repeat. It doubles each time, and is shortened by
                            a random part of up to half. A longer Retry-After in seconds is obeyed.
                            The pause is at most 30 s.
        breaker_failures:   after so many calls in a row that failed by the server's fault, calls
                            fail at once ("circuit_open") for breaker_pause_s.
        breaker_pause_s:    after this pause one call is let through. It decides whether calls go
                            through again or the pause starts again.

    Raises:
        ValueError: url is not an http(s) URL or holds a password, the named variable is not set, or
            the shell's proxy and TLS variables do not suit an HTTP client.
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
        # No compressed replies: their size would be known only once they are unpacked.
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
        self._new_client = partial(
            _client,
            self._url,
            headers=headers,
            timeout=timeout_s,
            limits=httpx.Limits(
                max_connections=max_concurrency, max_keepalive_connections=max_concurrency
            ),
        )
        self._new_client()  # what the shell has set wrongly is told now
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
        self._max_concurrency = max_concurrency
        # Connections and the queue for a slot belong to the event loop that uses them first.
        self._pools: dict[
            asyncio.AbstractEventLoop, tuple[httpx.AsyncClient, asyncio.Semaphore]
        ] = {}
        self._breaker = _Breaker(breaker_failures, breaker_pause_s)
        self._jitter = random.SystemRandom()  # leaves the run's seeded generators alone

    async def guide_in_time(self, request: GuidanceRequest, timeout_s: float | None) -> Guidance:
        # In this order: neither the wait for a slot nor a refusal by the breaker uses up time.
        try:
            async with self._pool()[1], self._breaker.watch(), asyncio.timeout(timeout_s):
                payload = await self._call_with_retries(
                    self._body | {"messages": self._prompt.messages(request)}
                )
            return Guidance(text=_message_text(payload, keep_cut=self._keep_cut))
        except GuidanceFailed as failure:
            raise GuidanceFailed(failure.kind, self._public(str(failure))) from None

    def _public(self, reason: str) -> str:
        """Returns a reason for the user: one line, without the key, which some servers repeat."""
        # The key may come back as it is, or escaped in JSON in one of two ways.
        line = "".join(letter for letter in " ".join(reason.split()) if letter.isprintable())
        for spelling in {self._key, json.dumps(self._key)[1:-1], self._key.replace("/", "\\/")} - {
            ""
        }:
            line = line.replace(spelling, "[...]")
        return line[:300]

    async def aclose(self) -> None:
        """Closes the connections of this event loop."""
        if pool := self._pools.pop(asyncio.get_running_loop(), None):
            await pool[0].aclose()

    def _pool(self) -> tuple[httpx.AsyncClient, asyncio.Semaphore]:
        """Returns the client and the slots of the running event loop; its first call makes them."""
        loop = asyncio.get_running_loop()
        if loop not in self._pools:
            # What closed loops have left can only be dropped.
            for closed in [other for other in list(self._pools) if other.is_closed()]:
                self._pools.pop(closed, None)
            self._pools[loop] = (self._new_client(), asyncio.Semaphore(self._max_concurrency))
        return self._pools[loop]

    async def _call_with_retries(self, body: dict[str, object]) -> bytearray:
        """Returns the reply of the first call that succeeds; raises the failure of the last one."""
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
        """Returns the bytes of a reply with status 200; raises _Failure for anything else."""
        payload = bytearray()
        is_answered = False
        try:
            # A limit of the whole call: those of httpx start anew with each byte.
            async with asyncio.timeout(self._timeout_s):
                async with self._pool()[0].stream("POST", self._url, json=body) as response:
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
        # A reply that breaks off after status 200 may be due to this request, so it does not count
        # as the server's fault.
        except httpx.TransportError as error:
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
    """A circuit breaker: it stops calls to a server that fails again and again.

    closed ---- max_failures calls in a row fail ----> open: calls fail at once
      ^                                                 |  ^
      |                                   after pause_s |  | the trial fails
      |                                                 v  |
      +---------------- the trial succeeds ---------- one trial call
    """

    def __init__(self, max_failures: int, pause_s: float):
        self._max_failures = max_failures
        self._pause_s = pause_s
        self._failures_in_a_row = 0
        self._open_until = 0.0  # monotonic seconds, while there are max_failures in a row
        self._trial_running = False

    @asynccontextmanager
    async def watch(self) -> AsyncIterator[None]:
        """Lets one call through, and counts it by what it shows of the server.

        A failure by the server's fault, or a time-out, counts. A reply, even one that refuses the
        request, resets the count. Other errors change nothing.
        """
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
    """Returns the failure that a status other than 200 stands for."""
    status = response.status_code
    kind = "redirect" if 300 <= status < 400 else f"status_{status}"
    reason = f"status {status}: {payload.decode('utf-8', 'replace')}"
    if status not in _RETRIED_STATUS:
        return _Failure(kind, reason)
    # Retry-After may also be a date; that is not read.
    retry_after = response.headers.get("Retry-After", "")
    retry_after_s = float(retry_after) if retry_after.isascii() and retry_after.isdigit() else 0.0
    return _Failure(kind, reason, retry_after_s, is_servers=True)


def _client(url: httpx.URL, **options: Any) -> httpx.AsyncClient:
    """Returns an HTTP client without cookies, and without a proxy if the server is local."""
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
    """Returns the URL of the chat completions. Errors do not repeat it: it may hold a password."""
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
    """Returns the message of a chat completion, without the model's thoughts."""
    try:
        choice = json.loads(payload)["choices"][0]
        message = choice["message"]
        content = message["content"]
        is_cut = choice.get("finish_reason") in ("length", "max_tokens")
        # Some servers send the content as a list of parts.
        if isinstance(content, list):
            content = "".join(part["text"] for part in content if part["type"] == "text")
        thinks_apart = any(message.get(name) for name in ("reasoning_content", "reasoning"))
        if not isinstance(content, str | None):
            raise TypeError("content must be text")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise GuidanceFailed(
            "not_json", f"the reply is no chat completion: {payload.decode('utf-8', 'replace')}"
        ) from error
    # A message that was cut may end inside thoughts whose opening mark was in the prompt. Such a
    # message is no guidance, unless keep_cut is set or the server sends thoughts in another field.
    in_thoughts = is_cut and not (content and (keep_cut or thinks_apart))
    return clean_guidance(content or "", in_thoughts=in_thoughts)
