"""`train` as a function: lists and functions of one's own, notebooks, threads, Ctrl-C, resuming."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import socpo_fast
from socpo_fast import GuidanceRequest, Question, TrainingRun, train
from socpo_fast.cli import main
from socpo_fast.socratic.graders import CheckedGrader, grade_exact
from socpo_fast.socratic.tasks.molar_mass import questions, tutor
from socpo_fast.training_run import Rollouts, collect

CONFIG = Path(__file__).parent.parent / "configs" / "molar_mass.toml"
SMALL: dict[str, Any] = {
    "config": CONFIG,
    "name": "run",
    "num_batches": 2,
    "questions_per_batch": 4,
    "group_size": 4,
    "questions_per_update": 2,
    "kv_cache_gib": 0.05,
    "eval__samples": 2,
}


def as_row(question: Question) -> dict[str, str]:
    """Returns a question as a user would write it."""
    system, user = question.messages
    return {
        "system": system["content"],
        "question": user["content"],
        "ground_truth": question.ground_truth,
    }


ROWS = [as_row(question) for question in questions(0, 13, "train")]
EVAL_ROWS = [as_row(question) for question in questions(0, 4, "eval")]


def check_mass(text: str, question: Question) -> bool:
    return grade_exact(text, question)


async def async_tutor(request: GuidanceRequest) -> str | None:
    await asyncio.sleep(0.001)
    guidance = tutor(request)
    return guidance if isinstance(guidance, str | None) else guidance.text


async def async_grader(text: str, question: Question) -> bool:
    await asyncio.sleep(0.001)
    return check_mass(text, question)


def train_small(folder: Path, **changes: Any) -> TrainingRun:
    """Trains on ROWS, with the user's own functions, into a folder."""
    parts = {"data": ROWS, "eval": EVAL_ROWS, "teacher": tutor, "grader": check_mass}
    return train(**{**SMALL, **parts, "dir": folder, **changes})


