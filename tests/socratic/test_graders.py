"""Graders: tables of texts that count as a right answer, and of texts that must not."""

import os
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from socpo_fast.socratic.graders import (
    CheckedGrader,
    MathGrader,
    as_grader,
    chosen_letter,
    make_grader,
)
from socpo_fast.types import Question


def question(ground_truth: str) -> Question:
    return Question(
        question_idx=0,
        messages=({"role": "user", "content": "?"},),
        ground_truth=ground_truth,
        data_source="test",
    )


@pytest.mark.parametrize(
    ("text", "is_correct"),
    [
        ("<reasoning>\nx\n</reasoning>\n<answer>\nB\n</answer>", True),
        ("<answer>\r\nB\r\n</answer>\r\n", True),
        ("<answer>\nA\n</answer> no, <answer>\nB\n</answer>", True),
        ("<answer>\nB\n</answer> no, <answer>\nA\n</answer>", False),
        # The last strict block counts, not the last block.
        ("<answer>\nB\n</answer> then <answer>\nnone\n</answer>", True),
        ("<answer>\r\nA\r\n</answer>\n<answer>\nB\r\n</answer>", True),
        ("<answer>\rB\r</answer>", False),
        ("<answer>\n\nB\n</answer>", False),
        ("<answer>\n B\n</answer>", False),
        ("<ANSWER>\nB\n</ANSWER>", False),
        ("<answer>\nE\n</answer>", False),
        ("<answer>\nAB\n</answer>", False),
        ("<answer>\nB", False),
        ("<answer>\n<answer>\nB\n</answer>\n</answer>", True),
        ("<answer>B</answer>", False),
        ("<answer>\nB.\n</answer>", False),
        ("<answer>\nb\n</answer>", False),
        ("The answer is B", False),
        ("", False),
    ],
)
def test_sciknoweval_is_strict(text: str, is_correct: bool) -> None:
    assert make_grader("sciknoweval")(text, question("B")) is is_correct


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("<answer>\nB\n</answer>", "B"),
        ("The answer is A. <answer> (C) 7.36 N </answer>", "C"),
        ("<answer>b</answer>", "B"),
        ("<answer>\n**D**\n</answer>", "D"),
        ("<answer>\nThe correct answer is C.\n</answer>", "C"),
        ("<answer>$\\boxed{D}$</answer>", "D"),
        ("so \\boxed{\\text{C}}", "C"),
        ("The answer is B.", "B"),
        ("The answer is (B) because", "B"),
        ("the answer is A because of drag", "A"),
        ("Answer: **B**", "B"),
        ("answer: B. 7.36", "B"),
        ("The correct answer is option C.", "C"),
        ("The answer to this question is D", "D"),
        ("The answer is not A but the best choice is B", "B"),
        ("I first thought the answer is A. The answer is D.", "D"),
        ("Option D is correct, as shown.", "D"),
        ("Reasoning first.\n\nC", "C"),
        ("Reasoning first.\n(C).\nDone", "C"),
        ("It must be (D).", "D"),
        ("B: 7.36 N", "B"),
        # none of the following texts settles on a letter
        ("A particle of charge q sits in a cube.", None),
        ("The answer is a force.", None),
        ("The answer is A particle.", None),
        ("I think so.", None),
        ("A: 1\nB: 2\nC: 3\nD: 4", None),
        ("The options are (A) one, (B) two.", None),
        ("The answer is DNA.", None),
        ("Vitamin C helps.", None),
        ("<answer>\nI think it is heat\n</answer>", None),
        ("<answer></answer>", None),
        ("", None),
    ],
)
def test_mcq_is_lenient_but_no_guess(text: str, letter: str | None) -> None:
    assert chosen_letter(text) == letter
    assert make_grader("mcq")(text, question("B")) is (letter == "B")


