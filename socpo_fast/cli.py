"""Runs the command line: `socpo train|eval|rollout|plan|report|export|env`. Read main, then parse.

    socpo COMMAND [--config FILE.toml] [--section.key value ...]

argparse splits the arguments and writes --help. config validates the values, so that a mistake in a
file and one on the command line give the same message. Torch is imported by the command that needs
it, after the configuration has been accepted. The docstrings of the commands are the help that
users see.

Exit codes: 0 success; 2 an error of the caller or the disk, reported in one line (SOCPO_TRACEBACK=1
shows the traceback); 128 plus the signal's number if a signal stopped it (130 for Ctrl-C).
"""

import argparse
import difflib
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from socpo_fast.config import Config, load_config, read_toml
from socpo_fast.config.text import (
    describe,
    expand_home,
    fields_of,
    rule_of,
    sections_of,
    to_text,
    unknown_key,
)
from socpo_fast.files import RunFailed
from socpo_fast.report.printable import one_line, printable, tell


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code.

    Without argv it reads the arguments of the process, and makes sure that the process then ends,
    even if a thread is still waiting for a teacher that does not answer.
    """
    if argv is not None:
        return run(argv)
    open_outputs()
    code: Any = 1
    try:
        code = run(sys.argv[1:])
    except SystemExit as exit_error:
        code = exit_error.code or 0
    finally:
        try:
            sys.stdout.flush()
        except (OSError, ValueError, AttributeError):
            # stdout is closed (`socpo .. | head`). Without it the interpreter does not flush it
            # again at exit, which would change the exit code.
            sys.stdout = None
        # Half a second for a normal exit, which joins all threads; then the process ends anyway.
        exit_timer = threading.Timer(0.5, os._exit, [code])
        exit_timer.daemon = True
        exit_timer.start()
    return code


def open_outputs() -> None:
    """Gives the process outputs that take any text, also where the caller has closed them."""
    # A closed 1 or 2 would be the number of the next file that is opened. What a library writes to
    # its stderr would then land in that file of the run.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, stream)
    # Python's own raises if a function of the user has closed stderr.
    warnings.showwarning = lambda message, *_rest, **_named: complain(f"warning: {message}")


def complain(text: str) -> None:
    """Prints one line to stderr, if it takes one."""
    with suppress(OSError):
        tell(one_line(text), sys.stderr)


def run(words: Sequence[str]) -> int:
    """Runs one command and returns the exit code."""
    warnings.formatwarning = lambda message, *_rest, **_named: (
        one_line(f"warning: {message}") + "\n"
    )
    try:
        if not words or words[0] in ("-h", "--help"):
            tell(USAGE)
            return 0 if words else 2
        command_of(words[0])(words[1:])
    except KeyboardInterrupt:
        complain("interrupted")
        return 130
    except (ValueError, TypeError, OSError, RunFailed) as error:
        if os.environ.get("SOCPO_TRACEBACK") == "1":
            raise
        complain(str(error))
        return 2
    return 0


def train(words: Sequence[str]) -> None:
    """train a student, or go on where the run stopped; writes runs/NAME"""
    config, _ = parse("train", words)
    load("trainer").train(config)


def evaluate(words: Sequence[str]) -> None:
    """unassisted and assisted accuracy of a checkpoint on data.eval: a table, then one JSON line"""
    config, options = parse("eval", words)
    checkpoint = expand_home(options["checkpoint"]) if "checkpoint" in options else None
    metrics = load("measure").evaluate(config, checkpoint)
    from socpo_fast.report.accuracy import accuracy_text

    tell(accuracy_text(metrics))
    tell(json.dumps(metrics))


def rollout(words: Sequence[str]) -> None:
    """roll out without updates; writes runs/NAME/rollouts"""
    config, _ = parse("rollout", words)
    load("measure").rollout_only(config)


def plan(words: Sequence[str]) -> None:
    """what a run takes of a card's memory, and the least time of a batch; no card needed"""
    # A plan is for a card, also when the file is for a run on a CPU. The arguments of the command
    # line come last, so that an explicit --run.device cpu there is still refused.
    config, options = parse("plan", ["--run.device", "cuda", *words])
    from socpo_fast.report.plan import plan_text
    from socpo_fast.session import find_student

    tell(plan_text(config, find_student(config), options))


def load(name: str) -> Any:
    """Imports and returns a module of the package; Ctrl-C ends the process during the import."""
    # The import of torch sometimes swallows a KeyboardInterrupt. Until it is done, the system's own
    # handler ends the process instead: no run has begun yet. A handler set by somebody else, or
    # another thread, is left alone.
    is_main = threading.current_thread() is threading.main_thread()
    is_ours = is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    module = import_module(f"socpo_fast.{name}")
    if is_ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return module


def report(words: Sequence[str]) -> None:
    """write curves.png and report.html of a run folder: socpo report runs/NAME"""
    if asks_for_help("report", words):
        return
    if len(words) != 1 or words[0].startswith("-"):
        raise ValueError(
            f"report: arguments must be one run folder, got {list(words)}; for example socpo "
            "report runs/run"
        )
    from socpo_fast.report.write import write_report

    tell(str(write_report(Path(expand_home(words[0])))))


