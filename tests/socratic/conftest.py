"""Fixtures: a server that misbehaves for the endpoint teacher, a model folder for the local one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.endpoints import KEY
from tests.helpers.faulty_server import Server, running_server
from tests.helpers.local_teachers import save_teacher


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Yields a running server; its key is in SOCPO_TEST_KEY."""
    monkeypatch.setenv("SOCPO_TEST_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with running_server() as server:
        yield server


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a tiny random model with its tokenizer."""
    return save_teacher(tmp_path_factory.mktemp("teacher"))
