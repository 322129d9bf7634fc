"""A teacher that never answers is watch_batch once, with the reason: in runs, evaluations and
tables.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from socpo_fast import measure, trainer
from socpo_fast.config import Config, load_config
from socpo_fast.report.accuracy import accuracy_rows, accuracy_text
from socpo_fast.report.progress import SILENCE, GuidanceWatch, Progress
from socpo_fast.report.tracker import read_metrics
from socpo_fast.training.checkpoint import latest_checkpoint
from socpo_fast.types import Attempt, GuidanceRequest, Rollout, ShownGuidance, Turn
from tests.helpers.faulty_server import Server, raw, reply

CONFIG = Path(__file__).parent.parent.parent / "configs" / "molar_mass.toml"
SMALL = {
    "run.num_batches": 2,
    "run.live": False,
    "data.builtin_train_questions": 8,
    "data.builtin_eval_questions": 2,
    "rollout.questions_per_batch": 2,
    "rollout.group_size": 2,
    "train.questions_per_update": 2,
    "engine.kv_cache_gib": 0.02,
    "eval.samples": 2,
}
NO_MODEL = raw(404, b'{"error": {"message": "no model m"}}')
answer: list[str | None] = [None]


def tutor(_request: GuidanceRequest) -> str | None:
    return answer[0]


def config_of(folder: Path, **changes: object) -> Config:
    sections = {name.replace("__", "."): value for name, value in changes.items()}
    return load_config(CONFIG, SMALL | {"run.dir": str(folder)} | sections)


def endpoint(folder: Path, server: Server, **changes: object) -> Config:
    settings = {"teacher__kind": "endpoint", "teacher__url": server.url, "teacher__model": "m"}
    return config_of(folder, **settings, **changes)


def rows(config: Config, kind: str) -> list[dict]:
    return [row for row in read_metrics(config.folder / "metrics.jsonl") if row["kind"] == kind]


@pytest.mark.parametrize("command", ["train", "eval", "rollout"])
def test_refused_first_call_stops_before_any_batch(
    server: Server, tmp_path: Path, command: str
) -> None:
    server.script = [NO_MODEL]
    config = endpoint(tmp_path, server)
    commands = {
        "train": trainer.train,
        "eval": lambda c: measure.evaluate(c, None),
        "rollout": measure.rollout_only,
    }
    line = (
        "teacher: the first call got no guidance, status_404: status 404: .*no model "
        "m.*on_silence continue"
    )
    with pytest.raises(ValueError, match=line), pytest.warns(UserWarning, match="status_404"):
        commands[command](config)
    assert len(server.seen) == 1
    assert not list(tmp_path.rglob("batch_*.jsonl"))


def test_unassisted_evaluation_needs_no_teacher(server: Server, tmp_path: Path) -> None:
    server.script = [NO_MODEL]
    assert "success/unassisted" in measure.evaluate(
        endpoint(tmp_path, server, eval__assisted=False), None
    )
    assert server.seen == []


def test_silence_is_reported_and_not_called_assisted(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.script = [NO_MODEL]
    config = endpoint(tmp_path, server, teacher__on_silence="continue", run__num_batches=1)
    with pytest.warns(UserWarning, match="status 404") as warnings:
        trainer.train(config)
    assert sum("status_404" in str(w.message) for w in warnings) == 1
    for row in rows(config, "eval"):
        assert row["guidance/failed"] == row["guidance/failed_status_404"] > 0
        assert "success/assisted" not in row
        assert "assisted, with the teacher's help: not known" in accuracy_text(row)
    (batch,) = rows(config, "batch")
    printed = capsys.readouterr().out
    num_failed = f"{batch['guidance/failed']:.0f}"
    assert (
        f"warning: teacher: all {num_failed} guidances of a batch failed (status_404 {num_failed})"
        in printed
    )
    assert f"guidance failed {num_failed}" in printed


def test_batch_without_guidance_stops_and_resumes(tmp_path: Path) -> None:
    config = config_of(tmp_path, teacher__rule=f"{__name__}:tutor", data__eval="none")
    answer[0] = None
    with (
        pytest.raises(
            ValueError, match=r"teacher: all \d+ guidances of a batch failed \(none \d+\); mend it"
        ),
        pytest.warns(UserWarning, match="teacher: no guidance, none"),
    ):
        trainer.train(config)
    assert [row["batch"] for row in rows(config, "batch")] == [1]
    assert latest_checkpoint(config.folder / "checkpoints") is not None
    answer[0] = "Look again."
    trainer.train(config)
    assert [row["guidance/failed"] > 0 for row in rows(config, "batch")] == [True, False]


def batch_of(*guidances: str | None) -> tuple[list[Rollout], dict[str, float]]:
    """Returns rollouts of one batch with one call each (None: it timed out), and their metrics."""
    rollouts = []
    for idx, text in enumerate(guidances):
        turn = Turn(attempt=cast(Attempt, None), text="")
        turn.guidance = None if text is None else ShownGuidance(raw_text=text, text=text)
        rollouts.append(
            Rollout(
                question_idx=0,
                rollout_idx=idx,
                prompt_ids=[1],
                turns=[turn],
                failure="" if text else "timeout",
            )
        )
    num_failed = float(guidances.count(None))
    return rollouts, {"guidance/failed": num_failed, "guidance/failed_timeout": num_failed}


def test_one_timeout_is_no_silence_after_an_answer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A student that is nearly always right has one call a batch, so one timeout is all of them."""
    with Progress(num_batches=1, live=False) as progress:
        watch = GuidanceWatch(progress)
        assert watch.watch_batch(*batch_of("Look.", None)) is None
        assert watch.watch_batch(*batch_of(None)) is None
        assert "all 1 guidances of a batch failed (timeout 1)" in capsys.readouterr().out
        assert watch.watch_batch(*batch_of(*[None] * (SILENCE - 2))) is None
        assert watch.watch_batch(*batch_of()) is None
        assert (
            watch.watch_batch(*batch_of(None))
            == "teacher: all 1 guidances of a batch failed (timeout 1)"
        )
        assert watch.watch_batch(*batch_of("Look.")) is None
        assert watch.watch_batch(*batch_of(None)) is None
        assert GuidanceWatch(progress).watch_batch(*batch_of(None)) is not None


