"""Sections of the configuration: kinds of teacher, own data, options that follow the same rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from socpo_fast.config import Config, RetryTeacherConfig, load_config, read_toml
from socpo_fast.config.text import fields_of, rule_of
from socpo_fast.ops import CreditOptions, PolicyLossOptions
from socpo_fast.report.settings import config_text
from socpo_fast.socratic.episode import RolloutOptions


def test_own_data_are_evaluated_on_own_data_or_none(tmp_path: Path) -> None:
    own_data = {"data.train": "x.jsonl", "teacher.kind": "retry"}
    assert load_config(None, own_data).data.eval is None
    assert load_config(None, own_data | {"data.eval": "y.jsonl"}).data.eval == "y.jsonl"
    assert (
        load_config(None, {"data.eval": "y.jsonl", "teacher.kind": "retry"}).data.train == "builtin"
    )
    assert load_config(None, {}).data.eval == "builtin"
    path = tmp_path / "config.toml"
    path.write_text('[data]\ntrain = "builtin"\neval = "builtin"\n', encoding="utf-8")
    with pytest.raises(
        ValueError, match="data.eval must be your own questions or none for data.train x.jsonl"
    ):
        load_config(path, own_data)


def test_kinds_of_teacher_round_trip(tmp_path: Path) -> None:
    """config.toml of a run has the settings of its kind of teacher only."""
    path = tmp_path / "config.toml"
    for kind, settings in {
        "rule": {"teacher.rule": "json:dumps"},
        "retry": {"teacher.retry_text": "Again."},
        "local": {"teacher.path": "models/x"},
        "endpoint": {"teacher.url": "http://h/v1", "teacher.model": "m"},
    }.items():
        config = load_config(None, {"teacher.kind": kind, **settings})
        path.write_text(config_text(config), encoding="utf-8")
        assert load_config(path) == config
        assert config.teacher.kind == kind
        assert ("url = " in path.read_text(encoding="utf-8")) == (kind == "endpoint")


def test_another_kind_drops_the_files_settings() -> None:
    """For an ablation of a run with a server, teacher.kind on the command line is enough."""
    path = Path(__file__).parent.parent / "configs" / "smollm2_sciknoweval_endpoint.toml"
    config = load_config(path, {"teacher.kind": "retry"})
    assert config.teacher == RetryTeacherConfig(
        **{key: value for key, value in read_toml(path)["teacher"].items() if key in SHARED}
    )
    assert load_config(path).teacher.kind == "endpoint"
    with pytest.raises(ValueError, match="teacher.kind must be endpoint for teacher.url"):
        load_config(path, {"teacher.kind": "retry", "teacher.url": "http://h"})


SHARED = {"guidance_timeout_s", "on_silence", "reveal_answer", "show_reference", "view", "on_leak"}


PROBES = (-1e9, -1.0, -1e-9, 0.0, 1e-9, 0.5, 1.0, 1.0 + 1e-9, 3.0, 1e9, float("inf"), float("nan"))


@pytest.mark.filterwarnings("ignore:compute_advantages", "ignore:config. rollout.group_size")
@pytest.mark.parametrize(
    ("options", "section"),
    [(PolicyLossOptions, "loss"), (CreditOptions, "advantage"), (RolloutOptions, "rollout")],
)
def test_config_and_options_accept_the_same_values(options: type[Any], section: str) -> None:
    """A number is accepted in a config file exactly if the dataclass of options accepts it."""
    names = [f.name for f in fields(options) if f"{section}.{f.name}" in fields_of(Config)]
    assert len(names) >= 2
    for name in names:
        default = getattr(options(), name)
        if isinstance(default, str):
            choices = rule_of(Config, f"{section}.{name}").removeprefix("one of ").split(", ")
            assert all(options(**{name: word}) for word in choices)
            continue
        for probe in PROBES:
            value = int(probe) if isinstance(default, int) and abs(probe) <= 1e9 else probe
            if isinstance(default, int) and not isinstance(value, int):
                continue
            file_accepts = accepts(load_config, None, {f"{section}.{name}": value})
            assert file_accepts == accepts(options, **{name: value}), (name, value)


def accepts(make: Callable[..., object], *args: Any, **kwargs: Any) -> bool:
    try:
        make(*args, **kwargs)
    except ValueError:
        return False
    return True


def test_a_section_of_another_shape_shows_no_secret() -> None:
    url = {"url": "https://sk-abc123@host/v1"}
    for section, message in (
        ([url], "must be a table, got list"),
        (url, "teacher.kind must be one of rule, local"),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            load_config(None, {"teacher": section})
        assert "sk-abc123" not in str(refused.value)
