"""How a run ends early. A signal stops it at once where nothing is lost by it, else at the next good place."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequested(BaseException):
    """Raised where a run may stop. Not an Exception, so that no handler on the way takes it for a failure."""


class StopSignals:
    """Handlers for the time of a `with` block; does nothing off the main thread, where Python delivers no signals."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._at_once = False

    def __enter__(self) -> StopSignals:
        on_main_thread = threading.current_thread() is threading.main_thread()
        signals = (signal.SIGTERM, signal.SIGINT) if on_main_thread else ()
        self._previous = {signum: signal.signal(signum, self._handle) for signum in signals}
        return self

    def __exit__(self, *_error: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def check(self) -> None:
        """A good place to stop: raises StopRequested if a signal has come."""
        if self.received is not None:
            raise StopRequested

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A block that changes nothing that lasts: a signal raises StopRequested right there."""
        try:
            self._at_once = True
            self.check()  # only now: a signal in between would wait for the block's end
            yield
        finally:
            self._at_once = False

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        self.received = signum
        if self._at_once:
            raise StopRequested
