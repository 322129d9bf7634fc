"""What a person sees of a run: the live display, plain lines, and the card at the end."""

from __future__ import annotations

import io
import math
import re
from typing import Any

import pytest
from rich.cells import cell_len

from socpo_fast.report.live import picture_of
from socpo_fast.report.progress import Progress
from socpo_fast.report.status import Exchange, Status
from tests.helpers.made_records import make_question, make_rollout


def test_plain_progress_is_one_line_a_batch() -> None:
    file = io.StringIO()
    with Progress(num_batches=4, live=True, file=file) as progress:
        progress.note("run [bold]x[/bold]")
        progress.phase("rollout", batch=1, update=0, total=2)
        progress.advance(num_tokens=10)
        progress.report({"policy/loss": 1.0}, kind="update", batch=1, update=1)
        metrics = {"success/unassisted": 0.25, "success/assisted": 0.5, "perf/rollout_tok_s": 800.4}
        progress.report(metrics, kind="batch", batch=1, update=2)
        progress.report({"success/unassisted": math.nan}, kind="eval", batch=1, update=2)
    lines = file.getvalue().splitlines()
    assert lines[0] == "run [bold]x[/bold]"
    assert lines[1].startswith(
        "train batch 1/4 update 2  unassisted 25.0%  assisted 50.0%  800 tok/s  left 0:00:0"
    )
    assert lines[2].startswith("estimate: the whole run takes about 0:00:00 (0.0 s a batch")
    assert lines[3].startswith("eval  batch 1/4 update 2  unassisted nan%")
    assert len(lines) == 4


def test_the_time_left_counts_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    status = Status(num_batches=12, first_batch=3, num_evals=4)
    assert status.left_s is None
    now = [status.started]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    for seconds, kind in ((5.0, "eval"), (15.0, "batch"), (17.0, "update"), (35.0, "batch")):
        now[0] = status.started + seconds
        status.end(kind, {}, batch=3, update=2)  # type: ignore[arg-type]
    status.begin("rollout", batch=5, update=4, total=8)
    now[0] += 6.0
    # Eight batches of 15 s, of which 6 s are gone, and three evaluations of 5 s.
    assert status.left_s == pytest.approx(8 * 15.0 - 6.0 + 3 * 5.0)


class Contested(Status):
    """A status whose exchange the display takes right after each look at it."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name == "newer":
            self.newer = None
        return value


def test_the_display_may_read_at_any_time() -> None:
    """It has a thread of its own, which an error would end for the rest of the run."""
    status = Contested(num_batches=3)
    status.end("batch", {}, batch=1, update=2)
    being_read = [iter(status.num_ended), iter(status.spent_s)]
    status.end("eval", {}, batch=1, update=2)
    assert [list(kinds) for kinds in being_read] == [["batch"], ["batch"]]
    for idx in range(2):
        status.newer = Exchange.of(make_rollout(1, 0), make_question(1))
        status.add(make_rollout(idx, 0), make_question(idx))
    assert status.done == 2


def test_assisted_shares_need_guidance() -> None:
    """Without any guidance they would be the unassisted ones under another name."""
    row = {"success/unassisted": 0.5, "success/assisted": 0.5, "guidance/rate": 0.0}
    for update in (0, 2):  # `socpo rollout`, and a training
        with Progress(num_batches=1, file=(file := io.StringIO())) as progress:
            progress.phase("rollout", batch=1, update=0, total=1)
            rollout = make_rollout(0, 0)
            del rollout.turns[1:]
            progress.add_rollout(rollout, make_question(0))
            progress.report(row, kind="batch", batch=1, update=update)
            progress.end_card("run r: finished")
        assert "assisted" not in file.getvalue().replace("unassisted", "")
        assert "unassisted" in file.getvalue()
        begin = "train batch 1/1 update 2  " if update else "rollout batch 1/1  "
        assert file.getvalue().startswith(begin)


def test_a_long_update_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off a terminal, where nothing else would be seen until its end."""
    monkeypatch.setattr("socpo_fast.report.progress.PLAIN_LINE_S", 0.0)
    progress = Progress(num_batches=2, file=(file := io.StringIO()))
    progress.phase("update", batch=1, update=0, total=4)
    progress.work("log-probs", 3, 16)
    progress.advance()
    progress.work("microbatch", 2, 5)
    assert re.sub(", elapsed .*", "", file.getvalue()).splitlines() == [
        "update 0/4, log-probs 3/16",
        "update 1/4, microbatch 2/5",
    ]


def fill(progress: Progress, *, text: str = "41") -> None:
    """Plays some batches, an evaluation, and part of the next batch."""
    for batch in range(1, 40):
        metrics = {"success/unassisted": batch % 9 / 8, "success/assisted": 1.0}
        metrics |= {"reward/mean": 0.4, "reward/std": 0.5, "reward/groups_without_signal": 0.25}
        progress.report(metrics, kind="batch", batch=batch, update=2 * batch)
    metrics = {f"success/unassisted{end}": 0.5 for end in ("", "_low", "_high")}
    progress.report(metrics, kind="eval", batch=39, update=78)
    progress.phase("rollout", batch=40, update=78, total=8)
    for i in range(3):
        rollout = make_rollout(i, 0)
        for turn in rollout.turns:
            turn.text = text
        progress.add_rollout(rollout, make_question(i))


