"""Draws a running run on a terminal. Read LiveDisplay, then picture_of.

The picture adapts to the width and height that the terminal has at every drawing. Its lines are cut
to the width, and their number to the height, since a terminal would wrap or scroll what is longer.
"""

import math
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import lru_cache

from rich.cells import cell_len, chop_cells, set_cell_size
from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.text import Text

from socpo_fast.report.accuracy import sparkline
from socpo_fast.report.printable import one_line, printable
from socpo_fast.report.status import Exchange, Score, Status

REFRESH_S = 0.25
Line = list[tuple[str, str]]  # (text, style of rich)
LABEL = 11  # cells of the first column
NARROW = 60  # cells; with fewer, bars are short and intervals left out
MAX_CURVE = 40  # batches or evaluations
# A terminal of fewer lines has no room for a dialogue beside the numbers.
MIN_LINES_WITH_EXCHANGE = 8
MAX_LINES_OF_A_TEXT = 4


class LiveDisplay:
    """Draws a Status a few times a second, from a thread of its own, until `stop`."""

    def __init__(self, status: Status, console: Console):
        self.status = status
        self._exchange: Exchange | None = None  # with escaped texts
        # rich's own refreshing thread dies with a traceback when the terminal is gone.
        self._live = Live(self, console=console, auto_refresh=False, transient=True)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._refresh, daemon=True)

    def start(self) -> None:
        """Begins to draw."""
        self._live.start()
        self._thread.start()

    def stop(self) -> None:
        """Removes the picture; does nothing the second time."""
        self._stopped.set()
        # The terminal may be gone by now. rich turns a closed pipe into SystemExit.
        with suppress(OSError, ValueError, SystemExit):
            self._live.stop()

    def _refresh(self) -> None:
        with suppress(OSError, ValueError, SystemExit):
            while not self._stopped.wait(REFRESH_S):
                self._live.refresh()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[Text]:
        """Yields the picture; rich calls this at every drawing."""
        if newer := self.status.next_exchange(time.monotonic()):
            self._exchange = escaped(newer, options.encoding)
        yield from picture_of(
            self.status,
            self._exchange,
            # Without the last column, where some terminals wrap.
            width=options.max_width - 1,
            # Without the last line, where the cursor stands.
            height=console.height - 1,
            ascii_only=options.ascii_only,
        )


def escaped(exchange: Exchange, encoding: str) -> Exchange:
    """Returns the exchange with each of its texts as one line that is safe to print."""
    question, attempt, guidance, next_attempt = (
        printable(one_line(text), encoding) for text in exchange[:4]
    )
    return exchange._replace(
        question=question, attempt=attempt, guidance=guidance, next_attempt=next_attempt
    )


