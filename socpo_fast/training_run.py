"""Trains from Python: `train` is the function, TrainingRun what it returns. Read train first.

It does what `socpo train` does with the same settings, bit for bit. Functions and lists have no
place in a configuration file, so they go to the trainer as UserParts, and the settings hold a name:

    train(teacher=fn, lr=1e-5)  ->  Config: teacher.rule = "python:__main__:fn", train.lr = 1e-5
                                    UserParts: teacher = fn

Read collect for that, then TrainingRun and Rollouts, which read the run's folder.
"""

import functools
import inspect
import math
import os
import signal
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from html import escape
from pathlib import Path
from typing import Any

from socpo_fast.config import Config, load_config, read_toml
from socpo_fast.config.text import did_you_mean, expand_home, fields_of, owners_of, unknown_key
from socpo_fast.report.accuracy import sparkline
from socpo_fast.report.folder import run_folder
from socpo_fast.report.live import from_to
from socpo_fast.report.printable import warning_line
from socpo_fast.report.rollouts import batch_files
from socpo_fast.report.settings import read_settings
from socpo_fast.report.status import Score
from socpo_fast.report.tracker import read_jsonl, read_metrics
from socpo_fast.report.write import headline, sample_rollouts, series
from socpo_fast.run_state import last_checkpoint
from socpo_fast.socratic.graders import CheckedGrader, Grader
from socpo_fast.socratic.plugin import text_of
from socpo_fast.socratic.teachers import Teacher, TeacherFunction, as_teacher
from socpo_fast.socratic.user_parts import FROM_PYTHON, UserParts, name_of
from socpo_fast.trainer import Trainer
from socpo_fast.types import Question

Rows = Iterable[Mapping[str, Any] | Question]
CARD_CHARS = 600  # of each text on a notebook's card
CARD_TEXT = "<br><i>{}</i><pre style='white-space: pre-wrap; margin: 0 0 0 2em'>{}</pre>"


