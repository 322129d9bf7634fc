"""How a run ends early: SIGTERM, SIGINT and SIGHUP. Read StopSignals.

A signal is answered on the terminal at once. Where nothing is lost by it (rollouts, evaluations) it
stops the run right there; in updates it waits for the last one of the batch, or a second signal.
What is being written to the disk is written to its end.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Self

from socpo_fast.files import StopRequested

# By what the block waits for, and whether it has come.
ANSWERS = {
    (1, True): "stopping, and saving",
    (2, False): "stopping after the updates of this batch, and saving; a second one stops at once",
    (2, True): "stopping without the updates of this batch",
    (None, False): "stopping, as soon as what is being written is on the disk",
}
# A function of the user's may swallow StopRequested: after so many further signals the process ends
# at once, unsaved.
INSISTS = 2
GONE = "gone, without saving; the last checkpoint stays"


class StopSignals:
    """Handlers for the time of a `with` block.

    Off the main thread, where Python delivers no signals, there are none. A signal that is ignored
    (by nohup, or in the background of a script) stays so.
    """

    def __init__(self) -> None:
        self.received: int | None = None  # the first one
        self._num_received = 0
        self._stop_at: int | None = None  # so many of them raise StopRequested

    def __enter__(self) -> Self:
        on_main_thread = threading.current_thread() is threading.main_thread()
        self._previous: dict[int, Any] = {}
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if on_main_thread else ():
            # None: a handler that is not Python's, and could not be given back.
            if signal.getsignal(signum) not in (signal.SIG_IGN, None):
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_error: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def check(self) -> None:
        """A good place to stop: raises StopRequested if a signal has come."""
        if self.received is not None:
            raise StopRequested

    @contextmanager
    def stop_at(self, num_signals: int) -> Iterator[None]:
        """A block that a signal ends with StopRequested, or only the second one.

        One that came before the block ends it in any case.
        """
        try:
            self._stop_at = num_signals
            self.check()  # only now: a signal in between would wait for the block's end
            yield
        finally:
            self._stop_at = None
            StopRequested.was_raised = False

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        self.received = self.received or signum
        self._num_received += 1
        stops = self._stop_at is not None and self._num_received >= self._stop_at
        is_over = self._stop_at is not None and self._num_received >= self._stop_at + INSISTS
        answer = GONE if is_over else ANSWERS[self._stop_at, stops]
        with suppress(OSError):  # a closed terminal. Not print, which may be what was interrupted
            os.write(2, f"\n{signal.Signals(signum).name}: {answer}\n".encode())
        if is_over:
            os._exit(128 + signum)
        if stops:
            StopRequested.was_raised = True
            raise StopRequested
