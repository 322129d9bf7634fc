"""A server that misbehaves, for the endpoint teacher."""

from collections.abc import Iterator

import pytest

from tests.socratic.endpoints import KEY
from tests.socratic.faulty_server import Server, running_server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("SOCPO_TEST_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with running_server() as server:
        yield server
