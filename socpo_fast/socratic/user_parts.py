"""Holds what a caller in Python gives in place of settings: questions, a teacher, a grader.

Read UserParts, then name_of, the name that the settings hold instead.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from socpo_fast.config import Config, RuleTeacherConfig
from socpo_fast.socratic.graders import CheckedGrader, Grader, make_grader
from socpo_fast.socratic.teachers import Teacher
from socpo_fast.types import Question

# Begins the name, in the settings, of what only a caller in Python can give.
FROM_PYTHON = "python:"


@dataclass(frozen=True, kw_only=True)
class UserParts:
    """What a caller in Python gives in place of what a setting names; None: as the setting says.

    The setting then holds a name for people. It begins with FROM_PYTHON, unless the same part can
    also be loaded by that name.
    """

    train: Sequence[Mapping[str, Any] | Question] | None = None
    eval: Sequence[Mapping[str, Any] | Question] | None = None
    teacher: Teacher | None = None
    grader: Grader | None = None

    def check(self, config: Config) -> None:
        """Refuses settings that name a part from Python which is not here."""
        rule = config.teacher.rule if isinstance(config.teacher, RuleTeacherConfig) else ""
        for key, name, argument, part in (
            ("data.train", config.data.train, "data", self.train),
            ("data.eval", config.data.eval, "eval", self.eval),
            ("data.grader", config.data.grader, "grader", self.grader),
            ("teacher.rule", rule, "teacher", self.teacher),
        ):
            if part is None and (name or "").startswith(FROM_PYTHON):
                raise ValueError(
                    f"config: {key} must name what this process can load, got {name}, which was "
                    f"given from Python; call socpo_fast.train({argument}=..) again, or set {key}"
                )

    def make_grader(self, config: Config) -> CheckedGrader:
        """Returns the grader, under the name and with the limits of the settings."""
        limits = config.grader.model_dump()
        if self.grader is not None:
            return CheckedGrader(self.grader, config.data.grader, **limits)
        return make_grader(config.data.grader, **limits)


def name_of(function: object) -> str:
    """Returns "module:function" if that loads this very object, else "python:module:function"."""
    source: Any = function if hasattr(function, "__qualname__") else type(function)
    name = f"{source.__module__}:{source.__qualname__}"
    # Another process has another __main__.
    module = None if source.__module__ == "__main__" else sys.modules.get(source.__module__)
    is_loadable = getattr(module, source.__qualname__, None) is function
    return name if is_loadable else FROM_PYTHON + name
