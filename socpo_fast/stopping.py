"""Ends a run early on SIGTERM, SIGINT or SIGHUP. Read StopSignals.

Every signal is answered on the terminal at once. During rollouts and evaluations the first signal
stops the run immediately, since nothing is lost. During updates the run stops after the last update
of the batch, or at a second signal. Files that are being written are always finished.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Self

from socpo_fast.files import StopRequested

# Keys: the number of signals that stop the current block (None: no signal does), and whether that
# many have come.
ANSWERS = {
    (1, True): "stopping, and saving",
    (2, False): "stopping after the updates of this batch, and saving; a second one stops at once",
    (2, True): "stopping without the updates of this batch",
    (None, False): "stopping, as soon as what is being written is on the disk",
}
# A user's function may swallow StopRequested. After this many further signals the process ends at
# once, without saving.
INSISTS = 2
GONE = "gone, without saving; the last checkpoint stays"


class StopSignals:
    """Signal handlers for the duration of a `with` block.

    On other threads than the main one no handlers are set, because Python delivers no signals
    there. A signal that is ignored (by nohup, or in the background of a script) stays ignored.
    """

    def __init__(self) -> None:
        self.received: int | None = None  # the first one
        self._num_received = 0
        self._stop_at: int | None = None  # the number of signals that raises StopRequested

    def __enter__(self) -> Self:
        on_main_thread = threading.current_thread() is threading.main_thread()
        self._previous: dict[int, Any] = {}
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if on_main_thread else ():
            # None is a handler that Python did not set, so it could not be restored.
            if signal.getsignal(signum) not in (signal.SIG_IGN, None):
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_error: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def check(self) -> None:
        """Raises StopRequested if a signal has come. Call it where stopping loses nothing."""
        if self.received is not None:
            raise StopRequested

    @contextmanager
    def stop_at(self, num_signals: int) -> Iterator[None]:
        """Makes the first (1) or the second (2) signal end the `with` block with StopRequested.

        A signal that came before the block ends it at its start in both cases.
        """
        try:
            self._stop_at = num_signals
            # After _stop_at is set: a signal between an earlier check and that line would only be
            # noticed at the end of the block.
            self.check()
            yield
        finally:
            self._stop_at = None
            StopRequested.was_raised = False

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        """Answers a signal on the terminal, and stops the block or the process if it is due."""
        self.received = self.received or signum
        self._num_received += 1
        stops = self._stop_at is not None and self._num_received >= self._stop_at
        is_over = self._stop_at is not None and self._num_received >= self._stop_at + INSISTS
        answer = GONE if is_over else ANSWERS[self._stop_at, stops]
        # os.write rather than print: the signal may have interrupted a print, which is not
        # reentrant. The terminal may be closed.
        with suppress(OSError):
            os.write(2, f"\n{signal.Signals(signum).name}: {answer}\n".encode())
        if is_over:
            os._exit(128 + signum)
        if stops:
            StopRequested.was_raised = True
            raise StopRequested
