"""The prompt a teacher is asked with, the teachers without a model, and make_teacher."""

import asyncio
import re

import pytest

from socpo_fast.config import Config, RolloutConfig, TeacherConfig
from socpo_fast.socratic.teachers import EndpointTeacher, RuleTeacher, TeacherPrompt, make_teacher, retry_teacher
from socpo_fast.socratic.teachers.base import clean_guidance
from socpo_fast.socratic.teachers.simple import as_teacher
from socpo_fast.types import Guidance, GuidanceRequest, RolloutKey


def request(
    student_answer: str = "It is 3.",
    *,
    ground_truth: str | None = None,
    reference: str | None = None,
    rollout_idx: int = 0,
) -> GuidanceRequest:
    return GuidanceRequest(
        question="1 + 1?",
        student_answer=student_answer,
        ground_truth=ground_truth,
        reference_solution=reference,
        key=RolloutKey(0, 0),
        rollout_idx=rollout_idx,
        attempt_idx=0,
    )


def test_withheld_fields_leave_no_trace() -> None:
    system, user = TeacherPrompt().messages(request())
    assert system["role"] == "system"
    assert user["content"].startswith(
        "The question:\n1 + 1?\n\nThe student's attempt, which is wrong:\nIt is 3.\n\nWrite"
    )
    assert "eyes only" not in user["content"]
    _, user = TeacherPrompt().messages(request(ground_truth="2", reference="1 + 1 = 2"))
    assert (
        "A reference solution, for your eyes only:\n1 + 1 = 2\n\nThe correct answer, for your eyes only:\n2"
        in user["content"]
    )


def test_values_are_never_templates() -> None:
    prompt = TeacherPrompt(system_prompt="", user_template="{{q}} {question}\n\n{student_answer}")
    (user,) = prompt.messages(request("{ground_truth}\n\n{0} {{ }"))
    assert user["content"] == "{q} 1 + 1?\n\n{ground_truth}\n\n{0} {{ }"


@pytest.mark.parametrize(
    "template",
    ["{answer}", "{}", "{question.__class__}", "{question!r}", "{question:>9}", "{question", "}", "{question[0]}"],
)
def test_bad_templates_are_refused_at_the_start(template: str) -> None:
    with pytest.raises(ValueError, match="teacher.user_template"):
        TeacherPrompt(user_template=template)


@pytest.mark.parametrize(
    ("text", "guidance"),
    [
        ("  Check the sum.\n", "Check the sum."),
        ("<think>\nhm </think>\n\nCheck.", "Check."),
        ("hm\n</think>\nCheck.", "Check."),  # the generation prompt had opened the block
        ("<think> never ended", None),
        ("<think>a</think>  ", None),
        (" \n", None),
        ("", None),
    ],
)
def test_clean_guidance(text: str, guidance: str | None) -> None:
    assert clean_guidance(text) == guidance


@pytest.mark.parametrize(("said", "heard"), [(" Check. ", "Check."), ("", None), ("  ", None), (None, None)])
def test_rule(said: str | None, heard: str | None) -> None:
    teacher = RuleTeacher(lambda request: said)
    guidance = asyncio.run(teacher.guide(request()))
    assert (guidance.text if guidance else None) == heard
    assert teacher.immediate
    assert not teacher.step()


def test_functions_of_every_kind_are_teachers() -> None:
    """Plain or async, Guidance or text; a teacher stays what it is."""

    async def later(request: GuidanceRequest) -> str:
        await asyncio.sleep(0)
        return f" Look at {request.student_answer} "

    def promised(request: GuidanceRequest) -> object:
        return later(request)

    for function, immediate in ((later, False), (promised, True)):
        teacher = as_teacher(function)
        assert teacher.immediate is immediate
        assert asyncio.run(teacher.guide(request("3"))) == Guidance(text="Look at 3")
    timed = Guidance(text=" Look. ", duration_s=2.0)
    assert asyncio.run(as_teacher(lambda _: timed).guide(request())) == Guidance(text="Look.", duration_s=2.0)
    assert as_teacher(retry := retry_teacher()) is retry
    with pytest.raises(TypeError, match="teacher: .* must return Guidance, str or None, got 3"):
        asyncio.run(as_teacher(lambda _: 3).guide(request()))
    with pytest.raises(TypeError, match="teacher: must have guide.* or be a function of it, got 'text'"):
        as_teacher("text")


def test_retry() -> None:
    guidance = asyncio.run(retry_teacher("Again.").guide(request()))
    assert guidance is not None
    assert guidance.text == "Again."
    with pytest.raises(ValueError, match="teacher.retry_text must be text"):
        retry_teacher(" ")


def test_make_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_teacher(Config()).immediate
    assert make_teacher(Config(teacher=TeacherConfig(kind="retry"))).immediate
    one_attempt = RolloutConfig(max_attempts=1)
    assert make_teacher(Config(teacher=TeacherConfig(kind="local"), rollout=one_attempt)).immediate  # never asked
    endpoint = TeacherConfig(kind="endpoint", url="http://127.0.0.1:1/v1", model="m", api_key_env="SOCPO_TEST_KEY")
    monkeypatch.setenv("SOCPO_TEST_KEY", "secret")
    teacher = make_teacher(Config(teacher=endpoint))
    assert isinstance(teacher, EndpointTeacher)
    asyncio.run(teacher.aclose())
    monkeypatch.delenv("SOCPO_TEST_KEY")
    for config, reason in [
        (endpoint, "teacher.api_key_env must name a variable that is set, got SOCPO_TEST_KEY"),
        (TeacherConfig(kind="local", path="/absent"), "must be a Hugging Face folder"),
        (TeacherConfig(kind="rule", rule="json:nothing"), "teacher.rule must name a function of json"),
        (TeacherConfig(kind="local", path="/absent", user_template="{x}"), "teacher.user_template: fields must be"),
    ]:
        with pytest.raises(ValueError, match=re.escape(reason)):
            make_teacher(Config(teacher=config))
