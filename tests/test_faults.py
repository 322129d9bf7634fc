"""The fault campaign: it finds lost and mis-rewarded rollouts, and its short form passes."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tools.faults.run import lost_or_misrewarded
from tools.faults.steadiness import growth

ROOT = Path(__file__).resolve().parent.parent


def turn(answer: str, reward: float, guidance: str | None = None) -> dict[str, Any]:
    guidance_row = None if guidance is None else {"text": guidance, "was_shown": True}
    return {"text": f"<answer>{answer}</answer>", "reward": reward, "guidance": guidance_row}


def rollout(idx: int, end_reason: str, *turns: dict[str, Any]) -> dict[str, Any]:
    return {
        "question_idx": 7,
        "rollout_idx": idx,
        "data_source": "",
        "ground_truth": "18",
        "end_reason": end_reason,
        "turns": list(turns),
    }


# One of three first attempts is right, so an attempt after guidance is worth a third.
ROWS = [
    rollout(0, "correct", turn("18", 1.0)),
    rollout(1, "correct", turn("81", 0.0, "Look."), turn("18", 1 / 3)),
    rollout(2, "guidance_failed", turn("81", 0.0)),
]


def set_reward(idx: int, reward: float) -> Callable[[list[dict[str, Any]]], None]:
    def damage(rows: list[dict[str, Any]]) -> None:
        rows[idx]["turns"][-1]["reward"] = reward

    return damage


def change_text(rows: list[dict[str, Any]]) -> None:
    rows[0]["turns"][0]["text"] = "<answer>19</answer>"


def take_guidance(rows: list[dict[str, Any]]) -> None:
    rows[1]["turns"][0]["guidance"] = None


def add_guidance(rows: list[dict[str, Any]]) -> None:
    rows[2]["turns"][0]["guidance"] = {"text": "Look.", "was_shown": False}


DAMAGES: dict[str, tuple[Callable[[list[dict[str, Any]]], object], str]] = {
    "one is lost": (lambda rows: rows.pop(), "has 2 rollouts of 3"),
    "one is there twice": (lambda rows: rows.__setitem__(2, rows[0]), "has 2 rollouts of 3"),
    "help is worth as much as none": (
        set_reward(1, 1.0),
        "question 7 rollout 1 attempt 1: reward 1.0 instead of 0.333",
    ),
    "a right answer earns nothing": (
        set_reward(0, 0.0),
        "question 7 rollout 0 attempt 0: reward 0.0 instead of 1.0",
    ),
    "a failed guidance earns": (
        set_reward(2, 1.0),
        "question 7 rollout 2 attempt 0: reward 1.0 instead of 0.0",
    ),
    "another text was graded": (
        change_text,
        "question 7 rollout 0 attempt 0: reward 1.0 instead of 0.0",
    ),
    "nobody guided": (
        take_guidance,
        "question 7 rollout 1: attempt 1 follows without guidance",
    ),
    "it did not fail": (
        add_guidance,
        "question 7 rollout 2: ended for want of guidance, and has one",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_lost_or_misrewarded_rollouts_are_found(case: str) -> None:
    rows = copy.deepcopy(ROWS)
    assert lost_or_misrewarded(rows, 3) == []
    damage, line = DAMAGES[case]
    damage(rows)
    assert any(fault.startswith(line) for fault in lost_or_misrewarded(rows, 3))


def test_growth_is_found() -> None:
    steady = [{"threads": 3.0, "pages": 9.0, "resident MB": 800.0} for _ in range(40)]
    growing = [
        {"threads": 3.0 + i // 20, "pages": 9.0 + i // 20, "resident MB": 800.0 + 2 * i}
        for i in range(40)
    ]
    assert [growth(steady, name) for name in steady[0]] == [None, None, None]
    assert [growth(growing, name) for name in steady[0]] == [
        "threads 3 -> 4",
        "pages 9 -> 10",
        "resident MB 826 -> 878",
    ]


@pytest.mark.slow
def test_the_short_campaign_holds() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tools.faults", "--short"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    promises = json.loads(result.stdout.splitlines()[-1])["promises"]
    assert len(promises) > 10
    assert all(promise["injected"] for promise in promises)
