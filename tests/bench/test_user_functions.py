"""Checks the user's own functions in the policy-head bench: timed if right, else told why not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import measure
from bench.policy_head import __main__ as bench
from bench.policy_head import table
from bench.policy_head.contenders import ours, user_contender
from bench.policy_head.gemms import gemm_choices
from bench.policy_head.problem import Problem, make_problem, random_weight

V = 131
D = 24
T = 40

USERS_OWN = """
import torch


def right(hidden, weight, targets, old_logprobs, advantages, *, weights_N, temperature):
    logits = (hidden @ weight.T).float() / temperature
    logprobs = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
    ratio = (logprobs - old_logprobs).exp()
    advantages.mul_(weights_N)  # its own copy, or all others would be wrong
    return -(advantages * ratio).sum()


def wrong(*inputs, **options):
    return 1.001 * right(*inputs, **options)


def raising(*inputs, weights_N, temperature):
    raise KeyError("logits")


def per_token(hidden, *inputs, weights_N, temperature):
    return hidden.sum(1)


calls = []


def tired(*inputs, **options):
    calls.append(1)
    if len(calls) > 2:
        raise RuntimeError("enough")
    return right(*inputs, **options)
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Yields while a module `mine` with the user's functions can be imported."""
    (tmp_path / "mine.py").write_text(USERS_OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("mine", None)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return make_problem(random_weight(V, D), T, 25)


def test_functions_of_the_users_own(mine: None, problem: Problem) -> None:
    """The right function is timed beside ours; for the others the table says why they are not.

    One gives wrong values, one raises, one returns no scalar, one raises in a later run.
    """
    names = ("right", "wrong", "raising", "per_token", "tired")
    words = [word for name in names for word in ("--peer", f"mine:{name}")]
    args = bench.parse(["--repeats", "3", *words])
    tiles = gemm_choices(T, V, measure.CPU)[:1]
    rows, _ = table.measure_rows(problem, [ours("auto"), *args.peer], tiles, args, whole=[])
    notes: dict[str, list[str]] = {}
    for row in rows:  # over all rows, then over the loss rows
        notes.setdefault(row.contender, []).append(row.note)
        assert (row.times is None) == (row.note != "")
    assert notes["ours"] == [""] and notes["mine:right"] == ["", ""]
    assert all("WRONG, not timed: loss off by" in note for note in notes["mine:wrong"])
    assert all("dX 0.001, dW 0.001" in note for note in notes["mine:wrong"])
    raised = "RAISED, not timed: KeyError: 'logits' (mine.py line 18)"
    assert notes["mine:raising"] == [raised] * 2
    scalar = "TypeError: mine:per_token must return a tensor without dimensions, got shape [40]"
    assert scalar in notes["mine:per_token"][0]
    assert notes["mine:tired"][0].startswith("RAISED in a later run: RuntimeError: enough")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("mine", "bench: --peer must be \"module:function\", got 'mine'"),
        ("mine:none", "bench: --peer must name a function of mine ("),
        ("no_such:f", "bench: --peer must name a module that can be imported, got 'no_such:f'"),
    ],
)
def test_functions_that_are_not_there_are_refused(
    mine: None, spec: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.parse(["--peer", spec])
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 1 and lines[0].startswith(words)


def test_our_own_op_fits_the_form(problem: Problem) -> None:
    """Our op takes the arguments of a user's function; the error names its result, no scalar."""
    contender = user_contender("socpo_fast.ops:linear_policy_loss")
    with pytest.raises(TypeError, match="must return a tensor without dimensions, got PolicyLoss"):
        contender.gradients(problem)
