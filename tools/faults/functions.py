"""Runs with user-defined rules and graders that exit, hang, raise or return nonsense.

First the rules (functions that give guidance), then the graders, then the promises: read functions.
A run finds them by the names in this module.
"""

from __future__ import annotations

import asyncio
import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from socpo_fast.socratic.graders import grade_exact
from socpo_fast.types import GuidanceRequest, Question
from tools.faults.run import Faults, Promise, batch_rows

ADVICE = "Check the sum."
LIMIT_S = 2.0
_stop = threading.Event()  # set at the end, so that threads which still hang can go


def _is_hit(request: GuidanceRequest) -> bool:
    """Whether this call is one that fails: half of all calls, the same ones in every run."""
    return random.Random(f"{request.key} {request.rollout_idx}").random() < 0.5


def exits(request: GuidanceRequest) -> str:
    if _is_hit(request):
        raise SystemExit(3)
    return ADVICE


def interrupts(request: GuidanceRequest) -> str:
    if _is_hit(request):
        raise KeyboardInterrupt
    return ADVICE


def raises(request: GuidanceRequest) -> str:
    # A KeyError in half of the calls: a mistake as users make it, not an explicit raise.
    return {False: ADVICE}[_is_hit(request)]


def recurses(request: GuidanceRequest) -> str:
    return recurses(request) if _is_hit(request) else ADVICE


def returns_a_number(request: GuidanceRequest) -> Any:
    return 3 if _is_hit(request) else ADVICE


def returns_nothing(request: GuidanceRequest) -> str | None:
    return None if _is_hit(request) else ADVICE


def hangs(request: GuidanceRequest) -> str:
    if _is_hit(request):
        _stop.wait(600)
    return ADVICE


async def awaits_without_end(request: GuidanceRequest) -> str:
    if _is_hit(request):
        await asyncio.sleep(600)
    return ADVICE


async def blocks_its_loop(request: GuidanceRequest) -> str:
    # Blocks the event loop itself, so the other calls on it wait as well; hence fewer hits.
    if request.rollout_idx == 0 and request.key.question % 2:
        _stop.wait(600)
    await asyncio.sleep(0)
    return ADVICE


async def exits_later(request: GuidanceRequest) -> str:
    await asyncio.sleep(0)
    return exits(request)


def changes_global_state(_request: GuidanceRequest) -> str:
    """Changes the process's random state, grad mode and output, none of which a run may rely on."""
    random.seed(1)
    torch.manual_seed(1)
    torch.set_grad_enabled(False)
    print("a rule may print", file=sys.stderr)
    return ADVICE


def hangs_always(_request: GuidanceRequest) -> str:
    _stop.wait(600)
    return ADVICE


# Rule -> the kind of failure that a run must count; "" where it must count none.
RULES = {
    exits: "exception",
    interrupts: "exception",
    raises: "exception",
    recurses: "exception",
    returns_a_number: "exception",
    returns_nothing: "none",
    hangs: "timeout",
    awaits_without_end: "timeout",
    blocks_its_loop: "timeout",
    exits_later: "exception",
    changes_global_state: "",
}


# The texts graded so far in this run. A batch has 16 first attempts and at most 16 second ones, so
# a grader that fails after 40 grades does so in the second or third batch, when there is something
# to save.
_graded: list[str] = []
GOOD_GRADES = 40


def _grade(text: str, question: Question, fault: Callable[[], Any]) -> Any:
    """Grades correctly at first, then calls `fault`."""
    _graded.append(text)
    return grade_exact(text, question) if len(_graded) <= GOOD_GRADES else fault()


def _throw(error: BaseException) -> Any:
    raise error


def _hang() -> Any:
    while True:
        time.sleep(0.1)


def grade_exits(text: str, question: Question) -> Any:
    return _grade(text, question, lambda: _throw(SystemExit(3)))


def grade_interrupts(text: str, question: Question) -> Any:
    return _grade(text, question, lambda: _throw(KeyboardInterrupt()))


def grade_raises(text: str, question: Question) -> Any:
    return _grade(text, question, lambda: _throw(KeyError("x")))


def grade_nan(text: str, question: Question) -> Any:
    return _grade(text, question, lambda: float("nan"))


def grade_two(text: str, question: Question) -> Any:
    return _grade(text, question, lambda: 2)


def grade_hangs(text: str, question: Question) -> Any:
    return _grade(text, question, _hang)


