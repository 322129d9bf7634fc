"""Defines what every teacher is, and the prompt of teachers with a language model.

Read Teacher, TeacherPrompt, then clean_guidance, which takes a model's thoughts off its message.
"""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from string import Formatter

from socpo_fast.socratic.thoughts import TEACHER_MARKS
from socpo_fast.types import Guidance, GuidanceFailed, GuidanceRequest

FIELDS = ("question", "student_answer", "reference_solution", "ground_truth")

SYSTEM_PROMPT = """\
You tutor a student who has just answered a question wrongly. Find the one flaw that matters most \
in the student's own reasoning and say where it is. Then give one concrete thing to try next. \
Write to the student, in at most four short sentences. Never state the answer, its letter or its \
value, and do not solve the question yourself."""

USER_TEMPLATE = """\
The question:
{question}

The student's attempt, which is wrong:
{student_answer}

A reference solution, for your eyes only:
{reference_solution}

The correct answer, for your eyes only:
{ground_truth}

Write your message to the student."""


class Teacher:
    """A frozen guide of the student. Only its texts are used, never its log-probs.

    Attributes:
        immediate:     whether guide() computes its answer without waiting for anything, so that the
                       caller may wait for it on the spot.
        is_remote:     whether it is a server that may be down or refuse us; one call is tried
                       before a run begins.
        shares_cpu: whether step() needs the CPU cores that the student needs, so that they take
                       turns.
        failures:      number of calls without guidance so far, by the kind of GuidanceFailed.
    """

    immediate = False
    is_remote = False
    shares_cpu = False

    @cached_property
    def failures(self) -> Counter[str]:
        """Number of calls without guidance, by kind. Cached, so subclasses need no __init__."""
        return Counter()

    async def guide(self, request: GuidanceRequest) -> Guidance | None:
        """Returns a message to the student, without a time limit; None if there is none.

        A class may also define only this method, and return text: as_teacher accepts any object
        with a guide().
        """
        try:
            return await self.guide_in_time(request, None)
        except GuidanceFailed as failure:
            self.failures[failure.kind] += 1
            return None

    async def guide_in_time(
        self,
        request: GuidanceRequest,
        timeout_s: float | None,
    ) -> Guidance | None:
        """Returns a message within a time limit; None if there is none.

        The clock starts when the request is sent. Time in a queue before that does not count.

        Raises:
            TimeoutError: the limit is over.
            GuidanceFailed: there is no guidance for another reason.
        """
        raise NotImplementedError

    def step(self, *, student_is_idle: bool = True) -> bool:
        """Does a little of the teacher's work on the caller's thread.

        It waits for a device only if the student has nothing to do. Returns False if there is
        nothing to do now.
        """
        return False

    async def aclose(self) -> None:
        """Closes connections and drops requests."""


@dataclass(frozen=True)
class TeacherPrompt:
    """The prompt of a teacher with a language model.

    user_template is split into paragraphs at empty lines. A paragraph with a field that is withheld
    from the teacher (None in the request) is left out. Values are filled in once; braces inside a
    value are not read as fields.

    Raises:
        ValueError: user_template is malformed, or has a field that is not one of FIELDS.
    """

    system_prompt: str = SYSTEM_PROMPT
    user_template: str = USER_TEMPLATE

    def __post_init__(self) -> None:
        try:
            parts = list(Formatter().parse(self.user_template))
        except ValueError as error:
            raise ValueError(
                f"teacher.user_template must be a format string, got an error: {error}"
            ) from error
        for _, name, spec, conversion in parts:
            if name is not None and (name not in FIELDS or spec or conversion):
                raise ValueError(
                    "teacher.user_template: fields must be "
                    f"{', '.join(f'{{{field}}}' for field in FIELDS)}, "
                    f"got {{{name}}}; write {{{{ and }}}} for braces"
                )

    def messages(self, request: GuidanceRequest) -> list[dict[str, str]]:
        """Returns the messages of a request: the system prompt, if there is one, and the user's."""
        values = {name: getattr(request, name) for name in FIELDS}
        paragraphs = [
            paragraph.format(**values)
            for paragraph in self.user_template.split("\n\n")
            if all(
                name is None or values[name] is not None
                for _, name, _, _ in Formatter().parse(paragraph)
            )
        ]
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return [*system, {"role": "user", "content": "\n\n".join(paragraphs)}]


def clean_guidance(text: str, *, in_thoughts: bool = False) -> str:
    """Returns a model's message without its thoughts and without white space around it.

    Args:
        in_thoughts: whether the thoughts may have begun in the prompt, before the text. Then only a
            closing mark shows where the message begins.

    Raises:
        GuidanceFailed: "cut" if the text ends inside the thoughts, "none" if nothing is left.
    """
    is_open = False
    for opening, closing in TEACHER_MARKS.items():
        ends = [match.end() for match in re.finditer(closing, text)]
        # Everything up to the last closing mark is thoughts.
        text = text[max(ends, default=0) :]
        in_thoughts = in_thoughts and not ends
        # Once a mark of one kind is open, a closing mark of another kind does not close it.
        is_open = is_open or re.search(opening, text) is not None
    if in_thoughts or is_open:
        raise GuidanceFailed(
            "cut",
            "the message was cut, and may be thoughts alone; raise teacher.max_new_tokens or turn "
            "thinking off",
        )
    if not text.strip():
        raise GuidanceFailed("none", "the message was empty")
    return text.strip()