@pytest.mark.parametrize(
    ("text", "truth", "is_correct"),
    [
        ("<answer>\n18.00\n</answer>", "18.0", True),
        ("<answer> water </answer>", "water", True),
        ("<answer>1</answer><answer>2</answer>", "2", True),
        ("<answer>2</answer><answer>1</answer>", "2", False),
        ("  42\n", "42", True),
        ("-3.50", "-3.5", True),
        ("it is 42", "42", False),
        ("018", "18", False),  # leading zeros may matter, as in a code
        ("810", "810", True),
        ("8100", "810", False),
        ("Water", "water", False),
        ("1_0", "10", False),
        ("NaN", "nan", False),
        ("٣", "3", False),
        ("", "0", False),
    ],
)
def test_exact(text: str, truth: str, is_correct: bool) -> None:
    assert make_grader("exact")(text, question(truth)) is is_correct


def test_math_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ValueError, match=r"; pip install '\.\[math\]' in a checkout$"):
        make_grader("math")


@pytest.mark.parametrize(
    ("text", "truth", "is_correct"),
    [
        ("so $x = \\frac{1}{2}$ and the answer is \\boxed{0.5}", "\\frac{1}{2}", True),
        ("\\boxed{\\sqrt{8}}", "2\\sqrt{2}", True),
        ("\\boxed{3}", "4", False),
        ("no formula here", "4", False),
        ("\\boxed{", "4", False),
    ],
)
def test_math(text: str, truth: str, is_correct: bool) -> None:
    pytest.importorskip("math_verify")
    assert make_grader("math")(text, question(truth)) is is_correct


@pytest.mark.slow
def test_math_bounds_hostile_answers(capfd: pytest.CaptureFixture[str]) -> None:
    """They are wrong within the time limit, print nothing, and do not affect the next answer."""
    pytest.importorskip("math_verify")
    grade = make_grader("math")
    # These take ages inside a single C call, which no signal interrupts.
    towers = ("9^{9^{9^{9}}}", "9^{9^{9^{9}}}-9^{9^{9^{9}}}")
    for text in (
        *towers,
        "{" * 20_000,
        "1" * 10_000,
        "\x00",
        "\ud800",
        "\\sqrt{" * 50,
        "x=1+" * 1000,
        "4\n5",
    ):
        started = time.perf_counter()
        assert grade("\\boxed{" + text + "}", question("4")) is False
        # The limit is 5 s and a worker starts in 1 s, but the machine may be busy.
        assert time.perf_counter() - started < 60
        assert grade("so \\boxed{8/2}", question("4")) is True
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[str]]:
    """Records the processes that graders start."""
    started: list[subprocess.Popen[str]] = []
    popen = subprocess.Popen

    def start(*args: Any, **kwargs: Any) -> subprocess.Popen[str]:
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    return started


def test_math_killed_worker_costs_one_answer(workers: list[subprocess.Popen[str]]) -> None:
    """The worker may have been started from another thread; a new one grades the next answer."""
    pytest.importorskip("math_verify")
    grade = MathGrader()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(grade, "\\boxed{4}", question("4")).result() is True
    [worker] = workers
    worker.kill()
    worker.wait()
    assert grade("\\boxed{4}", question("4")) is False
    assert grade("\\boxed{4}", question("4")) is True


def test_math_is_right_from_eight_threads() -> None:
    pytest.importorskip("math_verify")
    grade = MathGrader()
    numbers = [n % 5 for n in range(40)]
    with ThreadPoolExecutor(8) as pool:
        verdicts = list(pool.map(lambda n: grade(f"\\boxed{{{n}}}", question("3")), numbers))
    assert verdicts == [n == 3 for n in numbers]


