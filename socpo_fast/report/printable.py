"""Makes text that others wrote safe to print, whatever it holds and whoever still listens.

Models, teachers, graders, data and file names may hold escape sequences, which a terminal would
obey, and letters that its encoding lacks, which end a program.
"""

import sys
import unicodedata
from contextlib import suppress
from typing import TextIO


def printable(text: str, encoding: str = "utf-8") -> str:
    r"""Returns the text with control characters and the like escaped, as \x1b, \u202e or \udc80.

    Line ends stay. Letters that the encoding lacks are escaped as well.
    """
    # isprintable is false for control and format characters (bidirectional overrides, zero width),
    # for surrogates, and for all spaces but the plain one. Spaces (Zs) do no harm.
    escaped = "".join(
        letter
        if letter.isprintable() or letter == "\n" or unicodedata.category(letter) == "Zs"
        else letter.encode("unicode_escape").decode()
        for letter in text
    )
    return escaped.encode(encoding, "backslashreplace").decode(encoding)


def one_line(text: str) -> str:
    """Returns the text as one printable line."""
    return printable(" ".join(text.split()))


def warning_line(message: Warning | str, *_rest: object, **_named: object) -> str:
    """Returns a warning as one line, without the source line that Python would add.

    It takes the place of warnings.formatwarning.
    """
    return one_line(f"warning: {message}") + "\n"


def tell(text: str, stream: TextIO | None = None) -> None:
    """Prints text at once, to stdout or another stream; a reader that has gone misses it.

    Raises:
        OSError: a file cannot take it, for example on a full disk.
    """
    file = stream or sys.stdout
    # A closed stream raises ValueError, and so does an encoding that is not known here.
    with suppress(BrokenPipeError, ValueError):
        print(printable(text, getattr(file, "encoding", None) or "utf-8"), file=file, flush=True)


def tell_loading(what: str, *, quiet: bool) -> None:
    """Prints that something slow begins, unless the run is quiet; a full disk costs the line."""
    if not quiet:
        with suppress(OSError):
            tell(f"loading {what} ..")
