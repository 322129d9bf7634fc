"""Runs the command line. Read main, run, the commands in their order, then arguments.parse.

    socpo COMMAND [--config FILE.toml] [--section.key value ...]

arguments.py reads the arguments of commands with settings. Torch is imported by the command that
needs it, after the configuration has been accepted. The docstrings of the commands are the help
that users see.

Exit codes: 0 success; 2 an error of the caller or the disk, reported in one line (SOCPO_TRACEBACK=1
shows the traceback); 128 plus the signal's number if a signal stopped it (130 for Ctrl-C).
"""

import json
import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from socpo_fast.arguments import parse
from socpo_fast.config import DEMO, Config
from socpo_fast.config.text import did_you_mean, expand_home
from socpo_fast.files import RunFailed, replace_file
from socpo_fast.report.printable import one_line, tell, tell_loading, warning_line


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
    warnings.formatwarning = warning_line
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


def demo(words: Sequence[str]) -> None:
    """see it work: train a tiny student on the built-in task, about a minute, no download"""
    config, options = parse("demo", words, description=f"{demo.__doc__}.", toml_path=DEMO)
    load("trainer", config).train(config, dry_run="dry_run" in options)


def init(words: Sequence[str]) -> None:
    """begin your own: write settings, a teacher, a grader and 20 questions that run as they are"""
    arguments = plain_arguments("init", words, 1, "one folder")
    if arguments is None:
        return
    folder = Path(expand_home(arguments[0]))
    files = {folder / name: (STARTER / name).read_bytes() for name in STARTER_FILES}
    taken = [str(path) for path in files if os.path.lexists(path)]
    if os.path.lexists(folder) and not folder.is_dir():
        taken = [str(folder)]
    if taken:
        raise ValueError(
            f"init: {folder} must be a folder without files of these names, got "
            f"{', '.join(taken)}; name another folder, nothing was written"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for path, content in files.items():
        replace_file(path, content)
    tell(
        f"{folder}: {', '.join(STARTER_FILES)}\n"
        f"next: cd {shlex.quote(str(folder))} && socpo train --config config.toml"
    )


def train(words: Sequence[str]) -> None:
    """train a student, or go on where the run stopped; writes runs/NAME"""
    config, options = parse("train", words, description=f"{train.__doc__}.")
    load("trainer", config).train(config, dry_run="dry_run" in options)


def evaluate(words: Sequence[str]) -> None:
    """accuracy of a checkpoint on data.eval: a table, then a line of JSON; adds to eval.json"""
    config, options = parse("eval", words, description=f"{evaluate.__doc__}.")
    checkpoint = expand_home(options["checkpoint"]) if "checkpoint" in options else None
    is_dry = "dry_run" in options
    metrics = load("measure", config).evaluate(config, checkpoint, dry_run=is_dry)
    if is_dry:
        return
    from socpo_fast.report.accuracy import accuracy_text

    tell(accuracy_text(metrics))
    tell(json.dumps(metrics))


def rollout(words: Sequence[str]) -> None:
    """roll out without updates; writes runs/NAME/rollouts"""
    config, options = parse("rollout", words, description=f"{rollout.__doc__}.")
    load("measure", config).rollout_only(config, dry_run="dry_run" in options)


def plan(words: Sequence[str]) -> None:
    """what a run takes of a card's memory, and the least time of a batch; no card needed"""
    # A plan is for a card, also when the file is for a run on a CPU. The arguments of the command
    # line come last, so that an explicit --run.device cpu there still counts.
    on_card = ["--run.device", "cuda", *words]
    config, options = parse("plan", on_card, description=f"{plan.__doc__}.")
    cards = load("report.cards", config)
    if "card" not in options and not (config.run.device != "cpu" and cards.has_card()):
        # Now the device that the settings name, which `on_card` has overridden.
        config, _ = parse("plan", words)
        if config.run.device == "cpu":
            load("trainer").train(config, dry_run=True)
            tell(f"for memory and time on a card add --card, one of {', '.join(cards.CARDS)}")
            return
    from socpo_fast.report.plan import plan_text
    from socpo_fast.session import find_student

    tell(plan_text(config, find_student(config, weights=False), options))


def load(name: str, config: Config | None = None) -> Any:
    """Imports and returns a module of the package; Ctrl-C ends the process during the import.

    With a config, it first says that PyTorch is loading, unless run.quiet is set.
    """
    if config is not None:
        tell_loading("PyTorch", quiet=config.run.quiet)
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
    """write report.html and curves.svg of a run: socpo report runs/NAME"""
    arguments = plain_arguments("report", words or [str(Config().folder)], 1, "one run folder")
    if arguments is None:
        return
    from socpo_fast.report.write import write_report

    tell(str(write_report(Path(expand_home(arguments[0])))))


def export(words: Sequence[str]) -> None:
    """write all rollouts of a run to one parquet file in verl's layout"""
    arguments = plain_arguments("export", words, 2, "a run folder and a file")
    if arguments is None:
        return
    from socpo_fast.report.rollouts import export_rollouts

    folder, path = map(expand_home, arguments)
    tell(f"{path}: {export_rollouts(folder, path)} rollouts")


def env(words: Sequence[str]) -> None:
    """print device, versions and which implementation each op uses"""
    if plain_arguments("env", words, 0, "none") is None:
        return
    import torch

    from socpo_fast.ops import available_impls
    from socpo_fast.report.environment import environment

    device = "cuda" if torch.cuda.is_available() else "cpu"
    impls = {f"op {op}": impl for op, impl in available_impls(device).items()}
    for name, value in {**environment(), **impls}.items():
        tell(f"{name:<24}{value}")


def plain_arguments(
    command: str, words: Sequence[str], count: int, rule: str
) -> Sequence[str] | None:
    """Returns the arguments of a command without settings; None if it has printed its help."""
    names, example = EXAMPLES[command]
    if not {"-h", "--help"}.isdisjoint(words):
        purpose = COMMANDS[command].__doc__
        tell(f"usage: socpo {command}{names}\n\n{purpose}.\n\nfor example: {example}")
        return None
    if len(words) != count or any(word.startswith("-") for word in words):
        raise ValueError(
            f"{command}: arguments must be {rule}, got {[*words]}; for example {example}"
        )
    return words


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "demo": demo,
    "init": init,
    "train": train,
    "eval": evaluate,
    "rollout": rollout,
    "plan": plan,
    "report": report,
    "export": export,
    "env": env,
}
# Commands without settings -> their arguments, and an example.
EXAMPLES = {
    "init": (" FOLDER", "socpo init my_task"),
    "report": (" [FOLDER]", "socpo report runs/run"),
    "export": (" FOLDER FILE.parquet", "socpo export runs/run rollouts.parquet"),
    "env": ("", "socpo env"),
}
STARTER = Path(__file__).parent / "starter"
STARTER_FILES = ("config.toml", "teacher.py", "grader.py", "questions.jsonl")
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
        advice = did_you_mean(word, COMMANDS) or "; known: " + ", ".join(COMMANDS)
        raise ValueError(f"socpo: unknown command {word}{advice}")
    return COMMANDS[word]


if __name__ == "__main__":
    sys.exit(main())
