"""Reads the arguments of a command: `--section.key value`, the command's own options, --help.

Read parse, then reader. argparse splits the arguments and writes --help. config validates the
values, so that a mistake in a file and one on the command line give the same message. torch is not
imported here.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from socpo_fast.config import Config, load_config, read_toml
from socpo_fast.config.text import (
    describe,
    fields_of,
    rule_of,
    sections_of,
    to_text,
    unknown_key,
)
from socpo_fast.report.printable import printable

CONFIG_OPTION = (
    "FILE.toml",
    "TOML file of [section] tables; the command line overrides it. (none = defaults)",
)
# command -> its own options -> (name of the value, help)
OPTIONS = {
    "train": {"config": CONFIG_OPTION},
    "eval": {
        "config": CONFIG_OPTION,
        "checkpoint": (
            "FOLDER",
            "checkpoint folder to evaluate; best = of the run's best evaluation. (none = its "
            "last, or student.path)",
        ),
    },
    "rollout": {"config": CONFIG_OPTION},
    "plan": {
        "config": CONFIG_OPTION,
        "card": ("NAME", "kind of card, such as h100. (none = this machine's)"),
        "prompt_tokens": ("TOKENS", "of an ordinary prompt, for the time. (none = 300)"),
        "answer_tokens": ("TOKENS", "of an ordinary answer. (none = rollout.max_new_tokens)"),
        "guidance_tokens": ("TOKENS", "of ordinary guidance. (none = 130)"),
    },
}
# Flags of the commands that compute -> (what they set, help)
FLAGS = {
    "dry-run": ("dry_run", "load everything, say what would be done, and stop there"),
    "quiet": ("run.quiet", "the same as --run.quiet true"),
}
# What the functions of a user take and return. The starter files of `socpo init` say more.
FUNCTIONS = """\
functions of your own, named module:function (module.py in this folder, or an installed module):

  --data.grader grader:grade     def grade(text, question):
      returns a bool, a number in [0, 1], or {part: number} that add up to at most 1.
      text is the attempt; question has .ground_truth .text .messages .reference_solution
      .data_source .question_idx. An error stops the run.

  --teacher.rule teacher:guide   def guide(request):    or async def
      returns text, Guidance(text=..), or None. request has .question .student_answer .attempt_idx
      .rollout_idx .key, and where the settings show them .ground_truth (teacher.reveal_answer) and
      .reference_solution (teacher.show_reference), else None. None and errors cost one rollout its
      next attempt; they are counted, and the first of each kind is shown.

socpo init FOLDER writes both to start from."""


def parse(
    command: str, words: Sequence[str], *, description: str = "", toml_path: Path | None = None
) -> tuple[Config, dict[str, str]]:
    """Returns the configuration that the arguments describe, and the command's own options.

    Prints the help and exits if the arguments contain --help.

    Args:
        description: of the command, for its help.
        toml_path:   the file of a command without --config.
    """
    command_options = OPTIONS.get(command, {})
    known_flags = {f"--{name}" for name in (*command_options, *fields_of(Config))}
    remaining = iter(words)
    joined = []
    for word in remaining:
        name, equals, value = word.partition("=")
        name = f"--{name[2:].replace('-', '_')}" if name.startswith("--") else name
        if name in known_flags and not equals:
            # argparse would take a value with a leading minus (-1) for a flag. As one argument,
            # --name=-1, it is unambiguous.
            equals = "="
            value = next(remaining, "--")
            if value.startswith("--"):
                metavar, _ = command_options.get(name.removeprefix("--"), ("VALUE", ""))
                raise ValueError(
                    f"socpo {command}: {name} must be followed by its value, got nothing; "
                    f"write {name} {metavar}"
                )
        joined.append(name + equals + value)
    paths = [word.removeprefix("--config=") for word in joined if word.startswith("--config=")]
    if paths and paths[-1] != "none" and "config" in command_options:
        toml_path = Path(paths[-1])
    # The parser has no defaults, so that it returns exactly the settings on the command line. One
    # that equals the default counts too, because the file may say otherwise.
    parsed, unknown = reader(
        command, description, {} if toml_path is None else read_toml(toml_path)
    ).parse_known_args(joined)
    if unknown:
        if not unknown[0].startswith("--"):
            raise ValueError(
                f"socpo {command}: unexpected {unknown[0]!r}; settings are given as --section.key "
                "value"
            )
        raise ValueError(unknown_key(Config, unknown[0].partition("=")[0].removeprefix("--")))
    texts = vars(parsed)
    names = [name for name in (*command_options, "dry_run") if name in texts]
    options = {name: texts.pop(name) for name in names}
    # What is left in texts are settings.
    options = {name: text for name, text in options.items() if text != "none" and name != "config"}
    return load_config(toml_path, texts), options


class Reader(argparse.ArgumentParser):
    """An argument parser that raises its errors, so that they are printed like all others."""

    def error(self, message: str) -> NoReturn:
        """Raises what argparse would print with the usage before it exits."""
        raise ValueError(f"{self.prog}: {message}")


def reader(command: str, description: str, tables: dict[str, Any]) -> Reader:
    """Returns a parser of all settings as text; its --help shows the file's values as defaults."""
    config = "[--config FILE.toml] " if "config" in OPTIONS.get(command, {}) else ""
    parser = Reader(
        prog=f"socpo {command}",
        usage=f"%(prog)s {config}[--section.key VALUE ...]",
        description=description,
        epilog=FUNCTIONS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for name, (metavar, meaning) in OPTIONS.get(command, {}).items():
        parser.add_argument(f"--{name}", metavar=metavar, help=meaning)
    if command != "plan":
        for name, (dest, meaning) in FLAGS.items():
            # Hyphens of the command line have become underscores by now, but are nicer to read.
            spellings = dict.fromkeys((f"--{name}", f"--{name.replace('-', '_')}"))
            parser.add_argument(
                *spellings, dest=dest, action="store_const", const="true", help=meaning
            )
    fields = fields_of(Config)
    for section, (tag, models) in sections_of(Config).items():
        first = next(iter(models.values()))
        group = parser.add_argument_group(section, first.__mro__[1 if tag else 0].__doc__)
        table = tables.get(section)
        for name in (name for name in fields if name.startswith(f"{section}.")):
            default = None if fields[name].is_required() else fields[name].default
            if isinstance(table, dict):
                default = table.get(name.removeprefix(f"{section}."), default)
            meaning = (
                f"{describe(Config, name)}. ({rule_of(Config, name)}) (default: {to_text(default)})"
            )
            group.add_argument(
                f"--{name}", metavar="VALUE", help=printable(meaning).replace("%", "%%")
            )
    return parser