def rows_of(run: TrainingRun) -> list[dict[str, Any]]:
    """Returns the metrics that must repeat: all except for times and speeds."""
    return [
        {key: value for key, value in row.items() if not key.startswith(("time/", "perf/"))}
        for row in run.metrics
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> TrainingRun:
    """Returns a run with plain functions."""
    return train_small(tmp_path_factory.mktemp("finished"))


def test_a_run_has_what_a_user_looks_for(finished: TrainingRun) -> None:
    kinds = [row["kind"] for row in finished.metrics]
    assert kinds == ["eval", "update", "update", "batch", "update", "update", "batch", "eval"]
    assert finished.student_folder == finished.folder / "checkpoints" / "update_000004"
    AutoModelForCausalLM.from_pretrained(finished.student_folder)
    assert re.fullmatch(
        r"TrainingRun\('.*/run': batch 2 of 2, update 4; unassisted, held-out questions: "
        r"\d+\.\d % \(\d+\.\d to \d+\.\d\) -> \d+\.\d % .*",
        repr(finished),
    )


def test_rollouts_are_a_sequence_of_rows(finished: TrainingRun) -> None:
    rollouts = finished.rollouts
    assert len(rollouts) == 32 and len([*rollouts]) == 32
    assert [rollouts[i]["batch"] for i in (0, 15, 16, -1)] == [1, 1, 2, 2]
    assert [row["rollout_idx"] for row in rollouts[14:18]] == [2, 3, 0, 1]
    for index in (32, -33):
        with pytest.raises(IndexError, match="one of 32 rollouts"):
            rollouts[index]
    said = {turn["guidance"]["text"] for row in rollouts for turn in row["turns"][:-1]}
    assert said and all("Recheck" in text or "Keep to the format" in text for text in said)


def test_one_rollout_needs_one_file(tmp_path: Path) -> None:
    """Names of files no longer sort as text beyond batch 999999."""
    folder = tmp_path / "rollouts"
    folder.mkdir()
    for batch in (1, 2, 999999, 1000000):
        rows = [json.dumps({"batch": batch, "rollout_idx": i}) + "\n" for i in range(batch % 7 + 1)]
        (folder / f"batch_{batch:06d}.jsonl").write_text("".join(rows))
    rollouts = Rollouts(tmp_path)
    order = [*rollouts]
    assert [row["batch"] for row in order] == sorted(row["batch"] for row in order)
    assert [rollouts[i] for i in range(len(order))] == order == rollouts[:]
    assert [rollouts[~i] for i in range(len(order))] == order[::-1]
    assert rollouts[-3:] == order[-3:] and rollouts[::-2] == order[::-2]
    lazy = Rollouts(tmp_path)
    (folder / "batch_000002.jsonl").unlink()
    (folder / "batch_999999.jsonl").unlink()
    assert lazy[0] == order[0] and lazy[-1] == order[-1]


def test_inside_a_running_event_loop(finished: TrainingRun, tmp_path: Path) -> None:
    """As a cell of a notebook runs, with async functions; the run is that of plain ones."""

    async def cell() -> TrainingRun:
        return train_small(tmp_path, teacher=async_tutor, grader=async_grader)

    assert rows_of(asyncio.run(cell())) == rows_of(finished)


def test_in_a_thread(finished: TrainingRun, tmp_path: Path) -> None:
    """Functions that no module holds are recorded by their names."""
    functions = {"teacher": lambda request: tutor(request), "grader": lambda t, q: check_mass(t, q)}
    runs: list[TrainingRun] = []
    thread = threading.Thread(target=lambda: runs.append(train_small(tmp_path, **functions)))
    thread.start()
    thread.join()
    assert rows_of(runs[0]) == rows_of(finished)
    text = (runs[0].folder / "config.toml").read_text(encoding="utf-8")
    assert re.search(r'rule = "python:[\w.]+:test_in_a_thread\.<locals>\.<lambda>"', text)
    assert 'train = "python:13 rows"' in text


def test_questions_equal_the_command_line(tmp_path: Path) -> None:
    """Questions and functions from Python, in a fresh process, and the same settings of `socpo`."""
    settings = SMALL | {"config": str(CONFIG), "dir": str(tmp_path), "name": "python"}
    program = f"""
from socpo_fast import train
from socpo_fast.socratic.graders import grade_exact
from socpo_fast.socratic.tasks.molar_mass import questions, tutor
train(data=questions(0, 13, "train"), eval=questions(0, 4, "eval"), teacher=tutor,
      grader=lambda text, question: grade_exact(text, question), **{settings!r})
"""
    words = ["--config", str(CONFIG), "--run.dir", str(tmp_path), "--run.name", "command"]
    words += ["--data.builtin_train_questions", "13", "--data.builtin_eval_questions", "4"]
    words += ["--run.num_batches", "2", "--rollout.questions_per_batch", "4", "--eval.samples", "2"]
    words += ["--rollout.group_size", "4", "--train.questions_per_update", "2"]
    words += ["--engine.kv_cache_gib", "0.05"]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert main(["train", *words]) == 0
    run, other = (TrainingRun(tmp_path / name) for name in ("python", "command"))
    assert rows_of(run) == rows_of(other)
    assert [*run.rollouts] == [*other.rollouts] and len(run.rollouts) == 32


def test_a_finished_run_is_returned(finished: TrainingRun, capsys: pytest.CaptureFixture) -> None:
    before = finished.metrics
    assert train_small(finished.folder.parent).metrics == before
    assert "finished at batch 2" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"teacher\.rule: \S+:tutor -> python:\S+<lambda>"):
        train_small(finished.folder.parent, teacher=lambda request: None)


def test_the_command_line_names_what_it_lacks(
    finished: TrainingRun, capsys: pytest.CaptureFixture
) -> None:
    words = ["train", "--config", str(finished.folder / "config.toml")]
    for changes, lacking in (
        ([], "data.train must name what this process can load, got python:13 rows"),
        (["--data.grader", "python:__main__:mine"], r"call socpo_fast.train\((data|grader)=..\)"),
    ):
        assert main([*words, *changes]) == 2
        assert re.search(lacking, capsys.readouterr().err)


