"""A server on loopback that answers huggingface_hub as the hub does, for one repository."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants

REPOSITORY = "owner/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(ThreadingHTTPServer):
    """Serves the files of a folder as REPOSITORY at `commit`; `fetched` lists those it sent.

    `refusal` is a status, and the hub's code for the reason, of every answer.
    """

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.commit = COMMIT
        self.fetched: set[str] = set()
        self.tokens: set[str | None] = set()
        self.refusal: tuple[int, str] | None = None


class Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET(with_body=False)

    def do_GET(self, *, with_body: bool = True) -> None:
        path = self.path.partition("?")[0]
        names = {
            str(file.relative_to(self.server.folder)): file
            for file in sorted(self.server.folder.rglob("*"))
            if file.is_file()
        }
        name = re.sub(f"^/{REPOSITORY}/resolve/[0-9a-f]{{40}}/", "", path)
        self.server.tokens.add(self.headers["Authorization"])
        if self.server.refusal is not None:
            status, code = self.server.refusal
            self.answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": "no"}, with_body)
        elif not path.startswith((f"/api/models/{REPOSITORY}/", f"/{REPOSITORY}/resolve/")):
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body)
        elif path.endswith("/revision/gone"):
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, with_body)
        elif "/revision/" in path:
            siblings = [{"rfilename": name} for name in names]
            revision = path.rpartition("/")[2]
            commit = revision if re.fullmatch("[0-9a-f]{40}", revision) else self.server.commit
            info = {"_id": "1", "id": REPOSITORY, "sha": commit, "siblings": siblings}
            self.answer(200, json.dumps(info).encode(), {}, with_body)
        elif "/tree/" in path:
            tree = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": etag(file)}
                for name, file in names.items()
            ]
            self.answer(200, json.dumps(tree).encode(), {}, with_body)
        else:
            self.server.fetched.add(name)
            file = names[name]
            headers = {"X-Repo-Commit": path.split("/")[4], "ETag": f'"{etag(file)}"'}
            self.answer(200, file.read_bytes(), headers, with_body)

    def answer(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def etag(file: Path) -> str:
    """Returns the name that git has for a file's content, which is the hub's ETag."""
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def fake_hub(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Runs a hub that has the folder, and directs huggingface_hub to it, with an empty cache."""
    monkeypatch.setattr("socpo_fast.model.hub._fetched", {})
    hub = FakeHub(folder)
    url = f"http://127.0.0.1:{hub.server_address[1]}"
    for name, value in {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(constants, name, value)
    Thread(target=hub.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
