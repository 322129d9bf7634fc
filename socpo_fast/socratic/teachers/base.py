"""What every teacher is, and the words the ones with a language model are asked in."""

from __future__ import annotations

from dataclasses import dataclass
from string import Formatter
from typing import Protocol

from socpo_fast.types import Guidance, GuidanceRequest

FIELDS = ("question", "student_answer", "reference_solution", "ground_truth")

SYSTEM_PROMPT = """\
You tutor a student who has just answered a question wrongly. Find the one flaw that matters most in the student's own \
reasoning and say where it is. Then give one concrete thing to try next. Write to the student, in at most four short \
sentences. Never state the answer, its letter or its value, and do not solve the question yourself."""

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


class Teacher(Protocol):
    """A frozen guide, of which only text is visible.

    immediate: guide() waits for nobody else, so the caller may wait for it on the spot.
    """

    @property
    def immediate(self) -> bool: ...

    async def guide(self, request: GuidanceRequest) -> Guidance | None:
        """A message to the student; None when there is none to be had, which ends the rollout with what it has."""

    def step(self) -> bool:
        """Do a little of the teacher's work on the caller's thread; False when there is none."""

    async def aclose(self) -> None:
        """Give back connections."""


@dataclass(frozen=True)
class TeacherPrompt:
    """The messages a language model is asked with.

    user_template is split into paragraphs at empty lines; one that names a field withheld from the teacher (None in
    the request) is left out. Values are put in once and never read as a template themselves.

    Raises:
        ValueError: user_template is malformed or names a field that is not one of FIELDS.
    """

    system_prompt: str = SYSTEM_PROMPT
    user_template: str = USER_TEMPLATE

    def __post_init__(self) -> None:
        try:
            parts = list(Formatter().parse(self.user_template))
        except ValueError as error:
            raise ValueError(f"teacher.user_template must be a format string, got an error: {error}") from error
        for _, name, spec, conversion in parts:
            if name is not None and (name not in FIELDS or spec or conversion):
                raise ValueError(
                    f"teacher.user_template: fields must be {', '.join(f'{{{field}}}' for field in FIELDS)}, "
                    f"got {{{name}}}; write {{{{ and }}}} for braces"
                )

    def messages(self, request: GuidanceRequest) -> list[dict[str, str]]:
        values = {name: getattr(request, name) for name in FIELDS}
        paragraphs = [
            paragraph.format(**values)
            for paragraph in self.user_template.split("\n\n")
            if all(name is None or values[name] is not None for _, name, _, _ in Formatter().parse(paragraph))
        ]
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return [*system, {"role": "user", "content": "\n\n".join(paragraphs)}]


def clean_guidance(text: str) -> str | None:
    """A model's message without its <think> block and the white space around it; None when nothing is left."""
    text = text.rpartition("</think>")[2]
    return None if text.lstrip().startswith("<think>") else text.strip() or None