class Interrupting:
    """Grades like check_mass; once, after so many verdicts, it sends Ctrl-C to the process."""

    def __init__(self, after: int):
        self.left = after

    def __call__(self, text: str, question: Question) -> bool:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return check_mass(text, question)


@pytest.fixture
def _sigint_as_in_a_terminal() -> Iterator[None]:
    """In the background of a script SIGINT is ignored, and a run would leave it so."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("_sigint_as_in_a_terminal")
def test_ctrl_c_saves_and_raises(finished: TrainingRun, tmp_path: Path) -> None:
    """It comes in the rollouts of batch 2; the same call then makes them again."""
    num_before = sum(len(row["turns"]) for row in finished.rollouts[:16])
    settings = {"every_updates": 0, "eval": "none", "grader": Interrupting(num_before + 3)}
    with pytest.raises(KeyboardInterrupt):
        train_small(tmp_path, **settings)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    run = TrainingRun(tmp_path / "run")
    assert run.student_folder.name == "update_000002"
    run = train_small(tmp_path, **settings)
    assert rows_of(run) == [row for row in rows_of(finished) if row["kind"] != "eval"]


async def fail(text: str, question: Question) -> bool:
    await asyncio.sleep(0)
    raise KeyError("mass")


async def hang(text: str, question: Question) -> bool:
    await asyncio.sleep(60)
    return True


@pytest.mark.parametrize(
    ("grader", "message"),
    [
        (fail, r":fail raised KeyError: 'mass' \(test_training_run\.py line \d+\)"),
        (hang, r"within grader\.timeout_s 0\.2, got an error .*:hang raised TookTooLong"),
        (CheckedGrader(lambda text, question: 7, "seven"), "must return a bool, .* got 7"),
    ],
    ids=["fails", "hangs", "is no verdict"],
)
def test_a_bad_grader_is_named(tmp_path: Path, grader: Callable, message: str) -> None:
    limit = {} if isinstance(grader, CheckedGrader) else {"grader__timeout_s": 0.2}
    started = time.perf_counter()
    with pytest.raises(ValueError, match=message):
        train_small(tmp_path, eval="none", grader=grader, **limit)
    assert time.perf_counter() - started < 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_batch": 2}, "unknown setting num_batch; did you mean num_batches"),
        ({"dataset": []}, "unknown setting dataset; did you mean data"),
        ({"learning_rate": 1.0}, "unknown key learning_rate; did you mean train.lr"),
        ({"temperature": 1.0}, "write rollout__temperature=.. or eval__temperature=.."),
        (
            {"max_new_tokens": 8, "teacher": {"kind": "endpoint", "url": "http://a", "model": "b"}},
            "write rollout__max_new_tokens=.. or teacher__max_new_tokens=..",
        ),
        (
            {"max_new_tokens": 8, "teacher__kind": "endpoint"},
            "write rollout__max_new_tokens=.. or teacher__max_new_tokens=..",
        ),
        ({"path": "x", "kind": "local"}, "write student__path=.. or teacher__path=.."),
        ({"lr": -1.0}, r"train\.lr must be a number > 0 and <= 1, got -1\.0"),
        ({"lr": 0.1, "train__lr": 0.1}, r"train\.lr must be given once"),
        ({"teacher": "tutor"}, "teacher.kind must be one of rule, local, endpoint, retry"),
        (
            {"data": "nowhere.jsonl", "teacher": "retry", "max_new_tokens": 64},
            "must be an existing file",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_settings_are_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(dir=tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


def test_a_file_whose_teacher_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("teacher = 3\n")
    with pytest.raises(ValueError, match="teacher must be a table, got int"):
        train(config=tmp_path / "mine.toml", dir=tmp_path, max_new_tokens=8)


def test_limits_of_a_grader_that_were_set_go_first(tmp_path: Path) -> None:
    """Those that were left alone are the file's."""
    path = tmp_path / "mine.toml"
    path.write_text("[grader]\ncorrect_at = 0.75\ntimeout_s = 5.0\n")
    names = ("student", "data", "teacher", "eval")
    for limits, expected in (({}, (0.75, 5.0)), ({"timeout_s": 7.0}, (0.75, 7.0))):
        grader = CheckedGrader(check_mass, "mine", **limits)
        arguments = {**dict.fromkeys(names), "grader": grader, "config": path}
        settings, _ = collect(arguments, {})
        assert (settings.grader.correct_at, settings.grader.timeout_s) == expected


