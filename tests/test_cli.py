"""The command line: arguments become a Config, mistakes are one line and exit code 2.

torch is only imported once the configuration is known to be good.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import socpo_fast
from socpo_fast.arguments import parse
from socpo_fast.cli import COMMANDS, main
from socpo_fast.config import DEMO, Config, load_config
from socpo_fast.config.text import fields_of
from socpo_fast.types import GuidanceRequest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def toml_path(tmp_path: Path) -> str:
    path = tmp_path / "run.toml"
    path.write_text('[train]\nlr = 0.25\n[run]\nname = "from_file"\n', encoding="utf-8")
    return str(path)


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Replaces socpo_fast.trainer and .measure by a fake that records its calls."""
    fake = SimpleNamespace(calls=[], error=None)
    fake.metrics = {
        "success/unassisted": 0.5,
        "success/unassisted_low": 0.25,
        "success/unassisted_high": 0.75,
    }

    def record(*arguments: object, dry_run: bool = False) -> dict[str, float]:
        fake.calls.append((*arguments, dry_run))
        if fake.error is not None:
            raise fake.error
        return fake.metrics

    fake.train = fake.evaluate = fake.rollout_only = record
    for name in ("trainer", "measure"):
        monkeypatch.setitem(sys.modules, f"socpo_fast.{name}", fake)
        monkeypatch.setattr(socpo_fast, name, fake, raising=False)
    return fake


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config", "FILE", "--train.lr", "0.5", "--run.live", "false"],
        ["--train.lr=0.5", "--run.live=false", "--config=FILE"],
        ["--run.live", "no", "--config", "FILE", "--train.lr", "0.1", "--train.lr", "0.5"],
    ],
    ids=["spaces", "equals signs, file last", "last one counts"],
)
def test_arguments_override_the_file_in_any_order(arguments: list[str], toml_path: str) -> None:
    config, options = parse("train", [word.replace("FILE", toml_path) for word in arguments])
    assert (config.run.name, config.train.lr, config.run.live, options) == (
        "from_file",
        0.5,
        False,
        {},
    )


def test_argument_equal_to_default_overrides_the_file(toml_path: str) -> None:
    assert parse("train", ["--config", toml_path, "--train.lr", "1e-06"])[0].train.lr == 1e-6


def test_hyphens_and_negative_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse("train", ["--rollout.max-new-tokens", "7"])[0].rollout.max_new_tokens == 7
    for arguments in (["--train.max-grad-norm", "-1"], ["--train.max-grad-norm=-1"]):
        assert main(["train", *arguments]) == 2
        assert (
            capsys.readouterr().err
            == "config: train.max_grad_norm must be a number > 0, got -1.0\n"
        )
    assert parse("train", ["--loss.entropy-coef", "-1e-3"])[0].loss.entropy_coef == -1e-3