def train(
    *,
    student: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | Rows | None = None,
    teacher: str | Mapping[str, Any] | Teacher | TeacherFunction | None = None,
    grader: str | Grader | None = None,
    eval: str | os.PathLike[str] | Rows | None = None,
    config: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> "TrainingRun":
    """Trains a student, or goes on where the same call stopped; returns the run.

        def tutor(request):             # GuidanceRequest: .question, .student_answer, ..
            return "Check the carry."   # text, Guidance, or None: nothing to say

        def grade(text, question):      # the student's text, Question: .ground_truth, ..
            return text.strip() == question.ground_truth

        run = train(
            student="HuggingFaceTB/SmolLM2-135M-Instruct",
            data=[{"question": "17 + 25?", "ground_truth": "42"}, ..],
            teacher=tutor, grader=grade,
            name="sums", num_batches=20, questions_per_batch=8, lr=1e-5,
        )

    It blocks until the run ends. It may be called in a notebook, inside a running event loop, and
    in a thread. Without arguments it trains the built-in student on the built-in task.

    Args:
        student:  "builtin", a Hugging Face folder, such as the student_folder of another run, or
                  the name of a model on the hub.
        data:     the questions to train on: "builtin", a parquet or JSONL file, a folder or hub
                  data set of these; or dicts with question and ground_truth, optional system,
                  reference_solution and data_source (or in verl's layout), or Questions, in any
                  iterable, which is read once. question_idx is given anew, by position.
        teacher:  a plain or async function of a GuidanceRequest that returns Guidance, text or
                  None; an object with such a guide(), or a Teacher, which is not closed;
                  "module:function"; a teacher.kind; or the settings of one as a dict: {"kind":
                  "endpoint", "url": .., "model": ..}. An async function runs on an event loop of
                  another thread, so clients that it uses must not belong to the caller's loop.
        grader:   a plain or async function of the text and the Question that returns a bool, a
                  number in [0, 1] or {part: number}; the name of a grader, such as "exact"; or
                  "module:function". An async one answers for one attempt at a time.
        eval:     held-out questions, as data; "none" for no evaluation, the default with data of
                  your own.
        config:   a TOML file of settings; the arguments override it.
        settings: further settings by the names of `socpo train --help`: lr=1e-5 where one section
                  alone has such a key, else eval__temperature=0. Text is converted as on the
                  command line.

    Files: name (default "run") is the folder in dir (default "runs") that the run writes: its
        config.toml, metrics, rollouts, checkpoints and report. The same call goes on from the last
        checkpoint, and returns a finished run as it is. Other data or settings need another name,
        or accept_changes=True. A function is compared by its name only.

    Signals: Ctrl-C saves and then raises KeyboardInterrupt. SIGTERM and SIGHUP save and then act as
        they would without the run. In a thread that is not the main one, signals do not stop a run.

    Raises:
        ValueError: an unknown or ambiguous setting, a value outside its range, bad data, a folder
            in use, a grader that raised; what had been trained is saved.
        TypeError: an argument is none of the kinds above.
        RuntimeError: the disk is full, or updates are not finite.
        KeyboardInterrupt: see above.
    """
    arguments = {
        "student": student,
        "data": data,
        "teacher": teacher,
        "grader": grader,
        "eval": eval,
        "config": config,
    }
    loaded, parts = collect(arguments, settings)
    # Raised here, where no local variable keeps the student alive for a notebook's debugger.
    received = _run(loaded, parts)
    if received == signal.SIGINT:
        raise KeyboardInterrupt("the run was stopped; the same call goes on")
    if received is not None:
        signal.raise_signal(received)
    return TrainingRun(loaded.folder)


def _run(config: Config, parts: UserParts) -> int | None:
    """Trains; returns the signal that stopped the run early, if one did."""
    # A block of its own makes Python forget which warnings it has shown: they are news of this run.
    with run_folder(config.folder), warnings.catch_warnings(), ExitStack() as stack:
        stack.callback(setattr, warnings, "formatwarning", warnings.formatwarning)
        warnings.formatwarning = warning_line
        trainer = Trainer(config, parts)
        try:
            trainer.run()
        except SystemExit:
            if trainer.signals.received is None:
                raise
            # An exit code is for the command line. Here the caller's own handler decides.
            return trainer.signals.received
    return None


def collect(arguments: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[Config, UserParts]:
    """Returns the configuration and the parts that the arguments of `train` describe.

    Raises:
        ValueError, TypeError: as train.
    """
    for argument in ("student", "config"):
        value = arguments[argument]
        _check(argument, value, "a path or a name", isinstance(value, str | os.PathLike | None))
    train, train_rows = _rows_of("data", arguments["data"])
    held_out, eval_rows = _rows_of("eval", arguments["eval"])
    teacher_values, teacher = _teacher_of(arguments["teacher"])
    grader_values, grader = _grader_of(arguments["grader"])
    values = {
        "student.path": arguments["student"],
        "data.train": train,
        "data.eval": held_out,
        **teacher_values,
        **grader_values,
    }
    values = {key: value for key, value in values.items() if value is not None}
    path = arguments["config"]
    section = {} if path is None else read_toml(path).get("teacher")
    # A section that is no table is refused by load_config.
    file_kind = section.get("kind", "rule") if isinstance(section, Mapping) else "rule"
    # The kind of teacher comes first: it decides which keys there are.
    for name in sorted(settings, key=lambda name: not name.endswith("kind")):
        key = full_name(name, str(values.get("teacher.kind", file_kind)))
        if key in values:
            raise ValueError(f"train: {key} must be given once, got it twice; leave {name}=.. out")
        values[key] = settings[name]
    texts = {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in values.items()}
    return (
        load_config(path, texts),
        UserParts(train=train_rows, eval=eval_rows, teacher=teacher, grader=grader),
    )


def _rows_of(argument: str, data: Any) -> tuple[str | os.PathLike[str] | None, list[Any] | None]:
    """Returns the value of data.train or data.eval, and the rows if there are some."""
    if isinstance(data, str | os.PathLike | None):
        return data, None
    is_list = isinstance(data, Iterable) and not isinstance(data, Mapping | bytes)
    _check(argument, data, "a path, a name or a list of dicts or Questions", is_list)
    rows = list(data)
    return f"{FROM_PYTHON}{len(rows)} rows", rows


def _teacher_of(teacher: Any) -> tuple[dict[str, Any], Teacher | None]:
    """Returns the settings of the teacher's section, and the teacher if it is no setting."""
    if teacher is None:
        return {}, None
    if isinstance(teacher, Mapping):
        return {f"teacher.{key}": value for key, value in teacher.items()}, None
    if not isinstance(teacher, str):
        return {"teacher.kind": "rule", "teacher.rule": name_of(teacher)}, as_teacher(teacher)
    if ":" in teacher or teacher == "builtin":
        return {"teacher.kind": "rule", "teacher.rule": teacher}, None
    return {"teacher.kind": teacher}, None


def _grader_of(grader: Any) -> tuple[dict[str, Any], Grader | None]:
    """Returns the settings of the grader, and the grader if it is no setting."""
    if isinstance(grader, str | None):
        return {"data.grader": grader}, None
    _check("grader", grader, "a name or a function of text and question", callable(grader))
    limits = {}
    if isinstance(grader, CheckedGrader):
        limits = {"grader.correct_at": grader.correct_at, "grader.timeout_s": grader.timeout_s}
        grader = grader.function
    # A limit that was left at its default does not override the file's.
    known = fields_of(Config)
    limits = {key: limit for key, limit in limits.items() if limit != known[key].default}
    return {"data.grader": name_of(grader), **limits}, grader


def _check(argument: str, value: object, rule: str, holds: bool) -> None:
    """Refuses an argument of train that is of no kind that it takes."""
    if not holds:
        raise TypeError(f"train: {argument} must be {rule}, got {text_of(value):.80}")


def full_name(name: str, teacher_kind: str) -> str:
    """Returns "train.lr" of "lr", "train__lr" or "train.lr".

    A key that only other kinds of teachers have is no reason to ask for the long name.

    Raises:
        ValueError: no section has such a key, or several have it.
    """
    known = fields_of(Config)
    dotted = name.replace("__", ".")
    keys = [key for key in known if dotted in (key, key.partition(".")[2])]
    usable = [key for key in keys if teacher_kind in (owners_of(Config, key) or [teacher_kind])]
    if len(keys) == 1 or len(usable) == 1:
        return (usable or keys)[0]
    if keys:
        choices = " or ".join(f"{key.replace('.', '__')}=.." for key in usable)
        raise ValueError(
            f"train: {name} must be the key of one section, got that of {len(usable)}; write "
            f"{choices}"
        )
    short_names = [key.partition(".")[2] for key in known]
    arguments = inspect.signature(train).parameters
    near = did_you_mean(name, [*arguments, *short_names], cutoff=0.7)
    raise ValueError(
        f"train: unknown setting {name}{near}" if near else unknown_key(Config, dotted)
    )


class TrainingRun:
    """A run, read from its folder. TrainingRun("runs/NAME") opens an earlier one.

    Everything is read when it is asked for, so a run can be looked at while it goes on. In a
    notebook it shows itself as a card.

    Attributes:
        folder: the run's folder.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(expand_home(os.fspath(folder)))
        if not (self.folder / "config.toml").is_file():
            raise ValueError(
                f"run: {self.folder} must be the folder of a run, got none there; check the name"
            )

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Returns the rows of metrics.jsonl: {"kind": "batch" | "update" | "eval", ..}."""
        return read_metrics(self.folder / "metrics.jsonl")

    @property
    def rollouts(self) -> "Rollouts":
        """Returns the rollouts of all batches in order; they are read when they are needed."""
        return Rollouts(self.folder)

    @property
    def student_folder(self) -> Path:
        """Returns the last checkpoint, a Hugging Face folder that transformers loads.

        Raises:
            ValueError: no update was saved yet, or no checkpoint is left undamaged.
        """
        checkpoint = last_checkpoint(self.folder)
        if checkpoint is None:
            raise ValueError(
                f"run: {self.folder} must hold a trained student, got no saved update; "
                "the student is still that of the start"
            )
        return checkpoint

    def __repr__(self) -> str:
        return f"TrainingRun({str(self.folder)!r}: {'; '.join(self._lines())})"

    def _repr_html_(self) -> str:
        """Returns a card: accuracy at start and end, its course, and one rescued rollout."""
        _, shares = series(self.metrics, "batch", "success/unassisted")
        lines = [*self._lines(), f"unassisted, batch by batch: {sparkline(shares)}"]
        samples = sample_rollouts(self.folder)
        rescued = [row for row in samples if row["outcome"] == "rescued by guidance"]
        texts = rescued_texts(rescued[-1]) if rescued else {}
        return "".join(
            [
                f"<div><b>{escape(self.folder.name)}</b>",
                *(f"<br>{escape(line)}" for line in lines),
                *(CARD_TEXT.format(label, escape(text)) for label, text in texts.items()),
                "</div>",
            ]
        )

    def _lines(self) -> list[str]:
        """Returns how far the run is, and each kind of accuracy at its start and end."""
        rows = self.metrics
        batch, update = (max((row[key] for row in rows), default=0) for key in ("batch", "update"))
        planned = read_settings(self.folder).get("run", {}).get("num_batches", "?")
        source = headline(rows)["source"]
        kind = "eval" if source == "held-out questions" else "batch"
        lines = [f"batch {batch} of {planned}, update {update}"]
        scores = [Score.of(row, batch=0, update=0) for row in rows if row["kind"] == kind]
        known = [score for score in scores if math.isfinite(score.unassisted)]
        texts = from_to(known[:1] + known[1:][-1:])
        return lines + [f"{name}, {source}: {text}" for name, text in texts.items()]


def rescued_texts(rollout: Mapping[str, Any]) -> dict[str, str]:
    """Returns question, wrong answer, guidance and right answer, each cut to a few lines."""
    *_, wrong, right = rollout["turns"]
    texts = {
        "question": rollout["question"],
        "answer": wrong["text"],
        "guidance": (wrong["guidance"] or {}).get("text"),
        "answer after it": right["text"],
    }
    return {label: str(text)[:CARD_CHARS] for label, text in texts.items()}


class Rollouts(Sequence[dict[str, Any]]):
    """The rollouts of a run as rows of texts and numbers: rollouts[0], rollouts[-8:], a loop.

    A row has batch, question, ground_truth, end_reason and turns; a turn has text, is_correct,
    reward, advantage and guidance, None or with text.

    Files are read when their rows are asked for, and only the last one read is kept. The first and
    the last rollouts need one file; a length and a slice count the lines of all files.
    """

    def __init__(self, run_folder: Path):
        self._paths = batch_files(run_folder)
        self._read = functools.lru_cache(maxsize=1)(read_jsonl)
        self._num_rows = functools.cache(lambda path: path.read_bytes().count(b"\n"))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for path in self._paths:
            yield from self._read(path)

    def __len__(self) -> int:
        return sum(map(self._num_rows, self._paths))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        # Counted from the end that the index counts from: ~index is 0 for the last row.
        num_before = index if index >= 0 else ~index
        for path in self._paths if index >= 0 else reversed(self._paths):
            num_rows = self._num_rows(path)
            if num_before < num_rows:
                return self._read(path)[num_before if index >= 0 else ~num_before]
            num_before -= num_rows
        raise IndexError(f"rollouts: index must be one of {len(self)} rollouts, got {index}")
