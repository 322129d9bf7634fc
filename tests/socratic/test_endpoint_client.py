"""What an endpoint teacher takes from its URL, the shell and the server, and what it hides."""

import asyncio
import json

import pytest

from socpo_fast.socratic.teachers import EndpointTeacher, TeacherPrompt
from tests.helpers.endpoints import KEY, ask, hear
from tests.helpers.faulty_server import Server, raw, reply


def test_cookies_are_not_kept(server: Server) -> None:
    payload = json.dumps({"choices": [{"message": {"content": "Look."}}]}).encode()
    ask(server, [raw(200, payload, {"Set-Cookie": "who=me; Path=/"})], 2)
    assert [http_request["headers"].get("Cookie") for http_request in server.seen] == [None, None]


def test_url_forms_are_equal_or_refused(server: Server) -> None:
    """The URL may end in /, or in the path that is added to it; secrets in a URL are refused."""
    secrets = (f"http://user:{KEY}@h/v1", f"http://h/v1?key={KEY}", f"http://h/v1#{KEY}")
    for url in ("ftp://h/v1", "http://", "h/v1", *secrets, f"http://h:{KEY}"):
        with pytest.raises(ValueError, match="teacher.url must be") as error:
            EndpointTeacher(url, model="m", prompt=TeacherPrompt())
        assert KEY not in str(error.value)
    for suffix in ("", "/", "/chat/completions"):
        teacher = EndpointTeacher(server.url + suffix, model="m", prompt=TeacherPrompt())
        assert asyncio.run(hear(teacher)) == "Check the sum."
    assert [request["path"] for request in server.seen] == ["/v1/chat/completions"] * 3


BAD_SHELL = [
    {"ALL_PROXY": "socks5://127.0.0.1:9"},
    {"NO_PROXY": "127.0.0.1,fd00::/8", "HTTP_PROXY": "http://127.0.0.1:9"},
    {"HTTP_PROXY": "nonsense://["},
]


@pytest.mark.parametrize("shell", [*BAD_SHELL, {"HTTP_PROXY": "http://127.0.0.1:9"}])
def test_loopback_is_never_proxied(
    server: Server, shell: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_PROXY")
    for name, value in {"SSL_CERT_FILE": "/no/such.pem", **shell}.items():
        monkeypatch.setenv(name, value)
    assert ask(server, [reply()]) == ["Check the sum."]


@pytest.mark.parametrize("shell", [*BAD_SHELL, {"SSL_CERT_FILE": "/no/such.pem"}])
def test_bad_shell_settings_are_refused(
    shell: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in shell.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError, match="teacher.url: the shell's .* must suit an HTTP client"
    ) as refused:
        EndpointTeacher("https://teacher.invalid/v1", model="m", prompt=TeacherPrompt())
    assert all(name in str(refused.value) for name in shell)


def test_a_key_in_place_of_its_variable_is_not_shown() -> None:
    with pytest.raises(ValueError, match="teacher.api_key_env must name a variable") as refused:
        EndpointTeacher("http://h/v1", model="m", prompt=TeacherPrompt(), api_key_env="SK_SECRET_1")
    assert "SK_SECRET_1" not in str(refused.value)