REFUSED = {
    "unknown key": (
        ["train", "--train.lr_rate", "3"],
        "config: unknown key train.lr_rate; did you mean train.lr?",
    ),
    "with equals sign": (
        ["train", "--trian.lr=3"],
        "config: unknown key trian.lr; did you mean train.lr?",
    ),
    "the long name": (
        ["train", "--train.learning_rate", "1e-6"],
        "config: unknown key train.learning_rate; did you mean train.lr?",
    ),
    "no value": (
        ["train", "--train.lr"],
        "socpo train: --train.lr must be followed by its value, got nothing; write "
        "--train.lr VALUE\n",
    ),
    "no value that may be absent": (
        ["train", "--data.subset"],
        "socpo train: --data.subset must be followed by its value, got nothing; write "
        "--data.subset VALUE\n",
    ),
    "no value where there is no default": (
        ["train", "--teacher.url", "--run.live"],
        "socpo train: --teacher.url must be followed by its value, got nothing; write "
        "--teacher.url VALUE\n",
    ),
    "a flag for a value": (
        ["train", "--run.max-x", "--train.lr"],
        "socpo train: --train.lr must be followed by",
    ),
    "no file name": (
        ["eval", "--config", "--checkpoint", "x"],
        "socpo eval: --config must be followed by its value, got nothing; write --config "
        "FILE.toml\n",
    ),
    "out of range": (
        ["train", "--train.lr", "7"],
        "config: train.lr must be a number > 0 and <= 1, got 7.0",
    ),
    "stray word": (
        ["train", "foo"],
        "socpo train: unexpected 'foo'; settings are given as --section.key value",
    ),
    "checkpoint of train": (["train", "--checkpoint", "x"], "config: unknown key checkpoint; "),
    "command": (["trian"], "socpo: unknown command trian; did you mean train?"),
    "no file": (["train", "--config", "none.toml"], "config: none.toml must be a readable file: "),
    "two reports": (["report", "a", "b"], "report: arguments must be one run folder, got ['a', "),
    "report elsewhere": (["report", "no/such/run"], "report: no/such/run must be a run folder"),
    "nowhere to begin": (
        ["init"],
        "init: arguments must be one folder, got []; for example socpo ",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_exit_2_with_one_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = REFUSED[case]
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(message)
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_bad_key_is_refused_fast_without_torch() -> None:
    code = (
        "import sys, time; from socpo_fast.cli import main\n"
        "code = main(['train', '--train.lr_rate', '3'])\n"
        "print(code, [m for m in ('torch', 'transformers') if m in sys.modules], "
        "time.process_time() < 2)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout == "2 [] True\n"


@pytest.mark.parametrize("command", ["train", "eval", "rollout"])
def test_help_shows_every_field_with_range_and_default(
    command: str,
    toml_path: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stopped:
        main([command, "--config", toml_path, "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert [name for name in fields_of(Config) if f"--{name}" not in text] == []
    assert "AdamW learning rate after warm-up. (a number > 0 and <= 1) (default: 0.25)" in text
    assert ("--checkpoint" in text) == (command == "eval")
    functions = text[text.index("functions of your own") :]
    for field in dataclasses.fields(GuidanceRequest):
        assert f".{field.name}" in functions
    assert "grade(text, question)" in functions
    assert "Guidance(text=..)" in functions


def test_usage_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert [line.split()[0] for line in text.splitlines()[2:-2]] == list(COMMANDS)
    assert list(COMMANDS)[:2] == ["demo", "init"], "a newcomer reads these first"
    assert main([]) == 2
    assert capsys.readouterr().out == text


@pytest.mark.parametrize("command", ["init", "report", "export", "env"])
def test_commands_without_settings_have_help(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for flag in ("--help", "-h"):
        assert main([command, flag]) == 0
        text = capsys.readouterr().out
        assert text.startswith(f"usage: socpo {command}")
        assert str(COMMANDS[command].__doc__) in text


def test_commands_reach_the_trainer(
    trainer: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--run.seed", "5"]) == 0
    assert main(["rollout"]) == 0
    assert main(["eval", "--checkpoint", "runs/x/checkpoints/update_000010"]) == 0
    (trained, *_), (rolled, *_), (evaluated, checkpoint, _) = trainer.calls
    assert (trained.run.seed, rolled, evaluated) == (5, Config(), Config())
    assert checkpoint == "runs/x/checkpoints/update_000010"
    *_, loading, header, row, last = capsys.readouterr().out.splitlines()
    assert loading == "loading PyTorch .."
    assert json.loads(last) == trainer.metrics
    assert header.endswith("share   95 % interval, by question")
    assert row == "unassisted (avg@k)  50.0 %   25.0 to 75.0 %"


@pytest.mark.parametrize("flag", ["--dry-run", "--dry_run", "--quiet"])
@pytest.mark.parametrize("command", ["demo", "train", "eval", "rollout"])
def test_flags_take_no_value(
    command: str,
    flag: str,
    trainer: SimpleNamespace,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([command, flag, "--run.seed", "5"]) == 0
    [(config, *_, dry_run)] = trainer.calls
    assert (config.run.seed, config.run.quiet, dry_run) == (5, flag == "--quiet", flag != "--quiet")
    assert ("loading" in capsys.readouterr().out) == (flag != "--quiet")
    assert main([command, flag, "true"]) == 2
    assert f"socpo {command}: unexpected 'true'" in capsys.readouterr().err


def test_demo_is_the_shipped_run(trainer: SimpleNamespace) -> None:
    assert main(["demo", "--run.num-batches", "3"]) == 0
    [(config, _)] = trainer.calls
    shipped = load_config(DEMO, {"run.num_batches": 3})
    assert config == shipped
    assert (config.run.name, config.data.train) == ("molar_mass", "builtin")
    assert main(["demo", "--config", "x.toml"]) == 2


def test_exit_codes_of_failing_commands(
    trainer: SimpleNamespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer.error = ValueError("data: train.parquet row 17:\n  ground_truth is missing")
    assert main(["train"]) == 2
    assert capsys.readouterr().err == "data: train.parquet row 17: ground_truth is missing\n"
    trainer.error = KeyboardInterrupt()
    assert main(["train"]) == 130
    trainer.error = RuntimeError("out of memory")
    with pytest.raises(RuntimeError):
        main(["train"])
    trainer.error = ValueError("x")
    monkeypatch.setenv("SOCPO_TRACEBACK", "1")
    with pytest.raises(ValueError, match="x"):
        main(["train"])


def test_env_names_machine_versions_and_ops(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    facts = dict(
        line.split(maxsplit=1)
        for line in capsys.readouterr().out.splitlines()
        if not line.startswith("op ")
    )
    # A CUDA build calls itself 2.11.0+cu130, while its metadata may say 2.11.0.
    assert facts["torch"] in (torch.__version__, torch.__version__.partition("+")[0])
    assert int(facts["cores"]) >= 1


def test_a_missing_file_is_told_with_near_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rule = "must be a readable file:"
    for path, advice in (
        ("config.toml", "No such file or directory; socpo init FOLDER writes one"),
        ("my_task/confg.toml", "No such file or directory; did you mean my_task/config.toml?"),
        ("my_task", "Is a directory; did you mean my_task/config.toml?"),
        ("my_task/other", "No such file or directory; there is my_task/config.toml"),
    ):
        assert main(["train", "--config", path]) == 2
        assert capsys.readouterr().err == f"config: {path} {rule} {advice}\n"
        if not Path("my_task").exists():
            assert main(["init", "my_task"]) == 0
            capsys.readouterr()


def test_defaults_suit_the_builtin_student() -> None:
    """Also where other settings of the section are given; an explicit value and a model win."""
    assert parse("train", [])[0].rollout.max_new_tokens == 128
    assert parse("train", ["--rollout.group_size", "2"])[0].rollout.max_new_tokens == 128
    assert parse("train", ["--rollout.max_new_tokens", "99"])[0].rollout.max_new_tokens == 99
    assert parse("train", ["--student.path", "my/model"])[0].rollout.max_new_tokens == 1024


def test_explicit_default_differs_from_no_argument() -> None:
    """With own training data data.eval defaults to none, but an explicit builtin is refused."""
    own_data = ["--data.train", "x.jsonl", "--teacher.kind", "retry"]
    assert parse("train", own_data)[0].data.eval is None
    with pytest.raises(ValueError, match="data.eval must be your own questions or none"):
        parse("train", [*own_data, "--data.eval", "builtin"])
    with pytest.raises(ValueError, match="data.eval must be your own questions or none"):
        parse("train", [*own_data, "--data.eval=builtin"])