def test_math_in_a_fork_has_a_worker_of_its_own() -> None:
    pytest.importorskip("math_verify")
    grade = MathGrader()
    assert grade("\\boxed{4}", question("4")) is True
    child = os.fork()
    if child == 0:
        is_right = grade("\\boxed{4}", question("4"))
        grade.close()
        os._exit(0 if is_right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert grade("\\boxed{4}", question("4")) is True, "the child has ended only its own"


def test_math_interrupted_verdict_is_not_used_next(workers: list[subprocess.Popen[str]]) -> None:
    """An interrupt leaves the verdict of one answer unread; the next answer must not get it."""
    pytest.importorskip("math_verify")
    grade = MathGrader()
    assert grade("\\boxed{4}", question("4")) is True
    [worker] = workers
    stdout = worker.stdout
    worker.stdout = Mock(readline=Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        grade("\\boxed{5}", question("4"))
    worker.stdout = stdout
    assert grade("\\boxed{4}", question("4")) is True


def test_function_of_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("my_graders")
    module.grade = lambda text, question: text == "yes"  # type: ignore[attr-defined]
    module.limit = 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_graders", module)
    grader = make_grader("my_graders:grade")
    assert grader.grade("yes", question("")) == (1.0, True, {})
    assert grader.grade("no", question("")) == (0.0, False, {})
    for name, reason in [
        ("my_graders:absent", "must name a function of my_graders, got 'absent'"),
        ("my_graders:limit", "must name a function of my_graders"),
        ("no_such_module:grade", "must name a module that can be imported"),
        (":grade", 'must be "module:function"'),
        ("regex", "must be one of sciknoweval, mcq, exact, math or module:function, got 'regex'"),
    ]:
        with pytest.raises(ValueError, match="data.grader") as error:
            make_grader(name)
        assert reason in str(error.value)


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        (np.bool_(True), (1.0, True, {})),
        (0, (0.0, False, {})),
        (np.float32(0.5), (0.5, False, {})),
        (0.75, (0.75, True, {})),
        ({"answer": 0.8, "form": 0.1}, (0.9, True, {"answer": 0.8, "form": 0.1})),
        ({"answer": 0.0, "form": True}, (1.0, True, {"answer": 0.0, "form": 1.0})),
        (dict.fromkeys("abcdefghij", 0.1), (1.0, True, dict.fromkeys("abcdefghij", 0.1))),
    ],
)
def test_a_verdict_may_be_a_share_or_parts(verdict: object, expected: tuple) -> None:
    actual = CheckedGrader(lambda text, question: verdict, "mine", correct_at=0.75).grade(
        "", question("")
    )
    assert actual.reward == pytest.approx(expected[0]) and actual[1:] == expected[1:]
    assert type(actual.reward) is float and type(actual.is_correct) is bool, "rollouts/ is JSON"


@pytest.mark.parametrize(
    "verdict",
    [
        None,
        2,
        -0.1,
        1.01,
        float("nan"),
        "no",
        [1],
        {"a": 0.6, "b": 0.6},
        {"a": -0.1},
        {"a": None},
        {},
    ],
)
def test_any_other_verdict_is_refused_by_name(verdict: object) -> None:
    with pytest.raises(ValueError, match="grader: mine must return a bool, a number in .* got "):
        CheckedGrader(lambda text, question: verdict, "mine").grade("", question(""))


def test_the_reward_that_counts_as_correct() -> None:
    for correct_at, is_correct in ((0.5, True), (0.51, False)):
        assert (
            CheckedGrader(lambda *_: 0.5, "mine", correct_at).grade("", question(""))[1]
            is is_correct
        )
    for correct_at in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"grader.correct_at must be in \(0, 1\], got"):
            make_grader("exact", correct_at=correct_at)
    assert as_grader(make_grader("exact")) == make_grader("exact")


@pytest.mark.parametrize("filler", ["_", " ", "\n", "*", "_ \n", "(", "<answer>"])
def test_any_text_is_read_in_time(filler: str) -> None:
    started = time.perf_counter()
    for opening in ("The answer is ", "", "choice is: the option"):
        chosen_letter(opening + filler * (20_000 // len(filler)))
    assert time.perf_counter() - started < 2