def test_each_run_tells_its_warnings(tmp_path: Path) -> None:
    """A teacher that fails in two runs of a process is told of twice, in one line each."""
    program = f"""
import warnings
from socpo_fast import train
form = warnings.formatwarning
for name in ("first", "second"):
    train(dir={str(tmp_path)!r}, name=name, teacher=lambda request: 1 / 0, num_batches=1,
          questions_per_batch=2, questions_per_update=2, group_size=2, kv_cache_gib=0.05,
          eval="none", on_silence="continue", quiet=True)
assert warnings.formatwarning is form
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "ZeroDivisionError" in line]
    assert len(said) == 2 and said[0] == said[1]
    assert said[0].startswith("warning: teacher: no guidance, exception: __main__:<lambda> raised")
    assert "warnings.warn(" not in done.stderr


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("data", 7),
        ("data", {"question": "?"}),
        ("student", object()),
        ("grader", 1),
        ("teacher", 1),
    ],
)
def test_values_of_no_kind_are_refused(tmp_path: Path, argument: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"{argument}.* must .*, got "):
        train(dir=tmp_path, **{argument: value})


def test_a_card_shows_no_markup_of_a_model(finished: TrainingRun, tmp_path: Path) -> None:
    """What a model, a teacher or a question says is text on the card, never HTML."""
    assert _pieces(finished._repr_html_()) == ["question", "answer", "guidance", "answer after it"]
    row = next(row for row in finished.rollouts if len(row["turns"]) == 2)
    wrong, right = row["turns"]
    row["question"] = wrong["text"] = right["text"] = "<script>alert(1)</script>"
    wrong["guidance"]["text"] = "<img src=x onerror=alert(1)>"
    right["is_correct"] = True
    folder = tmp_path / "<b>run"
    (folder / "rollouts").mkdir(parents=True)
    (folder / "config.toml").touch()
    (folder / "rollouts" / "batch_000001.jsonl").write_text(json.dumps(row) + "\n")
    card = TrainingRun(folder)._repr_html_()
    assert "<script" not in card and "<img" not in card and "<b>run" not in card
    assert card.count("&lt;script&gt;") == 3 and len(_pieces(card)) == 4


def _pieces(card: str) -> list[str]:
    """Returns the labels of the texts on a card."""
    return re.findall(r"<i>([\w ]+)</i><pre", card)


def test_a_run_without_updates_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.toml").touch()
    run = TrainingRun(tmp_path)
    assert (run.metrics, [*run.rollouts], len(Rollouts(tmp_path))) == ([], [], 0)
    assert "batch 0 of ?" in repr(run) and "batch 0 of ?" in run._repr_html_()
    with pytest.raises(ValueError, match="got no saved update"):
        _ = run.student_folder
    with pytest.raises(ValueError, match="must be the folder of a run"):
        TrainingRun(tmp_path / "none")


def test_public_names_are_listed_and_lazy() -> None:
    assert dir(socpo_fast) == sorted(socpo_fast.__all__)
    program = """
import sys, socpo_fast
assert "train" in dir(socpo_fast) and "torch" not in sys.modules
import socpo_fast.cli, socpo_fast.trainer, socpo_fast.training.update, socpo_fast.training_run
from socpo_fast import train
assert train is socpo_fast.training_run.train
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
