"""The local teacher on a tiny random model: asked from another thread, stepped on this one."""

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
    ("device", "dtype", "loaded"),
    [
        ("cpu", "auto", "float32"),
        ("cpu", "bfloat16", "bfloat16"),
        ("cuda", "auto", "bfloat16"),
        ("cuda:1", "auto", "bfloat16"),
        ("cuda:1", "float32", "float32"),
    ],
)
def test_its_dtype_is_its_own(
    teacher_folder: Path, device: str, dtype: str, loaded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student's is float32 here throughout. A card is played by the CPU."""
    asked: dict[str, str] = {}

    def load(path: str, **options: str) -> Decoder:
        asked.update(options)
        return load_student(path, dtype=options["dtype"])

    monkeypatch.setattr(teachers, "load_student", load)
    teacher = local_teacher(teacher_folder, device, dtype=dtype)
    assert asked == {"device": device, "dtype": loaded}
    weights = list(teacher._engine.student.parameters())
    assert {str(weight.dtype) for weight in weights} == {f"torch.{loaded}"}
    assert not any(weight.requires_grad for weight in weights), "it is never trained"
    assert ask(teacher, [request()])[0]


def test_a_card_of_its_own_that_is_not_there(
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


def test_text_is_the_engines(teacher: LocalTeacher) -> None:
    (text,) = ask(teacher, [request(3, question=2)])
    engine = teacher._engine
    bridge = teacher._bridge
    prompt_ids = bridge.prompt_ids(
        TeacherPrompt(user_template="{student_answer}").messages(request())
    )
    params = SamplingParams(temperature=1.0, max_new_tokens=12, eos_ids=bridge.eos_ids, seed=7)
    ((attempt,),) = engine.generate([prompt_ids], params, keys=[(-1, 2 << 24 | 3 << 8)])
    assert text == clean_guidance(bridge.decode(attempt.token_ids))
    assert text


def test_guidance_does_not_depend_on_company_or_order(
    teacher: LocalTeacher, teacher_folder: Path
) -> None:
    requests = [request(i, question=q) for q in range(2) for i in range(4)]
    together = ask(teacher, requests)
    assert len(set(together)) == len(
        requests
    )  # the same prompt, yet noise of its own for each request
    backwards = ask(local_teacher(teacher_folder), requests[::-1])
    assert backwards[::-1] == together
    assert [ask(teacher, [alone])[0] for alone in requests] == together
    assert num_pages_held(teacher) == 0
    assert not teacher.step()


def test_a_prompt_too_long_for_the_teacher_is_no_guidance(teacher: LocalTeacher) -> None:
    long, short = ask(teacher, [request(0, answer="3 " * 600), request(1)])
    assert long == "[too_long]"
    assert short


def test_an_asker_may_give_up_and_ask_again(teacher: LocalTeacher) -> None:
    expected = ask(teacher, [request()])
    first = background(teacher.guide_in_time(request(), None))
    wait_until(teacher.step)  # it has been started
    first.cancel()
    assert ask(teacher, [request()]) == expected
    never_started = background(teacher.guide_in_time(request(), None))
    wait_until(lambda: not teacher._arrived.empty())
    never_started.cancel()
    assert ask(teacher, [request(1)]) != expected
    assert num_pages_held(teacher) == 0


def test_an_abandoned_request_goes_at_the_next_step(teacher: LocalTeacher) -> None:
    asked = [background(teacher.guide_in_time(request(i), None)) for i in range(3)]
    wait_until(lambda: teacher.step() and teacher._engine.has_work)
    for future in asked:
        future.cancel()
    wait_until(lambda: not teacher.step())
    assert_empty(teacher)


def test_closing_drops_what_is_queued_and_under_way(teacher: LocalTeacher) -> None:
    expected = ask(teacher, [request(0), request(1)])
    running = background(teacher.guide_in_time(request(0), None))
    wait_until(teacher.step)
    queued = background(teacher.guide_in_time(request(1), None))
    wait_until(lambda: not teacher._arrived.empty())
    background(teacher.aclose()).result(timeout=30)
    assert heard(running) == heard(queued) == "[exception]"
    assert_empty(teacher)
    assert ask(teacher, [request(0), request(1)]) == expected


@pytest.mark.parametrize("line", [5, 40, 120, 200])
def test_a_step_that_is_interrupted_drops_its_requests(teacher: LocalTeacher, line: int) -> None:
    expected = ask(teacher, [request(0), request(1)])
    asked = [background(teacher.guide_in_time(request(i), None)) for i in range(2)]
    wait_until(lambda: teacher._arrived.qsize() == 2)
    with pytest.raises(KeyboardInterrupt), interrupted_at(line):
        wait_until(lambda: not teacher.step())
    wait_until(lambda: all(future.done() for future in asked))
    assert [heard(future) for future in asked] == ["[exception]"] * 2
    assert_empty(teacher)
    assert ask(teacher, [request(0), request(1)]) == expected


def assert_empty(teacher: LocalTeacher) -> None:
    engine = teacher._engine
    assert not engine.has_work and num_pages_held(teacher) == 0


def num_pages_held(teacher: LocalTeacher) -> int:
    """By anything but the prefix of all prompts."""
    engine = teacher._engine
    prefix = engine._kept_prefix()
    return engine.stats.pages_total - engine.stats.pages_free - (len(prefix.pages) if prefix else 0)


def test_no_room_for_a_prompt_is_refused_at_the_start(teacher_folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"teacher.max_new_tokens must be < the teacher's context of 512 tokens"
    ):
        local_teacher(teacher_folder, max_new_tokens=512)


def test_a_system_prompt_beyond_the_context_costs_guidance_only(teacher_folder: Path) -> None:
    teacher = local_teacher(teacher_folder, system_prompt="Be kind. " * 200)
    assert ask(teacher, [request(0), request(1)]) == ["[too_long]"] * 2
    assert_empty(teacher)


def test_a_text_that_the_template_refuses_costs_one_guidance(
    teacher: LocalTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    render = Bridge.render

    def refuse(bridge: Bridge, messages: list[dict[str, str]]) -> str:
        if "forbidden" in messages[-1]["content"]:
            raise ValueError("no such words")
        return render(bridge, messages)

    monkeypatch.setattr(Bridge, "render", refuse)
    heard = ask(teacher, [request(0, answer="forbidden"), request(1)])
    assert heard[0] == "[exception]" and not heard[1].startswith("[")
    assert_empty(teacher)


def test_waiting_for_the_engine_is_not_slowness(teacher: LocalTeacher) -> None:
    """The clock starts when the engine takes the request, which here is late."""
    future = background(teacher.guide_in_time(request(1), 0.5))
    time.sleep(0.8)
    wait_until(lambda: not teacher.step() and future.done())
    assert not heard(future).startswith("[")
    late = background(teacher.guide_in_time(request(1), 0.1))
    wait_until(teacher.step)
    with pytest.raises(TimeoutError):
        late.result(timeout=30)
    wait_until(lambda: not teacher.step())
    assert_empty(teacher)
