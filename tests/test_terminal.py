"""No output ends a run or changes its exit code, and no text of others reaches it unescaped."""

import io
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from socpo_fast.cli import main
from socpo_fast.report.printable import one_line, printable
from socpo_fast.report.progress import Progress
from tests.helpers.bad_input import words_of

ROOT = Path(__file__).parent.parent
WORDS = {"run.num_batches": 1, "data.eval": "none"}


@pytest.mark.parametrize(
    "prefix",
    [
        ["bash", "-c", 'exec "$@" >&-', "bash"],
        ["env", "PYTHONIOENCODING=ascii"],
    ],
    ids=["closed", "ascii"],
)
def test_an_output_that_takes_nothing(prefix: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "\u00fc"
    words = words_of("train", folder, WORDS | {"run.num_batches": 1})
    result = subprocess.run(
        [*prefix, sys.executable, "-m", "socpo_fast.cli", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, "Traceback" in result.stderr) == (0, False), result.stderr
    assert (folder / "run" / "report.html").is_file()


def test_a_function_that_closes_the_output(tmp_path: Path) -> None:
    words = WORDS | {"run.num_batches": 2, "teacher.rule": f"{__name__}:close_output"}
    result = subprocess.run(
        [sys.executable, "-m", "socpo_fast.cli", *words_of("train", tmp_path, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, "Traceback" in result.stderr) == (0, False), result.stderr


def close_output(_request: Any) -> str:
    """Plays a teacher that closes stdout."""
    sys.stdout.close()
    return "Look again."


EVIL = "\x1b[31mred\x1b[0m\x07\x9b2J\u202e\udc80 [red]plain[/] [/] \u00fc"
SHOWN = r"\x1b[31mred\x1b[0m\x07\x9b2J\u202e\udc80 [red]plain[/] [/] "


def test_texts_of_others_are_escaped() -> None:
    assert printable(EVIL) == SHOWN + "\u00fc"
    assert printable(EVIL, "ascii") == SHOWN + r"\xfc"
    assert printable("a\nb\rc\td") == "a\nb" + r"\rc\td"
    assert one_line("a\nb\rc\u2028d") == "a b c d"
    # Letters of any language, symbols, and spaces stay as they are.
    for text in ("\u4f60\u597d", "\u00e9\u0301", "\U0001f600", "1\u202f000\u00a0\u20ac", "\u2588"):
        assert printable(text) == text


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "cp1252"])
def test_notes_keep_markup_and_every_letter(encoding: str) -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    with Progress(num_batches=1, live=False, file=file) as progress:
        progress.note(EVIL)
    file.flush()
    shown = "\u00fc".encode(encoding, "backslashreplace").decode(encoding)
    assert raw.getvalue().decode(encoding) == f"{SHOWN}{shown}\n"


def test_error_lines_and_help_are_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", EVIL]) == 2
    assert SHOWN in capsys.readouterr().err
    path = tmp_path / "run.toml"
    path.write_text('[run]\nname = "\\u001b[31m"\n', encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["train", "--config", str(path), "--help"])
    printed = capsys.readouterr().out
    assert r"(default: \x1b[31m)" in " ".join(printed.split())
    assert "\x1b" not in printed


@pytest.mark.parametrize("words", ["train --help", "env --help", "env", "trian"])
def test_a_reader_that_leaves_sees_no_traceback(words: str) -> None:
    command = f"set -o pipefail; {sys.executable} -m socpo_fast.cli {words} 2>&1 | head -c 1"
    result = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (2 if words == "trian" else 0, "")


def test_a_full_disk_is_told() -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "socpo_fast.cli", "--help"],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (result.returncode, "No space left" in result.stderr) == (2, True), result.stderr


def test_a_warning_does_not_need_stderr(tmp_path: Path) -> None:
    """Started with stderr closed, and with a teacher that closes what took its place."""
    words = words_of("train", tmp_path, WORDS | {"teacher.rule": f"{__name__}:close_all"})
    command = [sys.executable, "-m", "socpo_fast.cli", *words, "--teacher.on_silence", "continue"]
    result = subprocess.run(
        ["bash", "-c", 'exec "$@" 2>&-', "bash", *command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    assert (tmp_path / "run" / "report.html").is_file()


def close_all(_request: Any) -> str:
    """Plays a teacher that closes both outputs, and then fails with a text of escapes."""
    sys.stdout.close()
    sys.stderr.close()
    raise ValueError(EVIL)


def hostile_rule(_request: Any) -> str:
    """Plays a teacher of hostile texts, in guidance and in errors in turn."""
    hostile_rule.calls = getattr(hostile_rule, "calls", 0) + 1  # type: ignore[attr-defined]
    if hostile_rule.calls % 2:  # type: ignore[attr-defined]
        raise ValueError(EVIL)
    return EVIL


def hostile_grader(_text: str, _question: Any) -> dict[str, float]:
    """Plays a grader whose part of the reward has a hostile name."""
    return {EVIL: 0.0}


def test_a_terminal_that_vanishes_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal, end = os.openpty()
    file = os.fdopen(end, "w")
    with Progress(num_batches=3, file=file) as progress:
        for batch in (1, 2, 3):
            progress.phase("rollout", batch=batch, update=0, total=1)
            progress.advance(num_tokens=7)
            progress.report({"success/unassisted": 0.5}, kind="batch", batch=batch, update=2)
            progress.note("a line")
            time.sleep(0.6)  # two drawings
            if batch == 1:
                assert b"training 50.0 %" in os.read(terminal, 65536)
                os.close(terminal)
        progress.end_card("run r: finished")
    with suppress(OSError):
        file.close()


def test_hostile_texts_on_a_live_display(tmp_path: Path) -> None:
    """On a terminal rich writes escape sequences of its own, but none of anybody's text."""
    folder = tmp_path / "\x1b[31mred\u4f60\u597d\U0001f600"
    functions = {"teacher.rule": "hostile_rule", "data.grader": "hostile_grader"}
    words = WORDS | {key: f"{__name__}:{name}" for key, name in functions.items()}
    words |= {"run.num_batches": 2, "run.live": "true"}
    terminal, end = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "socpo_fast.cli", *words_of("train", folder, words)],
        cwd=ROOT,
        env=os.environ | {"TERM": "xterm", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=end,
        stderr=end,
    )
    os.close(end)
    written = b""
    # Reading a terminal whose other end is closed is an error.
    with suppress(OSError):
        while block := os.read(terminal, 65536):
            written += block
    os.close(terminal)
    shown = written.decode(errors="surrogateescape")
    assert process.wait() == 0, shown
    assert "Traceback" not in shown
    assert r"\x1b[31mred" in shown
    assert "\x1b[" in shown, "the display was live"
    for raw in ("\x1b[31mred", "\x07", "\x9b", "\u202e", "\udc80"):
        assert raw not in shown
    assert (folder / "run" / "report.html").is_file()
