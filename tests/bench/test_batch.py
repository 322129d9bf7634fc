"""Checks the bench of whole batches, and the peer's update in bench.update, on a tiny student."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from bench import batch, update
from tests.helpers.tiny_tokenizers import family
from tests.helpers.tiny_trl import make_model


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a tiny Llama with a tokenizer that has a chat template."""
    folder = tmp_path_factory.mktemp("student")
    make_model().save_pretrained(folder)
    family("smollm2").save_pretrained(folder)
    return folder


def options_of(student: Path) -> list[str]:
    threads = str(torch.get_num_threads())
    return ["--student", str(student), "--quick", "--rounds", "1", "--threads", threads]


def test_batches_of_equal_work(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Our loop, TRL with its own generation, and TRL with our engine all sample as much."""
    data = tmp_path / "questions.jsonl"
    rows = [{"question": f"the sum of {i} and two?", "ground_truth": str(i)} for i in range(4)]
    data.write_text("\n".join(map(json.dumps, rows)))
    file = tmp_path / "report.json"
    batch.main([*options_of(student), "--data", str(data), "--json", str(file)])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report.pop("bench") == "batch"
    assert report.keys() == {"ours", "trl", "trl+ours"}
    assert report["ours"]["num_sampled"] == report["trl"]["num_sampled"] == 2 * 2 * 2 * 6
    assert report["ours"]["ours_is_times_faster"] == 1
    assert all(x["rollouts_s"] > 0 and x["update_s"] > 0 for x in report.values())
    assert json.loads(file.read_text(encoding="utf-8"))["contenders"] == report


def test_other_work_is_not_timed() -> None:
    args = argparse.Namespace(questions=2, group_size=2, new=6)
    with pytest.raises(RuntimeError, match="trl must make 4 rollouts of two attempts of 6 tokens"):
        batch.check_work(batch.Timed(1.0, 1.0, []), "trl", args)


def test_update_beside_trl(student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """TRL's gradient of the same rollouts is ours, which the bench checks before it times."""
    update.main([*options_of(student), "--peers", "trl", "--cases", "b"])
    packings = json.loads(capsys.readouterr().out.splitlines()[-1])["b"]["packings"]
    assert packings.keys() == {"tree", "rows", "trl"}
    assert packings["trl"]["tokens_forwarded"] >= packings["rows"]["tokens_forwarded"]
    assert packings["trl"]["microbatch"] in (2, 4)