def picture_of(
    status: Status, exchange: Exchange | None, *, width: int, height: int, ascii_only: bool
) -> list[Text]:
    """Returns the lines of the picture, at most `height`, each of at most `width` cells.

    The texts of the exchange are `escaped` ones.

    With few lines the less important numbers are left out, with few columns the ends of lines.
    """
    num_texts = 4 if exchange and height >= MIN_LINES_WITH_EXCHANGE else 0
    lines = _facts(status, width, ascii_only)[: max(height - num_texts, 0)]
    if exchange and num_texts:
        left = height - len(lines)
        if left > num_texts:
            lines.append([])
        num_lines = min((height - len(lines)) // num_texts, MAX_LINES_OF_A_TEXT)
        lines += _exchange_lines(exchange, width, num_lines)
    texts = [Text.assemble(*line, no_wrap=True) for line in lines]
    for text in texts:
        text.truncate(width)
    return texts


def _facts(status: Status, width: int, ascii_only: bool) -> list[Line]:
    """Returns the lines of numbers, the most important ones first."""
    left_s = status.left_s
    times = [f"left {'?' if left_s is None else hms(left_s)}", f"elapsed {hms(status.elapsed_s)}"]
    if status.num_batches:
        times = [f"{status.batch}/{status.num_batches}", *times, f"update {status.update}"]
    label = "batch" if status.num_batches else "time"
    facts = [
        _line(width, label, *((text, "") for text in times)),
        _phase_line(status, width, ascii_only),
    ]
    curves = (("training", status.scores["batch"]), ("held out", status.scores["eval"]))
    label = "unassisted"
    for name, scores in curves:
        if scores:
            facts.append(_curve_line(label, name, scores, width, ascii_only))
            label = ""
    counts = status.counts
    guidance = (
        (f"{counts.rescued} rescued", "green"),
        (f"{counts.failed} failed", "red" if counts.failed else ""),
        (f"{counts.leaked} leaked", "yellow" if counts.leaked else ""),
        (f"of {counts.guided} guided", ""),
    )
    facts.append(_line(width, "guidance", *guidance))
    assisted = [
        (f"{name} {percent(scores[-1].assisted)}", "")
        for name, scores in curves
        if scores and math.isfinite(scores[-1].assisted)
    ]
    if assisted:
        facts.append(_line(width, "assisted", *assisted))
    metrics = status.metrics
    if "reward/std" in metrics:
        reward = (
            f"mean {metrics['reward/mean']:.3f}",
            f"std {metrics['reward/std']:.3f}",
            f"{100 * metrics['reward/groups_without_signal']:.0f} % of groups without signal",
        )
        facts.append(_line(width, "reward", *((text, "") for text in reward)))
    tokens = status.num_tokens if status.num_batches else status.phase_tokens
    facts.append(_line(width, "tokens", (f"{tokens:,} sampled in all", "")))
    return facts


def _phase_line(status: Status, width: int, ascii_only: bool) -> Line:
    """Returns what goes on now, with a bar, and how fast."""
    done: float = status.done
    total = status.total
    parts = [(f"{status.done}/{status.total}", "")]
    if status.work is not None:
        name, num_done, num_total = status.work
        parts.append((f"{name} {num_done}/{num_total}", ""))
        share = num_done / max(num_total, 1)
        # Log-probs come before the updates, so they have the bar for themselves.
        done, total = (share, 1) if name == "log-probs" else (done + share, total)
    if status.phase_tokens:
        seconds = max(time.monotonic() - status.phase_started, 1e-9)
        parts.append((f"{status.phase_tokens / seconds:,.0f} tok/s", ""))
    if status.phase == "evaluation" and status.counts.rollouts:
        share = status.counts.unassisted / status.counts.rollouts
        parts.append((f"{percent(share)} unassisted so far", ""))
    cells = 8 if width < NARROW else 24
    filled = min(int(cells * done / max(total, 1)), cells)
    full, empty = ("#", ".") if ascii_only else ("█", "░")
    bar = (full * filled + empty * (cells - filled), "cyan")
    return _line(width, status.phase, bar, *parts)


def _curve_line(
    label: str, name: str, scores: Sequence[Score], width: int, ascii_only: bool
) -> Line:
    """Returns the last score with its interval, and a curve of all."""
    last = scores[-1]
    parts = [(f"{name} {percent(last.unassisted)}", "bold")]
    if math.isfinite(last.low) and width >= NARROW:
        parts.append((interval_text(last), "dim"))
    taken = LABEL + sum(cell_len(text) + 2 for text, _ in parts)
    newest = scores[-min(max(width - taken, 1), MAX_CURVE) :]
    if not ascii_only:
        parts.append((sparkline(score.unassisted for score in newest), ""))
    return _line(width, label, *parts)


@lru_cache(maxsize=1)
def _exchange_lines(exchange: Exchange, width: int, num_lines: int) -> list[Line]:
    """Returns the dialogue, each of its texts in at most num_lines lines."""
    right = ("right: ", "green")
    wrong = ("wrong: ", "red")
    verdict = right if exchange.is_correct else wrong
    texts = [
        ("question", ("", ""), exchange.question),
        ("student", wrong, exchange.attempt),
        ("teacher", ("", ""), exchange.guidance),
        ("student", verdict, exchange.next_attempt),
    ]
    if exchange.rank == 0:
        texts = [texts[0], ("student", verdict, exchange.attempt)]
    lines: list[Line] = []
    room = max(width - LABEL, 16)
    for label, (word, style), text in texts:
        first, *more = _paragraph(text, room, num_lines, room - len(word))
        lines.append([(f"{label:<{LABEL}}", "dim"), (word, style), (first, "")])
        lines += [[(" " * LABEL + text_line, "")] for text_line in more]
    return lines


def _paragraph(text: str, width: int, num_lines: int, first_width: int) -> list[str]:
    """Breaks text into lines, at most num_lines; the first one has cells of its own number.

    Of a text that is too long both ends are kept: how it begins, and what it comes to.
    """
    if num_lines == 1 and cell_len(text) > first_width:
        half = max((first_width - 4) // 2, 0)
        return [f"{set_cell_size(text, half)} .. {_last_cells(text, half)}"]
    lines = [""]
    for word in text.split(" "):
        for part in chop_cells(word, width):
            joined = f"{lines[-1]} {part}" if lines[-1] else part
            fits = cell_len(joined) <= (first_width if len(lines) == 1 else width)
            lines[-1:] = [joined] if fits else [lines[-1], part]
    if len(lines) > num_lines:
        lines[num_lines - 1 :] = [f".. {_last_cells(text, width - 3)}"]
    return lines


def _last_cells(text: str, cells: int) -> str:
    """Returns the end of a text."""
    return set_cell_size(text[::-1], cells)[::-1].strip()


def _line(width: int, label: str, *parts: tuple[str, str]) -> Line:
    """Returns a line of a label, a first part, and those of the others that fit."""
    gap = " " if width < NARROW else "  "
    line = [(f"{label:<{LABEL}}", "dim"), *parts[:1]]
    for text, style in parts[1:]:
        if sum(cell_len(word) for word, _ in line) + len(gap) + cell_len(text) > width:
            break
        line += [(gap, ""), (text, style)]
    return line


def percent(share: float) -> str:
    """Returns a share as a percentage."""
    return f"{100 * share:.1f} %"


def interval_text(score: Score) -> str:
    """Returns the 95 % interval of a score's unassisted share."""
    return f"({100 * score.low:.1f} to {100 * score.high:.1f})"


def from_to(ends: Sequence[Score]) -> dict[str, str]:
    """Returns the shares of the first and the last score, or of the only one, as text.

    There is no assisted share unless it is known at both ends.
    """
    texts = {
        "unassisted": [
            percent(x.unassisted) + (f" {interval_text(x)}" if math.isfinite(x.low) else "")
            for x in ends
        ]
    }
    if all(math.isfinite(x.assisted) for x in ends):
        texts["assisted"] = [percent(x.assisted) for x in ends]
    return {name: " -> ".join(parts) for name, parts in texts.items() if parts}


def hms(seconds: float) -> str:
    """Returns seconds as hours:minutes:seconds."""
    return f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02d}:{int(seconds % 60):02d}"
