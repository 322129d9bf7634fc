"""What every teacher is, and the words the ones with a language model are asked in."""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from string import Formatter

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
    """A frozen guide, of which only text is visible.

    immediate: guide() waits for nobody else, so the caller may wait for it on the spot.
    is_remote: a server that may be down or refuse us; one call is tried before a run begins.
    occupies_host: its step() takes the cores that the student needs, so they take turns.
    failures:  calls without guidance so far, by the kind of GuidanceFailed.
    """

    immediate = False
    is_remote = False
    occupies_host = False

    @cached_property
    def failures(self) -> Counter[str]:
        return Counter()

    async def guide(self, request: GuidanceRequest) -> Guidance | None:
        """A message to the student, however long it takes; None when there is none to be had.

        A subclass may have this alone and return text too, as any object with a guide() may.
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
        """The same within a limit: TimeoutError after it, GuidanceFailed where the reason is known.

        The clock starts when the request is sent: waiting in line is not slowness.
        """
        raise NotImplementedError

    def step(self, *, student_is_idle: bool = True) -> bool:
        """Do a little of the teacher's work on the caller's thread; False when there is nothing to
        do now.

        It waits for a device only when the student has nothing to do.
        """
        return False

    async def aclose(self) -> None:
        """Give back connections."""


@dataclass(frozen=True)
class TeacherPrompt:
    """The messages a language model is asked with.

    user_template is split into paragraphs at empty lines; one that names a field withheld from the
    teacher (None in the request) is left out. Values are put in once and never read as a template
    themselves.

    Raises:
        ValueError: user_template is malformed or names a field that is not one of FIELDS.
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


# How models mark their thoughts: patterns of what opens them and of what closes them.
_TAGS = ("think", "thinking", "thoughts?", "reasoning", "analysis", "scratchpad", "seed:think")
THOUGHTS = tuple(
    (re.compile(opening), re.compile(closing))
    for opening, closing in (
        *((rf"(?i:<\s*{tag}(\s[^<>]*)?>)", rf"(?i:<\s*/\s*{tag}\s*>)") for tag in _TAGS),
        (r"\[THINK\]", r"\[/THINK\]"),
        (r"\u25c1think\u25b7", r"\u25c1/think\u25b7"),
        (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),
        (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),
        (r"<\|channel\|>analysis", r"<\|channel\|>final<\|message\|>"),
    )
)


def clean_guidance(text: str, *, in_thoughts: bool = False) -> str:
    """A model's message without its thoughts and the white space around it.

    in_thoughts: they may have begun before the text, in the prompt; then only what closes them
    shows where the message begins.

    Raises:
        GuidanceFailed: "cut", the text ends inside the thoughts; "none", nothing is left.
    """
    is_open = False
    for opening, closing in THOUGHTS:
        ends = [found.end() for found in closing.finditer(text)]
        text = text[max(ends, default=0) :]
        in_thoughts = in_thoughts and not ends
        is_open = (
            is_open or opening.search(text) is not None
        )  # what closes another kind does not close it
    if in_thoughts or is_open:
        raise GuidanceFailed(
            "cut",
            "the message was cut, and may be thoughts alone; raise teacher.max_new_tokens or turn "
            "thinking off",
        )
    if not text.strip():
        raise GuidanceFailed("none", "the message was empty")
    return text.strip()
