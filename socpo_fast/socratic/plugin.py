"""Functions of the user's own: found by name, named when they fail, stopped when they hang."""

import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from socpo_fast.files import StopRequested


def load_function(where: str, spec: str) -> Callable[..., Any]:
    """The function that `spec`, "module:function", names; `where` opens the error message.

    Raises:
        ValueError: spec has another form, there is no such module or no such function in it, or the
            module cannot be imported.
    """
    module_name, _, function_name = spec.partition(":")
    if not module_name or not function_name:
        raise ValueError(f'{where} must be "module:function", got {spec!r}')
    try:
        function = vars(import_module(module_name)).get(function_name)
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"{where} must name a module that can be imported, got {spec!r} "
            f"({type(error).__name__}: {error})"
        ) from error
    if not callable(function):
        raise ValueError(f"{where} must name a function of {module_name}, got {function_name!r}")
    return function


def blame(function: object, error: BaseException) -> str:
    """Who raised what, and where: "mine:rule raised KeyError: 'x' (mine.py line 3)".

    To be called where the function was called and the error caught: the line is the function's own.
    """
    named: Any = function if hasattr(function, "__qualname__") else type(function)
    frame = traceback.extract_tb(error.__traceback__)[:2][-1]
    what = " ".join(f"{type(error).__name__}: {text_of(error, str)}".split())
    return (
        f"{named.__module__}:{named.__qualname__} raised {what} ({Path(frame.filename).name} "
        f"line {frame.lineno})"
    )


def text_of(value: object, to_text: Callable[[object], str] = repr) -> str:
    """The first 300 characters of a value's text; whatever its own code does, a text."""
    try:
        return to_text(value)[:300]
    except Exception as error:  # noqa: BLE001 - the value's own, of any kind
        return f"a {type(value).__name__} whose text raised {type(error).__name__}"


def is_ours(error: BaseException) -> bool:
    """Whether it is no function's mistake: a signal of a run's, or Ctrl-C where nobody else answers
    it.
    """
    return isinstance(error, StopRequested) or (
        isinstance(error, KeyboardInterrupt)
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )


class TookTooLong(BaseException):
    """Raised in the middle of a function. No Exception, so that no handler of its own takes it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TookTooLong in a block that takes longer, and again every second until it has ended.

    By the alarm of the process, which only the main thread has: elsewhere a block has no limit. One
    that sets an alarm of its own has that instead. An alarm that was set before rings later.
    """

    def stop(*_signal: object) -> None:
        raise TookTooLong(f"after {seconds:g} s")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    left = signal.getitimer(signal.ITIMER_REAL)
    previous = signal.getsignal(signal.SIGALRM)
    try:
        try:
            signal.signal(signal.SIGALRM, stop)
            signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
            yield
        finally:  # where the alarm may still ring, which leads to the outer one
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, *left)
        signal.signal(signal.SIGALRM, previous or signal.SIG_DFL)