def export(words: Sequence[str]) -> None:
    """write all rollouts of a run to one parquet file in verl's layout"""
    if asks_for_help("export", words):
        return
    if len(words) != 2 or any(word.startswith("-") for word in words):
        raise ValueError(
            f"export: arguments must be a run folder and a file, got {list(words)}; for example "
            "socpo export runs/run rollouts.parquet"
        )
    from socpo_fast.report.rollouts import export_rollouts

    folder, path = map(expand_home, words)
    tell(f"{path}: {export_rollouts(folder, path)} rollouts")


def env(words: Sequence[str]) -> None:
    """print device, versions and which implementation each op uses"""
    if asks_for_help("env", words):
        return
    if words:
        raise ValueError(f"env: arguments must be none, got {list(words)}")
    from socpo_fast.ops import available_impls
    from socpo_fast.report.environment import environment

    impls = {f"op {op}": impl for op, impl in available_impls().items()}
    for name, value in {**environment(), **impls}.items():
        tell(f"{name:<24}{value}")


def asks_for_help(command: str, words: Sequence[str]) -> bool:
    """Whether the arguments of a command without settings ask for help; prints it then."""
    if {"-h", "--help"}.isdisjoint(words):
        return False
    arguments = {"report": " FOLDER", "export": " FOLDER FILE.parquet"}.get(command, "")
    tell(f"usage: socpo {command}{arguments}\n\n{COMMANDS[command].__doc__}.")
    return True


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "eval": evaluate,
    "rollout": rollout,
    "plan": plan,
    "report": report,
    "export": export,
    "env": env,
}
USAGE = "\n".join(
    [
        "usage: socpo COMMAND [--config FILE.toml] [--section.key value ...]",
        "",
        *(f"  {name:<9}{command.__doc__}" for name, command in COMMANDS.items()),
        "",
        "socpo train --help lists every setting with unit, range and default.",
    ]
)


def command_of(word: str) -> Callable[[Sequence[str]], None]:
    """Returns the command of a name; refuses an unknown one with the nearest known name."""
    if word not in COMMANDS:
        nearest = difflib.get_close_matches(word, COMMANDS, n=1)
        advice = f"did you mean {nearest[0]}?" if nearest else "known: " + ", ".join(COMMANDS)
        raise ValueError(f"socpo: unknown command {word}; {advice}")
    return COMMANDS[word]


def parse(command: str, words: Sequence[str]) -> tuple[Config, dict[str, str]]:
    """Returns the configuration that the arguments describe, and the command's own options.

    Prints the help and exits if the arguments contain --help.
    """
    command_options = OPTIONS.get(command, {})
    known_flags = {f"--{name}" for name in ("config", *command_options, *fields_of(Config))}
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
                raise ValueError(
                    f"socpo {command}: {name} must be followed by its value, got nothing; none is "
                    "a word"
                )
        joined.append(name + equals + value)
    paths = [word.removeprefix("--config=") for word in joined if word.startswith("--config=")]
    toml_path = paths[-1] if paths and paths[-1] != "none" else None
    # The parser has no defaults, so that it returns exactly the settings on the command line. One
    # that equals the default counts too, because the file may say otherwise.
    parsed, unknown = reader(
        command, {} if toml_path is None else read_toml(toml_path)
    ).parse_known_args(joined)
    if unknown:
        if not unknown[0].startswith("--"):
            raise ValueError(
                f"socpo {command}: unexpected {unknown[0]!r}; settings are given as --section.key "
                "value"
            )
        raise ValueError(unknown_key(Config, unknown[0].partition("=")[0].removeprefix("--")))
    texts = vars(parsed)
    del texts["config"]
    # What is left in texts after this are settings.
    options = {
        name: text for name in command_options if (text := texts.pop(name, "none")) != "none"
    }
    return load_config(toml_path, texts), options


class Reader(argparse.ArgumentParser):
    """An argument parser that raises its errors, so that they are printed like all others."""

    def error(self, message: str) -> NoReturn:
        """Raises what argparse would print with the usage before it exits."""
        raise ValueError(f"{self.prog}: {message}")


def reader(command: str, tables: dict[str, Any]) -> Reader:
    """Returns a parser of all settings as text; its --help shows the file's values as defaults."""
    parser = Reader(
        prog=f"socpo {command}",
        usage="%(prog)s [--config FILE.toml] [--section.key VALUE ...]",
        description=f"{COMMANDS[command].__doc__}.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE.toml", default="none", help=CONFIG_HELP)
    for name, (metavar, meaning) in OPTIONS.get(command, {}).items():
        parser.add_argument(f"--{name}", metavar=metavar, help=meaning)
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


CONFIG_HELP = "TOML file of [section] tables; the command line overrides it. (none = defaults)"
# command -> its own options -> (name of the value, help)
OPTIONS = {
    "eval": {
        "checkpoint": (
            "FOLDER",
            "checkpoint folder to evaluate; best = of the run's best evaluation. (none = its "
            "last, or student.path)",
        ),
    },
    "plan": {
        "card": ("NAME", "kind of card, such as h100. (none = this machine's)"),
        "prompt_tokens": ("TOKENS", "of an ordinary prompt, for the time. (none = 300)"),
        "answer_tokens": ("TOKENS", "of an ordinary answer. (none = rollout.max_new_tokens)"),
        "guidance_tokens": ("TOKENS", "of ordinary guidance. (none = 130)"),
    },
}


if __name__ == "__main__":
    sys.exit(main())
