"""What a newcomer meets first: demo, init, the plan of a run, dry runs, eval.json, a run's end."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from socpo_fast.cli import STARTER, STARTER_FILES, main
from socpo_fast.config import load_config
from socpo_fast.report import progress
from socpo_fast.report.evaluations import add_evaluation, read_evaluations
from socpo_fast.report.folder import run_folder
from socpo_fast.report.tracker import read_metrics
from socpo_fast.socratic.data import load_questions
from socpo_fast.socratic.tasks.molar_mass import (
    ATOMIC_MASSES,
    parse_formula,
    reference_lines,
    render,
    tutor,
    work_out,
)
from socpo_fast.starter.grader import grade
from socpo_fast.starter.teacher import MASSES, guide
from socpo_fast.trainer import Trainer
from socpo_fast.training import checkpoint
from socpo_fast.types import GuidanceRequest, Question, RolloutKey
from tests.helpers.bad_input import assert_refused, finished_run, run_dir, snapshot, words_of

__all__ = ["finished_run", "run_dir"]  # fixtures
Capture = pytest.CaptureFixture[str]
SHIPPED = load_questions(str(STARTER / "questions.jsonl"), grader="exact")
DRY = {"--dry-run": None}


def socpo(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs the program in a folder, as its user would."""
    return subprocess.run(
        [sys.executable, "-m", "socpo_fast.cli", *words],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(STARTER.parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )


def test_demo_says_first_what_it_loads(tmp_path: Path) -> None:
    """The first line comes before torch is imported, and the plan soon after."""
    command = [sys.executable, "-m", "socpo_fast.cli", "demo", "--dry-run"]
    environment = os.environ | {"PYTHONPATH": str(STARTER.parents[1]), "OMP_NUM_THREADS": "1"}
    before = os.times()
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading PyTorch ..\n"
        loaded = Path(f"/proc/{process.pid}/maps")
        assert not loaded.exists() or "libtorch" not in loaded.read_text()
        lines = process.stdout.read().splitlines()
    after = os.times()
    seconds = after.children_user - before.children_user
    seconds += after.children_system - before.children_system
    assert process.returncode == 0
    assert lines[0] == "loading the student builtin .."
    assert lines[1].startswith("run molar_mass from the start: 0.8M parameters, cpu; ops: ")
    assert lines[2:-1] == [
        "  questions      20,000 to train on, 200 held out",
        "  batches        40 of 128 rollouts (16 questions x 8), 5,120 in all",
        "  updates        80 in all, 2 a batch",
        "  evaluations    11 of 800 rollouts (200 questions x 4), 8,800 in all",
        "  most guidance  5,120 calls in batches, 8,800 calls in evaluations",
        "  most tokens    1.3M sampled in batches, 2.3M sampled in evaluations",
        "  memory         KV cache 0.25 GiB, weights 0.003 GiB, AdamW 0.006 GiB, and activations",
    ]
    assert lines[-1].startswith("dry run: nothing was computed; the time left is estimated after")
    assert list(tmp_path.iterdir()) == [], "a dry run leaves nothing behind"
    # Of CPU, so that a busy machine makes no difference.
    assert seconds < 30, f"{seconds} s"


def test_init_writes_a_run_that_runs(tmp_path: Path) -> None:
    """From an empty folder to a report, with the commands that each step names."""
    made = socpo("init", "my task", cwd=tmp_path)
    assert made.stdout.endswith("next: cd 'my task' && socpo train --config config.toml\n")
    folder = tmp_path / "my task"
    assert sorted(path.name for path in folder.iterdir()) == sorted(STARTER_FILES)
    small = ["--run.num_batches", "1", "--rollout.questions_per_batch", "4"]
    small += ["--rollout.group_size", "2", "--train.questions_per_update", "4"]
    trained = socpo("train", "--config", "config.toml", *small, cwd=folder)
    assert trained.returncode == 0, trained.stderr
    assert trained.stderr == ""
    assert "loading questions questions.jsonl ..\n" in trained.stdout
    assert "  questions      20 to train on\n" in trained.stdout
    [batch] = [
        row for row in read_metrics(folder / "runs/run/metrics.jsonl") if row["kind"] == "batch"
    ]
    assert batch["guidance/rate"] > 0
    assert batch["guidance/failed"] == 0
    reported = socpo("report", cwd=folder)
    assert reported.stdout == "runs/run/report.html\n"


def test_init_never_overwrites(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "teacher.py").write_text("mine")
    assert main(["init", str(tmp_path)]) == 2
    assert_refused(capsys.readouterr().err, "init: .* without files of these names, got .*/teacher")
    assert snapshot(tmp_path) == {"teacher.py": b"mine"}
    assert main(["init", str(tmp_path / "teacher.py")]) == 2
    assert_refused(capsys.readouterr().err, "init: .*/teacher.py must be a folder")
    (tmp_path / "other" / "teacher.py").mkdir(parents=True)
    assert main(["init", str(tmp_path / "other")]) == 2
    assert_refused(capsys.readouterr().err, "init: .* without files of these names, got .*/teacher")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["teacher.py"]


def request_of(question: Question, answer: str) -> GuidanceRequest:
    return GuidanceRequest(
        question=question.text,
        student_answer=answer,
        ground_truth=None,
        reference_solution=None,
        key=RolloutKey(0, question.question_idx),
        rollout_idx=0,
        attempt_idx=0,
    )


def test_the_starters_teacher_finds_every_flaw() -> None:
    """On each shipped question it says what the tutor of the built-in task says."""
    assert len(SHIPPED) == 20
    assert MASSES == ATOMIC_MASSES
    for question in SHIPPED:
        formula = parse_formula(question.text)
        flaws = [
            render(reference_lines(formula), answer=1),
            render(work_out([(s, n % 4 + 1, ATOMIC_MASSES[s]) for s, n in formula.items()])),
            render(work_out([(s, n, ATOMIC_MASSES[s] + 1) for s, n in formula.items()])),
            render(reference_lines(formula)[:-1]),
            render([line._replace(product=1) for line in reference_lines(formula)]),
            render([line._replace(total=1) for line in reference_lines(formula)]),
        ]
        for answer in flaws:
            assert guide(request_of(question, answer)) == tutor(request_of(question, answer))
        assert not grade(flaws[0], question)
        assert grade(render(reference_lines(formula)), question)
    for text in ("", "<answer>", "9" * 5000, "\ud800"):
        assert isinstance(guide(request_of(SHIPPED[0], text)), str)
        assert grade(text, SHIPPED[0]) is False


@pytest.mark.parametrize("command", ["train", "eval", "rollout"])
def test_a_dry_run_computes_and_writes_nothing(
    command: str, tmp_path: Path, capsys: Capture
) -> None:
    assert main(words_of(command, tmp_path / "runs", DRY)) == 0
    printed = capsys.readouterr().out
    assert "\ndry run: nothing was computed; " in printed
    assert list(tmp_path.iterdir()) == []
    # 2 questions x 1 sample held out; batches of 2 questions x 2. Two attempts of 128 tokens.
    assert ("4 rollouts (2 questions x 2), 4 in all" in printed) == (command != "eval")
    assert ("2 rollouts (2 questions x 1)" in printed) == (command != "rollout")
    assert ("\n  updates" in printed) == (command == "train")
    tokens = {"train": "1,024 sampled in batches, 1,024 sampled in evaluations"}
    tokens |= {"eval": "512 sampled in evaluations", "rollout": "1,024 sampled in batches"}
    assert f"  most tokens    {tokens[command]}\n" in printed


@pytest.mark.parametrize(("num_batches", "says"), [(1, "already finished"), (3, "2,048 sampled")])
def test_a_dry_run_beside_a_training(
    num_batches: int, says: str, run_dir: Path, capsys: Capture
) -> None:
    """It takes no lock and leaves each byte of the run, whether something is left to do or not."""
    files = snapshot(run_dir)
    with run_folder(run_dir / "run"):
        assert main(words_of("train", run_dir, DRY | {"run.num_batches": num_batches})) == 0
    assert says in capsys.readouterr().out
    assert snapshot(run_dir) == files
    with run_folder(run_dir / "other"):
        assert main(words_of("rollout", run_dir, DRY | {"run.name": "other"})) == 0
    assert snapshot(run_dir) == files


def test_quiet_hides_no_failure(
    run_dir: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object) -> None:
        raise OSError("disk full")

    config = load_config(run_dir / "run" / "config.toml")
    quiet = config.run.model_copy(update={"quiet": True, "dir": str(run_dir), "num_batches": 2})
    monkeypatch.setattr("socpo_fast.report.write.write_report", fail)
    with run_folder(run_dir / "run"):
        trainer = Trainer(config.model_copy(update={"run": quiet}))
        trainer.session.bridge.notes = ("the template deviates",)
        with pytest.warns(UserWarning, match=r"report: .*report.html was not written \(disk full"):
            trainer.run()
    note, end = capsys.readouterr().out.splitlines()[-2:]
    assert note == "the template deviates"
    assert end.startswith("run run: finished; ")


def test_quiet_commands_print_how_they_end(tmp_path: Path, capsys: Capture) -> None:
    words = {"--quiet": None, "data.eval": "none"}
    for command, name in (("train", "run"), ("rollout", "others")):
        assert main(words_of(command, tmp_path, words | {"run.name": name})) == 0
        [line] = capsys.readouterr().out.splitlines()
        assert "finished" in line
    assert main(words_of("eval", tmp_path, {"--quiet": None})) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert "success/unassisted" in json.loads(last)


def test_eval_saves_beside_the_run(run_dir: Path, capsys: Capture) -> None:
    files = snapshot(run_dir / "run")
    assert main(words_of("eval", run_dir, {"eval.samples": 3})) == 0
    assert (
        main(words_of("eval", run_dir, {"checkpoint": run_dir / "run/checkpoints/update_000001"}))
        == 0
    )
    *_, last = capsys.readouterr().out.splitlines()
    path = run_dir / "run" / "eval.json"
    first, second = json.loads(path.read_text())
    assert second["metrics"] == json.loads(last)
    assert first["checkpoint"] == second["checkpoint"]
    assert first["checkpoint"].endswith("run/checkpoints/update_000001")
    assert "3 samples of 128 tokens" in first["measured_by"]
    assert (first["data"], first["when"][:2]) == ("builtin", "20")
    new_files = snapshot(run_dir / "run")
    assert new_files.pop("eval.json")
    for name in [name for name in new_files if name.startswith("tb/eval/")]:
        del new_files[name]
    assert new_files == files
    assert main(["report", str(run_dir / "run")]) == 0
    page = (run_dir / "run" / "report.html").read_text()
    assert page.count(f"<td><code>{first['checkpoint']}</code></td>") >= 2
    path.write_text('[{"metrics": 3}]')
    with pytest.warns(UserWarning, match=r"eval: nothing was saved \(eval: .*eval.json must be a"):
        assert main(words_of("eval", run_dir, {})) == 0
    assert path.read_text() == '[{"metrics": 3}]', "what is not ours stays"
    assert "success/unassisted" in json.loads(capsys.readouterr().out.splitlines()[-1])


def test_evaluations_hold_what_json_can(tmp_path: Path) -> None:
    names = {"checkpoint": "c", "data": "d", "measured_by": "m"}
    for value in (0.5, float("nan")):
        add_evaluation(tmp_path / "run", {"success/unassisted": value}, **names)
    values = [row["metrics"]["success/unassisted"] for row in read_evaluations(tmp_path / "run")]
    assert values == [0.5, None]
    json.loads((tmp_path / "run" / "eval.json").read_text(), parse_constant=pytest.fail)


def test_rollouts_keep_their_metrics(tmp_path: Path, capsys: Capture) -> None:
    words = {"run.num_batches": 2, "run.name": "others"}
    assert main(words_of("rollout", tmp_path, words)) == 0
    printed = capsys.readouterr().out
    assert "rollouts of others, without updates: 0.8M parameters, cpu" in printed
    rows = read_metrics(tmp_path / "others" / "rollouts" / "metrics.jsonl")
    assert [(row["kind"], row["batch"], row["update"]) for row in rows] == [
        ("batch", 1, 0),
        ("batch", 2, 0),
    ]
    assert all(row["perf/rollout_tok_s"] > 0 for row in rows)
    assert not (tmp_path / "others" / "metrics.jsonl").exists(), "that is a training's"
    assert main(["report", str(tmp_path / "others")]) == 0
    assert "Accuracy" in (tmp_path / "others" / "report.html").read_text()
    # A training may still begin in this folder, or the rollouts be made again.
    assert main(words_of("rollout", tmp_path, words | {"run.num_batches": 1})) == 0
    rollouts = tmp_path / "others" / "rollouts"
    assert {path.name for path in rollouts.iterdir()} == {"batch_000001.jsonl", "metrics.jsonl"}
    assert main(words_of("train", tmp_path, words)) == 0


def test_report_names_the_runs_near(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    for words, advice in (
        ([], "report: runs/run must be a run folder, got none there; socpo demo makes one"),
        ([], "report: runs/run must be .*; runs are runs/a, runs/b$"),
        (["."], "report: . must be a run folder, got none there; runs are runs/a, runs/b$"),
        (["runs"], "report: runs must be a run folder, got none there; runs are runs/a, runs/b$"),
    ):
        assert main(["report", *words]) == 2
        assert_refused(capsys.readouterr().err, advice)
        for name in ("a", "b"):
            Path("runs", name, "rollouts").mkdir(parents=True, exist_ok=True)
        Path("config.toml").touch()  # what `socpo init` writes makes no run
    assert snapshot(tmp_path).keys() == {"config.toml"}


def test_a_long_evaluation_tells_how_far_it_is(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Off a terminal, where nothing else would be seen until its end."""
    monkeypatch.setattr(progress, "PLAIN_LINE_S", 0.0)
    assert main(words_of("eval", run_dir, {"eval.samples": 2})) == 0
    counted = re.findall(r"^evaluation (\d)/4, elapsed ", capsys.readouterr().out, re.MULTILINE)
    assert counted == ["1", "2", "3", "4"]


def test_ones_own_checkpoint_is_read_once(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes are compared when it is looked for; that of others when it is loaded."""
    hashed: list[str] = []
    fingerprint = checkpoint._fingerprint

    def count(path: Path) -> dict[str, Any]:
        hashed.append(path.name)
        return fingerprint(path)

    monkeypatch.setattr(checkpoint, "_fingerprint", count)
    assert main(words_of("eval", run_dir, {})) == 0
    assert hashed.count("model.safetensors") == 1
    hashed.clear()
    other = run_dir / "run" / "checkpoints" / "update_000001"
    assert main(words_of("eval", run_dir, {"checkpoint": other, "run.name": "other"})) == 0
    assert hashed.count("model.safetensors") == 1


def test_eval_without_a_run_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped run.name must not pass for the accuracy of a trained student."""
    monkeypatch.chdir(tmp_path)
    small = ["--data.builtin_eval_questions", "2", "--eval.samples", "1", "--quiet"]
    with pytest.warns(UserWarning, match="eval: runs/nope has no checkpoint; this is builtin"):
        assert main(["eval", "--run.name", "nope", *small]) == 0
