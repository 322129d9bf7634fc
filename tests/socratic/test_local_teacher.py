"""The local teacher on a tiny random model: called from another thread, stepped on this one."""

import time
from pathlib import Path

import pytest
import torch

from socpo_fast.config import Config, LocalTeacherConfig
from socpo_fast.model import Decoder, load_student
from socpo_fast.socratic import teachers
from socpo_fast.socratic.bridge import Bridge
from socpo_fast.socratic.teachers import LocalTeacher, TeacherPrompt, make_teacher
from socpo_fast.socratic.teachers.base import clean_guidance
from socpo_fast.socratic.teachers.calls import background
from socpo_fast.types import SamplingParams
from tests.helpers.interrupts import interrupted_at
from tests.helpers.local_teachers import ask, heard, local_teacher, request, wait_until


@pytest.fixture
def teacher(teacher_folder: Path) -> LocalTeacher:
    return local_teacher(teacher_folder)


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("cpu", "auto", "float32"),
        ("cpu", "bfloat16", "bfloat16"),
        ("cuda", "auto", "bfloat16"),
        ("cuda:1", "auto", "bfloat16"),
        ("cuda:1", "float32", "float32"),
    ],
)
def test_teacher_has_its_own_dtype(
    teacher_folder: Path, device: str, dtype: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student is in float32 in all cases. The CPU stands in for a CUDA device."""
    load_options: dict[str, str] = {}

    def load(path: str, **options: str) -> Decoder:
        load_options.update(options)
        return load_student(path, dtype=options["dtype"])

    monkeypatch.setattr(teachers, "load_student", load)
    teacher = local_teacher(teacher_folder, device, dtype=dtype)
    assert load_options == {"device": device, "dtype": expected}
    weights = list(teacher.engine.student.parameters())
    assert {str(weight.dtype) for weight in weights} == {f"torch.{expected}"}
    assert not any(weight.requires_grad for weight in weights), "it is never trained"
    assert ask(teacher, [request()])[0]


def test_missing_teacher_device_is_refused(
    teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        ValueError, match="^teacher.device: cuda:3 must be a device of this machine, which has 1"
    ):
        make_teacher(
            Config(teacher=LocalTeacherConfig(path=str(teacher_folder), device="cuda:3")),
            device="cpu",
        )


def test_guidance_equals_the_engines_text(teacher: LocalTeacher) -> None:
    (text,) = ask(teacher, [request(3, question=2)])
    engine = teacher.engine
    bridge = teacher.bridge
    prompt_ids = bridge.prompt_ids(
        TeacherPrompt(user_template="{student_answer}").messages(request())
    )
    params = SamplingParams(temperature=1.0, max_new_tokens=12, eos_ids=bridge.eos_ids, seed=7)
    ((attempt,),) = engine.generate([prompt_ids], params, keys=[(-1, 2 << 24 | 3 << 8)])
    assert text == clean_guidance(bridge.decode(attempt.token_ids))
    assert text


def test_guidance_is_batch_and_order_invariant(teacher: LocalTeacher, teacher_folder: Path) -> None:
    requests = [request(i, question=q) for q in range(2) for i in range(4)]
    together = ask(teacher, requests)
    # The same prompt, but each request draws its own noise.
    assert len(set(together)) == len(requests)
    reversed_order = ask(local_teacher(teacher_folder), requests[::-1])
    assert reversed_order[::-1] == together
    assert [ask(teacher, [single])[0] for single in requests] == together
    assert num_pages_held(teacher) == 0
    assert not teacher.step()


def test_too_long_prompt_costs_one_guidance(teacher: LocalTeacher) -> None:
    too_long, guidance = ask(teacher, [request(0, answer="3 " * 600), request(1)])
    assert too_long == "[too_long]"
    assert guidance


def test_an_asker_may_give_up_and_ask_again(teacher: LocalTeacher) -> None:
    expected = ask(teacher, [request()])
    first = background(teacher.guide_in_time(request(), None))
    wait_until(teacher.step)  # the request is running now
    first.cancel()
    assert ask(teacher, [request()]) == expected
    never_started = background(teacher.guide_in_time(request(), None))
    wait_until(lambda: not teacher.queued.empty())
    never_started.cancel()
    assert ask(teacher, [request(1)]) != expected
    assert num_pages_held(teacher) == 0


def test_an_abandoned_request_goes_at_the_next_step(teacher: LocalTeacher) -> None:
    calls = [background(teacher.guide_in_time(request(i), None)) for i in range(3)]
    wait_until(lambda: teacher.step() and teacher.engine.has_work)
    for future in calls:
        future.cancel()
    wait_until(lambda: not teacher.step())
    assert_empty(teacher)


def test_closing_drops_what_is_queued_and_under_way(teacher: LocalTeacher) -> None:
    expected = ask(teacher, [request(0), request(1)])
    running = background(teacher.guide_in_time(request(0), None))
    wait_until(teacher.step)
    queued = background(teacher.guide_in_time(request(1), None))
    wait_until(lambda: not teacher.queued.empty())
    background(teacher.aclose()).result(timeout=30)
    assert heard(running) == heard(queued) == "[exception]"
    assert_empty(teacher)
    assert ask(teacher, [request(0), request(1)]) == expected


@pytest.mark.parametrize("line", [5, 40, 120, 200])
def test_a_step_that_is_interrupted_drops_its_requests(teacher: LocalTeacher, line: int) -> None:
    expected = ask(teacher, [request(0), request(1)])
    calls = [background(teacher.guide_in_time(request(i), None)) for i in range(2)]
    wait_until(lambda: teacher.queued.qsize() == 2)
    with pytest.raises(KeyboardInterrupt), interrupted_at(line):
        wait_until(lambda: not teacher.step())
    wait_until(lambda: all(future.done() for future in calls))
    assert [heard(future) for future in calls] == ["[exception]"] * 2
    assert_empty(teacher)
    assert ask(teacher, [request(0), request(1)]) == expected


def assert_empty(teacher: LocalTeacher) -> None:
    """Checks that no request is left in the teacher's engine."""
    engine = teacher.engine
    assert not engine.has_work and num_pages_held(teacher) == 0


def num_pages_held(teacher: LocalTeacher) -> int:
    """Returns the number of pages in use, without those of the prefix that all prompts share."""
    engine = teacher.engine
    prefix = engine._kept_prefix()
    return engine.stats.pages_total - engine.stats.pages_free - (len(prefix.pages) if prefix else 0)


def test_no_room_for_a_prompt_is_refused_at_the_start(teacher_folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"teacher.max_new_tokens must be < the teacher's context of 512 tokens"
    ):
        local_teacher(teacher_folder, max_new_tokens=512)


def test_too_long_system_prompt_costs_guidance_only(teacher_folder: Path) -> None:
    teacher = local_teacher(teacher_folder, system_prompt="Be kind. " * 200)
    assert ask(teacher, [request(0), request(1)]) == ["[too_long]"] * 2
    assert_empty(teacher)


def test_text_the_template_refuses_costs_one_guidance(
    teacher: LocalTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    render = Bridge.render

    def refuse(bridge: Bridge, messages: list[dict[str, str]]) -> str:
        if "forbidden" in messages[-1]["content"]:
            raise ValueError("no such words")
        return render(bridge, messages)

    monkeypatch.setattr(Bridge, "render", refuse)
    guidances = ask(teacher, [request(0, answer="forbidden"), request(1)])
    assert guidances[0] == "[exception]" and not guidances[1].startswith("[")
    assert_empty(teacher)


def test_waiting_for_the_engine_is_no_timeout(teacher: LocalTeacher) -> None:
    """The timeout begins when the engine takes the request, which is late here."""
    late_start = background(teacher.guide_in_time(request(1), 0.5))
    time.sleep(0.8)
    wait_until(lambda: not teacher.step() and late_start.done())
    assert not heard(late_start).startswith("[")
    too_slow = background(teacher.guide_in_time(request(1), 0.1))
    wait_until(teacher.step)
    with pytest.raises(TimeoutError):
        too_slow.result(timeout=30)
    wait_until(lambda: not teacher.step())
    assert_empty(teacher)