async def grade_later(_text: str, _question: Question) -> Any:
    return True


GRADERS = (
    grade_exits,
    grade_interrupts,
    grade_raises,
    grade_nan,
    grade_two,
    grade_later,
    grade_hangs,
)


def functions(faults: Faults) -> list[Promise]:
    """Checks the promises about user-defined functions."""
    _stop.clear()
    promises = [rules(faults), graders(faults), hung(faults)]
    _stop.set()
    return promises


def rules(faults: Faults) -> Promise:
    """Trains with each rule: the run must end well, name the rule and count its failures."""
    promise = Promise(
        "A rule that exits, hangs, raises or returns anything costs its own guidance, and is named",
        "tests/socratic/test_user_functions.py",
    )
    names = list(RULES)
    for rule in faults.random.sample(names, 3) if faults.short else names:
        run = f"rule_{rule.__name__}"
        kind = RULES[rule]
        changes = {
            "teacher__rule": f"{__name__}:{rule.__name__}",
            "teacher__guidance_timeout_s": 0.5,
        }
        outcome = faults.train(run, **changes)
        fault = outcome.must_end(0, saying=f"teacher: no guidance, {kind}" if kind else "")
        if kind == "exception" and f"{rule.__name__} " not in outcome.err:
            fault = fault or f"not named: {outcome.err}"
        rows = batch_rows(faults.folder / run)
        failure_keys = {key for row in rows for key in row if "failed_" in key}
        if failure_keys != ({f"guidance/failed_{kind}"} if kind else set()):
            fault = fault or f"counted {sorted(failure_keys)} instead of {kind}"
        case = f"a rule that {rule.__name__.replace('_', ' ')}"
        promise.check(case, fault, faults.audit(run, **changes))
    return promise


def graders(faults: Faults) -> Promise:
    """Trains with each grader: the run must stop, name it and save the batches before it."""
    promise = Promise(
        "A grader that exits, hangs, raises or returns no verdict ends the run in one line that "
        "names it, and what was trained is saved",
        "tests/socratic/test_user_graders.py",
    )
    for grader in faults.random.sample(GRADERS, 2) if faults.short else GRADERS:
        changes = {
            "data__grader": f"{__name__}:{grader.__name__}",
            "grader__timeout_s": 0.5,
            "run__num_batches": 4,
        }
        _graded.clear()
        run = f"grader_{grader.__name__}"
        outcome = faults.train(run, **changes)
        fault = outcome.must_end(2, saying=grader.__name__)
        num_batches = len(batch_rows(faults.folder / run))
        saved = [*(faults.folder / run / "checkpoints").glob(f"update_{2 * num_batches:06d}")]
        # Two updates a batch. grade_later fails at its first grade: there is nothing to save yet.
        is_kept = bool(saved) if num_batches else grader is grade_later
        lost = None if is_kept else f"{num_batches} batches are not saved"
        case = grader.__name__.replace("_", " ")
        promise.check(case, fault, lost, faults.audit(run, **changes))
    return promise


def hung(faults: Faults) -> Promise:
    """Lets every call of a rule hang: together they must cost no more than one time limit."""
    promise = Promise(
        f"However many calls of a rule hang, together they cost its limit of {LIMIT_S:g} s",
        "tests/socratic/test_user_functions.py",
    )
    changes: dict[str, Any] = {
        "teacher__guidance_timeout_s": LIMIT_S,
        "teacher__on_silence": "continue",
        "run__num_batches": 1,
        "rollout__questions_per_batch": 16,
    }
    seconds = []
    for rule in ("builtin", f"{__name__}:hangs_always"):
        run = "hung" if ":" in rule else "not_hung"
        outcome = faults.train(run, teacher__rule=rule, **changes)
        (batch,) = batch_rows(faults.folder / run)
        # The same batch with a rule that answers and with one that hangs: the difference is the
        # cost.
        seconds.append(batch["time/rollout_s"])
    num_hung = batch["guidance/failed_timeout"]
    more_s = seconds[1] - seconds[0]
    fault = None if more_s < LIMIT_S + 0.1 else f"cost {more_s:.2f} s"
    promise.check(f"{num_hung:.0f} calls hang", outcome.must_end(0), fault)
    promise.figure = f"{num_hung:.0f} hung calls cost {more_s:.2f} s"
    return promise