def test_live_display_shows_the_whole_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # rich: treat the file as a terminal
    monkeypatch.setenv("COLUMNS", "100")
    file = io.StringIO()
    with Progress(num_batches=99, live=True, file=file) as progress:
        fill(progress)
        progress.note("a line that stays")
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
        for text in (
            "40/99",
            "update 78",
            "3/8",
            "tok/s",
            "training 37.5 %  ▂▃▄▅▆▇██▁▂",
            "held out 50.0 %  (50.0 to 50.0)  ▅",
            "3 rescued  0 failed  0 leaked  of 3 guided",
            "mean 0.400  std 0.500  25 % of groups without signal",
            "18 sampled in all",
            "question   Question 2?",
            "student    wrong: 41",
            "teacher    Look again.",
            "student    right: 41",
        ):
            assert text in shown, text
        progress.phase("update", batch=40, update=78, total=4)
        progress.advance()
        progress.work("microbatch", 2, 5)
        file.truncate(0)
        progress.note("another")
        assert "1/4  microbatch 2/5" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())


# The smallest terminals, ones where lines and columns just do not suffice, and a common one.
@pytest.mark.parametrize("size", [(1, 1), (12, 3), (40, 10), (59, 9), (60, 17), (100, 50)])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_the_picture_fits_any_terminal(size: tuple[int, int], ascii_only: bool) -> None:
    width, height = size
    progress = Progress(num_batches=10**9, live=False, quiet=True, file=io.StringIO())
    fill(progress, text="a \u4f60\u597d " * 900 + "b" * 500)
    exchange = progress.status.next_exchange(math.inf)
    if ascii_only and exchange is not None:
        exchange = exchange._replace(attempt="a" * 900, next_attempt="b " * 900)
    lines = picture_of(progress.status, exchange, width=width, height=height, ascii_only=ascii_only)
    texts = [line.plain for line in lines]
    assert 0 < len(texts) <= height
    assert all(cell_len(text) <= width for text in texts)
    assert not ascii_only or all(text.isascii() for text in texts)
    assert height < 9 or "teacher" in "".join(text[:7] for text in texts)


def test_the_dialogue_changes_and_prefers_rescues() -> None:
    status = Status(num_batches=1)
    vain = make_rollout(1, 0)
    vain.turns[1].is_correct = False
    for idx, rollout in enumerate([vain, make_rollout(2, 0), make_rollout(3, 0), vain]):
        status.add(rollout, make_question(idx))
    first = status.next_exchange(100.0)
    assert first is not None and (first.question, first.rank) == ("Question 2?", 2)
    status.add(vain, make_question(7))
    assert status.next_exchange(104.0) is None, "it stays long enough to be read"
    second = status.next_exchange(107.0)
    assert second is not None and second.question == "Question 7?"
    status.add(make_rollout(3, 0), make_question(8))
    third = status.next_exchange(110.0)
    assert third is not None and third.question == "Question 8?", "a rescue comes sooner"


def test_the_card_tells_from_where_to_where() -> None:
    file = io.StringIO()
    rows = [{"kind": "eval", "batch": 0, "update": 0, "success/unassisted": 0.125}]
    with Progress(num_batches=60, num_tokens=7, earlier=rows, file=file) as progress:
        fill(progress)
        progress.end_card("run r: finished", next_commands=["socpo report runs/r"])
    card = file.getvalue().partition("run r: finished")[2]
    assert "12.5 % -> 50.0 % (50.0 to 50.0)  held-out questions, update 0 to 78" in card
    assert "39 batches, 78 updates, 25 tokens sampled" in card
    assert "guided 3 of 3 rollouts, rescued 3" in card
    assert card.endswith("next          socpo report runs/r\n")
    # Without held-out questions, the first and the last batch.
    file = io.StringIO()
    progress = Progress(num_batches=60, file=file)
    for batch, share in ((1, 0.25), (2, 0.75)):
        progress.report({"success/unassisted": share}, kind="batch", batch=batch, update=batch)
    progress.end_card("run r: stopped")
    assert "25.0 % -> 75.0 %  training batches, update 1 to 2" in file.getvalue()


def test_a_quiet_run_prints_warnings_and_its_end() -> None:
    file = io.StringIO()
    with Progress(num_batches=60, quiet=True, file=file) as progress:
        fill(progress)
        progress.note("a note")
        progress.warn("a warning")
        progress.end_card("run r: finished", facts=[("weights", "x")], next_commands=["socpo"])
    warning, end = file.getvalue().splitlines()
    assert warning == "a warning"
    assert end.startswith("run r: finished; unassisted 12.5 % -> 37.5 %")
    assert end.endswith("; weights x")
