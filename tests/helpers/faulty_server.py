"""An OpenAI-compatible server on loopback that misbehaves as its script says."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """A server that answers call n with script[n], and all calls beyond it with the last entry.

    It records the requests in `seen`, and how many were in flight at once.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Callable[[Handler], None]] = [reply()]
        self.seen: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.in_flight = self.most_in_flight = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            act = self.server.script[min(len(self.server.seen), len(self.server.script) - 1)]
            self.server.seen.append(
                {"path": self.path, "headers": dict(self.headers), "body": body}
            )
            self.server.in_flight += 1
            self.server.most_in_flight = max(self.server.most_in_flight, self.server.in_flight)
        try:
            act(self)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with self.server.lock:
                self.server.in_flight -= 1

    def log_message(self, *args: object) -> None:
        pass


def raw(
    status: int, payload: bytes, headers: dict[str, str] | None = None
) -> Callable[[Handler], None]:
    """Returns an entry of the script: a response with this status, body and headers."""

    def act(handler: Handler) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(payload)), **(headers or {})}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(payload)

    return act


def reply(content: Any = "Check the sum.", delay_s: float = 0.0) -> Callable[[Handler], None]:
    """Returns an entry of the script: a chat completion with this content, after a delay."""
    answer = raw(
        200,
        json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode(),
    )

    def act(handler: Handler) -> None:
        time.sleep(delay_s)
        answer(handler)

    return act


def drip(handler: Handler) -> None:
    """Sends one byte at a time without end, so that no single read is ever late."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    while not handler.server.stop.wait(0.02):
        handler.wfile.write(b" ")
        handler.wfile.flush()


def hang(handler: Handler) -> None:
    """Sends nothing at all for ten seconds, or until the server stops."""
    handler.server.stop.wait(10)


def flood(handler: Handler) -> None:
    """Sends a body without end, in chunks."""
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    while not handler.server.stop.is_set():
        handler.wfile.write(chunk)


def close(handler: Handler) -> None:
    """Closes the connection without an answer."""
    handler.close_connection = True


def half(handler: Handler) -> None:
    """Announces 1000 bytes, sends ten of them and closes the connection."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices"')
    handler.close_connection = True


@contextmanager
def running_server() -> Iterator[Server]:
    """Yields a server that runs in a thread; stops it at the end of the block."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.stop.set()
        server.shutdown()
        thread.join()
        server.server_close()
