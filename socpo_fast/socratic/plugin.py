"""Finds functions of the user by name, names them when they fail, stops them when they hang.

Graders and teachers may be such functions. Read load_function, describe_error, then time_limit.
"""

import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from socpo_fast.config.text import did_you_mean
from socpo_fast.files import StopRequested


def load_function(where: str, spec: str) -> Callable[..., Any]:
    """Returns the function that `spec`, "module:function", names.

    The module is looked for where Python looks, and then in the working directory.

    Args:
        where: the setting that holds the spec; error messages begin with it.

    Raises:
        ValueError: spec has another form, the module does not exist or cannot be imported, or it
            has no such function.
    """
    module_name, _, function_name = spec.partition(":")
    if not module_name or not function_name or module_name.endswith(".py"):
        raise ValueError(f'{where} must be "module:function", got {spec!r}; leave .py out')
    try:
        with working_directory_on_path():
            functions = vars(import_module(module_name))
    # Importing runs the user's code: it may raise anything, and scripts call sys.exit.
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"{where} must name a module that can be imported, got {spec!r} "
            f"({type(error).__name__}: {text_of(error, str)}){_advice(module_name, error)}"
        ) from error
    function = functions.get(function_name)
    if not callable(function):
        names = [name for name, value in functions.items() if callable(value)]
        file = f" ({functions['__file__']})" if functions.get("__file__") else ""
        raise ValueError(
            f"{where} must name a function of {module_name}{file}, got {function_name!r}"
            + did_you_mean(function_name, names)
        )
    return function


@contextmanager
def working_directory_on_path() -> Iterator[None]:
    """Lets a block import from the working directory too, which the program socpo does not.

    The directory is the last place to look, and only in this block: a file in it never takes the
    place of an installed package.
    """
    # "" is the working directory, whichever it is when something is imported.
    is_there = "" in sys.path
    if not is_there:
        sys.path.append("")
    try:
        yield
    finally:
        # The module may have changed sys.path, and that stays.
        if not is_there and "" in sys.path:
            sys.path.remove("")


def _advice(module_name: str, error: BaseException) -> str:
    """Returns where a module was looked for and what is there, if it was not found."""
    package = module_name.partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or error.name not in (module_name, package):
        return ""
    names = [path.stem for path in Path.cwd().iterdir() if path.suffix == ".py" or path.is_dir()]
    return (
        f"; looked in {Path.cwd()} and where Python looks: go to the folder of {package}.py, or "
        "set PYTHONPATH to it (PYTHONPATH=. socpo ..)" + did_you_mean(package, names)
    )


def describe_error(function: object, error: BaseException) -> str:
    """Returns who raised what, and where: "mine:rule raised KeyError: 'x' (mine.py line 3)".

    Call it in the frame that called the function and caught the error: only then is the line one of
    the function.
    """
    source: Any = function if hasattr(function, "__qualname__") else type(function)
    of_object = getattr(type(function).__call__, "__code__", None)
    code = getattr(function, "__code__", of_object)
    frames = traceback.extract_tb(error.__traceback__)
    # Behind our call comes the user's function, if its code was reached at all. An async one runs
    # further down, on a loop.
    called = [
        f for f in frames if code and (f.filename, f.name) == (code.co_filename, code.co_name)
    ]
    frame = (called or frames[1:] or frames[-1:])[0]
    message = " ".join(f"{type(error).__name__}: {text_of(error, str)}".split())
    return (
        f"{source.__module__}:{source.__qualname__} raised {message} ({Path(frame.filename).name} "
        f"line {frame.lineno})"
    )


def text_of(value: object, to_text: Callable[[object], str] = repr) -> str:
    """Returns the first 300 characters of a value's text, even if its own __repr__ raises."""
    try:
        return to_text(value)[:300]
    except Exception as error:  # noqa: BLE001 - __repr__ may raise anything
        return f"a {type(value).__name__} whose text raised {type(error).__name__}"


def stops_the_run(error: BaseException) -> bool:
    """Whether an error is meant to stop the run, rather than a mistake of the user's function.

    That is a stop signal of the run, or Ctrl-C as long as Python's own handler answers it. Under
    any other handler a KeyboardInterrupt was raised by the function.
    """
    return isinstance(error, StopRequested) or (
        isinstance(error, KeyboardInterrupt)
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )


class TookTooLong(BaseException):
    """Raised in the middle of a function that takes too long.

    It is no Exception, so that an `except Exception` in the function does not swallow it.
    """


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TookTooLong in a block that takes longer, and again every second until it has ended.

    The limit is the alarm of the process (SIGALRM), which only the main thread has: on other
    threads a block has no limit. A block that sets its own alarm replaces the limit by that. An
    alarm that was set before is set again at the end, so it rings later.
    """

    def raise_too_long(*_signal: object) -> None:
        raise TookTooLong(f"after {seconds:g} s")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous_timer = signal.getitimer(signal.ITIMER_REAL)
    previous_handler = signal.getsignal(signal.SIGALRM)
    try:
        try:
            signal.signal(signal.SIGALRM, raise_too_long)
            # The alarm repeats, since the block may catch the first TookTooLong and go on.
            signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
            yield
        finally:
            # The alarm may ring once more right here. TookTooLong then leaves this block, and the
            # outer one still restores the timer and the handler.
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, *previous_timer)
        signal.signal(signal.SIGALRM, previous_handler or signal.SIG_DFL)