def test_rollouts_without_training_stop_too(tmp_path: Path) -> None:
    answer[0] = None
    config = config_of(tmp_path, teacher__rule=f"{__name__}:tutor", data__eval="none")
    with (
        pytest.raises(ValueError, match="guidances of a batch failed"),
        pytest.warns(UserWarning, match="no guidance"),
    ):
        measure.rollout_only(config)
    assert [path.name for path in tmp_path.rglob("batch_*.jsonl")] == ["batch_000001.jsonl"]


def test_some_failures_mark_the_assisted_share(server: Server, tmp_path: Path) -> None:
    server.script = [reply(), reply("<think>"), reply()]
    config = endpoint(tmp_path, server, teacher__max_concurrency=1)
    with pytest.warns(UserWarning, match="no guidance, cut"):
        metrics = measure.evaluate(config, None)
    assert metrics["guidance/failed"] == metrics["guidance/failed_cut"] == 1
    labels = [row["what"] for row in accuracy_rows(metrics)]
    assert "assisted, with the teacher's help (1 without, as guidance failed)" in labels
    assert "unassisted (avg@k)" in labels


def test_guidance_that_never_fits_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer[0] = "Look again. " * 400
    changes = {
        "rollout__guidance_limit": 700,
        "rollout__max_new_tokens": 128,
        "run__num_batches": 1,
    }
    trainer.train(
        config_of(tmp_path, teacher__rule=f"{__name__}:tutor", data__eval="none", **changes)
    )
    assert (
        "ended there, as a next attempt would exceed the student's context"
        in capsys.readouterr().out
    )
