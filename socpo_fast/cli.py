"""The command line: `socpo train|eval|rollout|report|env`. Read main, then parse.

    socpo COMMAND [--config FILE.toml] [--section.key value ...]

tyro reads the words and writes --help; config validates values, so a mistake in a file and one on the command line
read the same. Torch is imported by the command that needs it, after the configuration has been accepted.
Exit codes: 0 done, 2 the caller's or the disk's fault in one line (SOCPO_TRACEBACK=1 shows
where), 128 and the signal's number (130 Ctrl-C) for what was stopped.
"""

import dataclasses
import difflib
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import tyro

from socpo_fast.config import Config, load_config, read_toml
from socpo_fast.config.text import describe, expand_home, fields_of, rule_of, sections_of, to_text, unknown_key
from socpo_fast.files import RunFailed


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. None: those of the process, which ends with it.

    A call to a teacher that hangs on a thread of its own does not hold up the end of the process.
    """
    if argv is not None:
        return run(argv)
    code: Any = 1
    try:
        code = run(sys.argv[1:])
    except SystemExit as ended:
        code = ended.code or 0
    finally:
        try:
            sys.stdout.flush()
        except (OSError, ValueError, AttributeError):  # closed: the exit code stays what it is
            sys.stdout = None
        last = threading.Timer(0.5, os._exit, [code])
        last.daemon = True
        last.start()
    return code


def run(argv: Sequence[str]) -> int:
    """Run one command; returns the exit code."""
    words = list(argv)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 2
    warnings.formatwarning = lambda message, *_rest, **_named: f"warning: {message}\n"
    try:
        command_of(words[0])(words[1:])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, RunFailed) as error:
        if os.environ.get("SOCPO_TRACEBACK") == "1":
            raise
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


def train(words: Sequence[str]) -> None:
    """train a student, or go on where the run stopped; writes runs/NAME"""
    config, _ = parse("train", words)
    load_trainer().train(config)


def evaluate(words: Sequence[str]) -> None:
    """unassisted and assisted accuracy of a checkpoint on data.eval: a table, then one JSON line"""
    config, checkpoint = parse("eval", words)
    metrics = load_trainer().evaluate(config, checkpoint)
    from socpo_fast.report.accuracy import accuracy_text

    print(accuracy_text(metrics))
    print(json.dumps(metrics))


def rollout(words: Sequence[str]) -> None:
    """roll out without updates; writes runs/NAME/rollouts"""
    config, _ = parse("rollout", words)
    load_trainer().rollout_only(config)


def load_trainer() -> Any:
    """The trainer. Importing it imports torch, which swallows a KeyboardInterrupt now and then.

    So Ctrl-C ends the process meanwhile, as the system does; nothing is begun yet.
    """
    is_main = threading.current_thread() is threading.main_thread()
    is_usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_main and is_usual:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from socpo_fast import trainer

    if is_main and is_usual:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return trainer


def report(words: Sequence[str]) -> None:
    """write curves.png and report.html of a run folder: socpo report runs/NAME"""
    if len(words) != 1 or words[0].startswith("-"):
        raise ValueError(
            f"report: arguments must be one run folder, got {list(words)}; for example socpo report runs/run"
        )
    from socpo_fast.report.write import write_report

    print(write_report(Path(expand_home(words[0]))))


def env(words: Sequence[str]) -> None:
    """print device, versions and which implementation each op uses"""
    if words:
        raise ValueError(f"env: arguments must be none, got {list(words)}")
    from socpo_fast.ops import available_impls
    from socpo_fast.report.environment import environment

    impls = {f"op {op}": impl for op, impl in available_impls().items()}
    for name, fact in {**environment(), **impls}.items():
        print(f"{name:<24}{fact}")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "eval": evaluate,
    "rollout": rollout,
    "report": report,
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
    if word not in COMMANDS:
        nearest = difflib.get_close_matches(word, COMMANDS, n=1)
        advice = f"did you mean {nearest[0]}?" if nearest else "known: " + ", ".join(COMMANDS)
        raise ValueError(f"socpo: unknown command {word}; {advice}")
    return COMMANDS[word]


def parse(command: str, words: Sequence[str]) -> tuple[Config, str | None]:
    """The configuration that words describe, and --checkpoint of `eval`. Prints --help and exits when that is asked."""
    for word, following in pairwise([*words, "--"]):
        name = word.removeprefix("--").replace("-", "_")
        is_ours = name in {"config", "checkpoint", *fields_of(Config)}
        if word.startswith("--") and following.startswith("--") and is_ours:
            raise ValueError(f"socpo {command}: --{name} must be followed by its value, got nothing; none is a word")
    only_file: Any = dataclasses.make_dataclass("File", [_flag("config", CONFIG_HELP, "FILE.toml", "none")])
    toml_path = tyro.cli(only_file, args=words, add_help=False, return_unknown_args=True)[0].config
    toml_path = None if toml_path == "none" else toml_path
    fields = fields_of(Config).items()
    defaults = {name: to_text(field.default) for name, field in fields if not field.is_required()}
    tables = {} if toml_path is None else read_toml(toml_path)
    defaults |= {
        f"{section}.{key}": to_text(value)
        for section, table in tables.items()
        if isinstance(table, dict)
        for key, value in table.items()
    }
    parsed, unknown = tyro.cli(
        _flags(command, defaults),
        prog=f"socpo {command}",
        description=f"Command: {COMMANDS[command].__doc__}.",
        args=words,
        use_underscores=True,
        return_unknown_args=True,
    )
    if unknown:
        name = unknown[0].partition("=")[0].removeprefix("--").replace("-", "_")
        if not unknown[0].startswith("--"):
            raise ValueError(f"socpo {command}: unexpected {unknown[0]!r}; settings are given as --section.key value")
        raise ValueError(unknown_key(Config, name))
    texts = {f"{s}.{key}": text for s in sections_of(Config) for key, text in vars(getattr(parsed, s)).items()}
    # What is given counts, even where it is the default: a file, or data.train, may have another.
    flags = (word for word in words if word.startswith("--"))
    named = {flag.partition("=")[0].removeprefix("--").replace("-", "_") for flag in flags}
    config = load_config(toml_path, {name: text for name, text in texts.items() if name in named})
    has_checkpoint = command == "eval" and parsed.checkpoint != "none"
    return config, expand_home(parsed.checkpoint) if has_checkpoint else None


CONFIG_HELP = "TOML file of [section] tables; the command line overrides it. (none = defaults)"
CHECKPOINT_HELP = (
    "checkpoint folder to evaluate; best = of the run's best evaluation. (none = its last, or student.path)"
)


def _flags(command: str, defaults: dict[str, str]) -> Any:
    """A dataclass of dataclasses of text: what tyro needs to know of Config to read words and to print help."""
    flags = [_flag("config", CONFIG_HELP, "FILE.toml", "none")]
    if command == "eval":
        flags.append(_flag("checkpoint", CHECKPOINT_HELP, "FOLDER", "none"))
    fields = fields_of(Config)
    for section, (tag, models) in sections_of(Config).items():
        names = [name for name in fields if name.startswith(f"{section}.")]
        keys = [
            _flag(
                name.removeprefix(f"{section}."),
                f"{describe(Config, name)}. ({rule_of(Config, name)})",
                "VALUE",
                defaults.get(name, "none"),
            )
            for name in names
        ]
        first = next(iter(models.values()))
        table = dataclasses.make_dataclass(section, keys)
        table.__doc__ = first.__mro__[1 if tag else 0].__doc__
        flags.append((section, table, dataclasses.field(default_factory=table)))
    return dataclasses.make_dataclass(command, flags)


def _flag(name: str, help_text: str, metavar: str, default: str) -> tuple[str, Any, Any]:
    annotation = Annotated[str, tyro.conf.arg(help=help_text, metavar=metavar)]
    return name, annotation, dataclasses.field(default=default)


if __name__ == "__main__":
    sys.exit(main())
