"""The prompt for a teacher, the teachers without a model, and make_teacher."""

import asyncio
import re

import pytest

from socpo_fast.config import (
    Config,
    EndpointTeacherConfig,
    LocalTeacherConfig,
    RetryTeacherConfig,
    RolloutConfig,
    RuleTeacherConfig,
)
from socpo_fast.socratic.teachers import (
    EndpointTeacher,
    RuleTeacher,
    TeacherPrompt,
    make_teacher,
    retry_teacher,
)
from socpo_fast.socratic.teachers.base import Teacher, clean_guidance
from socpo_fast.socratic.teachers.calls import as_teacher
from socpo_fast.types import Guidance, GuidanceFailed, GuidanceRequest, RolloutKey


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
        "A reference solution, for your eyes only:\n1 + 1 = 2\n\nThe correct answer, for your "
        "eyes only:\n2" in user["content"]
    )


def test_values_are_never_templates() -> None:
    prompt = TeacherPrompt(system_prompt="", user_template="{{q}} {question}\n\n{student_answer}")
    (user,) = prompt.messages(request("{ground_truth}\n\n{0} {{ }"))
    assert user["content"] == "{q} 1 + 1?\n\n{ground_truth}\n\n{0} {{ }"


@pytest.mark.parametrize(
    "template",
    [
        "{answer}",
        "{}",
        "{question.__class__}",
        "{question!r}",
        "{question:>9}",
        "{question",
        "}",
        "{question[0]}",
    ],
)
def test_bad_templates_are_refused_at_the_start(template: str) -> None:
    with pytest.raises(ValueError, match="teacher.user_template"):
        TeacherPrompt(user_template=template)


@pytest.mark.parametrize(
    ("text", "in_thoughts", "expected"),
    [
        ("  Check the sum.\n", False, "Check the sum."),
        ("<think>\nhm </think>\n\nCheck.", False, "Check."),
        ("hm\n</think>\nCheck.", False, "Check."),  # the generation prompt had opened the block
        ("hm\n</think>\nCheck.", True, "Check."),
        ("[THINK]hm[/THINK]Check.", False, "Check."),
        (
            "<|channel|>analysis<|message|>hm<|end|><|channel|>final<|message|>Check.",
            False,
            "Check.",
        ),
        ("<reasoning>hm</reasoning>Check.", True, "Check."),
        ("hm, the answer is 2", True, "[cut]"),
        ("<think> never ended", False, "[cut]"),
        ("Okay. <thinking> never ended", False, "[cut]"),
        ("</think><think>again", False, "[cut]"),
        ("<|channel|>analysis<|message|>hm", False, "[cut]"),
        ("<think>a</think>  ", False, "[none]"),
        (" \n", False, "[none]"),
        ("", False, "[none]"),
        ("<think>plan <reasoning>x</reasoning> the answer is 2", False, "[cut]"),
        ("<think>I should not write </thinking> here. It is 2", False, "[cut]"),
        ("<reasoning><think>a</think>b</reasoning> Look.", False, "Look."),
        ("<THINK >It is 2</ Think>\nLook.", False, "Look."),
        ('<think id="1">It is 2', False, "[cut]"),
        ("<thoughts>It is 2, <scratchpad>so", False, "[cut]"),
        ("\u25c1think\u25b7It is 2\u25c1/think\u25b7Look.", False, "Look."),
        ("<|begin_of_thought|>It is 2", False, "[cut]"),
        ("It is 2</thinking>Look.", True, "Look."),
        ("<thinker> [think] 1 < 2", False, "<thinker> [think] 1 < 2"),
    ],
)
def test_clean_guidance(text: str, in_thoughts: bool, expected: str) -> None:
    try:
        actual = clean_guidance(text, in_thoughts=in_thoughts)
    except GuidanceFailed as failure:
        actual = f"[{failure.kind}]"
    assert actual == expected


@pytest.mark.parametrize(
    ("answer", "expected"), [(" Check. ", "Check."), ("", None), ("  ", None), (None, None)]
)
def test_rule_teacher(answer: str | None, expected: str | None) -> None:
    teacher = RuleTeacher(lambda request: answer)
    guidance = asyncio.run(teacher.guide(request()))
    assert (guidance.text if guidance else None) == expected
    assert teacher.immediate
    assert not teacher.step()


def test_functions_of_every_kind_are_teachers() -> None:
    """They may be plain or async, and return Guidance or text; a teacher is returned unchanged."""

    async def later(request: GuidanceRequest) -> str:
        await asyncio.sleep(0)
        return f" Look at {request.student_answer} "

    def promised(request: GuidanceRequest) -> object:
        return later(request)

    for function, immediate in ((later, False), (promised, True)):
        teacher = as_teacher(function)
        assert teacher.immediate is immediate
        assert asyncio.run(teacher.guide(request("3"))) == Guidance(text="Look at 3")
    padded = Guidance(text=" Look. ")
    assert asyncio.run(as_teacher(lambda _: padded).guide(request())) == Guidance(text="Look.")
    assert as_teacher(retry := retry_teacher()) is retry
    with pytest.raises(
        TypeError, match="teacher: must have guide.* or be a function of it, got 'text'"
    ):
        as_teacher("text")


def test_retry_teacher() -> None:
    guidance = asyncio.run(retry_teacher("Again.").guide(request()))
    assert guidance is not None
    assert guidance.text == "Again."
    with pytest.raises(ValueError, match="teacher.retry_text must be text"):
        retry_teacher(" ")


def test_make_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_teacher(Config()).immediate
    assert make_teacher(Config(teacher=RetryTeacherConfig())).immediate
    one_attempt = RolloutConfig(max_attempts=1)
    assert make_teacher(
        Config(teacher=LocalTeacherConfig(path="/absent"), rollout=one_attempt)
    ).immediate  # never called, so its path is not read
    endpoint = EndpointTeacherConfig(
        url="http://127.0.0.1:1/v1", model="m", api_key_env="SOCPO_TEST_KEY"
    )
    monkeypatch.setenv("SOCPO_TEST_KEY", "secret")
    teacher = make_teacher(Config(teacher=endpoint))
    assert isinstance(teacher, EndpointTeacher)
    asyncio.run(teacher.aclose())
    monkeypatch.delenv("SOCPO_TEST_KEY")
    for config, reason in [
        (endpoint, "teacher.api_key_env must name a variable that is set, got one that is not"),
        (LocalTeacherConfig(path="/absent"), "must be a Hugging Face folder"),
        (RuleTeacherConfig(rule="json:nothing"), "teacher.rule must name a function of json"),
        (
            LocalTeacherConfig(path="/absent", user_template="{x}"),
            "teacher.user_template: fields must be",
        ),
    ]:
        with pytest.raises(ValueError, match=re.escape(reason)):
            make_teacher(Config(teacher=config))


def test_a_subclass_with_guide_alone_is_a_teacher() -> None:
    """guide may return text, and an exception costs one guidance."""

    class Own(Teacher):
        async def guide(self, request: GuidanceRequest) -> str:  # type: ignore[override]
            return {"3": " Look. "}[request.student_answer]

    teacher = as_teacher(Own())
    assert asyncio.run(teacher.guide(request("3"))) == Guidance(text="Look.")
    assert asyncio.run(teacher.guide(request("4"))) is None
    assert teacher.failures == {"exception": 1}
