"""Functions of the user's own: found by name, called where they can hurt nobody, named when they fail."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from importlib import import_module
from pathlib import Path
from typing import Any


class FunctionFailed(Exception):  # noqa: N818 - says who raised what, and where
    """A function of the user's own raised something."""


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
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{where} must name a module that can be imported, got {spec!r} ({error})"
        ) from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"{where} {spec}: its module {_failure_of(error)}") from error
    if not callable(function):
        raise ValueError(f"{where} must name a function of {module_name}, got {function_name!r}")
    return function


def name_of(function: object) -> str:
    """module:function, as settings name it."""
    named: Any = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


def blame(function: object, error: BaseException) -> str:
    """Who raised what, and where: "mine:rule raised KeyError: 'x' (mine.py line 3)"."""
    return f"{name_of(function)} {_failure_of(error, getattr(function, '__module__', None))}"


def _failure_of(error: BaseException, module: str | None = None) -> str:
    """What was raised and where: the last line of the module, or of anybody."""
    frames = traceback.extract_tb(error.__traceback__)
    path = getattr(sys.modules.get(module or ""), "__file__", None)
    frame = next((f for f in reversed(frames) if f.filename == path), frames[-1])
    what = " ".join(f"{type(error).__name__}: {error!s:.300}".split())
    return f"raised {what} ({Path(frame.filename).name} line {frame.lineno})"


def call_in_thread(function: Callable[..., Any], *given: Any) -> Future[Any]:
    """Calls a function on a daemon thread of its own; whatever it raises becomes FunctionFailed.

    A call that never returns holds up neither later ones, as there is no pool that could fill, nor
    the end of the process.
    """
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(function(*given))
        except BaseException as error:  # noqa: BLE001 - sys.exit in it is the function's, not ours
            future.set_exception(FunctionFailed(blame(function, error)))

    threading.Thread(target=run, name="socpo-function", daemon=True).start()
    return future
