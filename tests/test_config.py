"""Configuration: what is accepted, what is refused and in which words, and round trips to TOML."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from socpo_fast.config import Config, load_config
from socpo_fast.config.text import describe, fields_of, owners_of, rule_of
from socpo_fast.report.settings import config_text

ROOT = Path(__file__).parent.parent
LOCAL = {"teacher.kind": "local", "teacher.path": "models/x"}
REFUSED = {
    "unknown key, similar name": (
        {"train.lr_rate": "3"},
        "config: unknown key train.lr_rate; did you mean train.lr?",
    ),
    "unknown section, known key": (
        {"trian.lr": "3"},
        "config: unknown key trian.lr; did you mean train.lr?",
    ),
    "key without a section": ({"lr": "3"}, "config: unknown key lr; did you mean train.lr?"),
    "nothing near": ({"zz.qq": 1}, "config: unknown key zz.qq; socpo train --help lists all"),
    "above the range": (
        {"train.lr": "7"},
        "config: train.lr must be a number > 0 and <= 1, got 7.0",
    ),
    "not a number": (
        {"train.lr": "abc"},
        "config: train.lr must be a number > 0 and <= 1, got 'abc'",
    ),
    "nan": ({"train.lr": "nan"}, "config: train.lr must be a number > 0 and <= 1, got nan"),
    "a bool is no number": (
        {"train.lr": True},
        "config: train.lr must be a number > 0 and <= 1, got True",
    ),
    "a float is no count": (
        {"run.num_batches": 1.5},
        "config: run.num_batches must be an integer >= 1 and <= 1000000000, got 1.5",
    ),
    "not a choice": (
        {"train.packing": "tre"},
        "config: train.packing must be one of tree, rows, got 'tre'",
    ),
    "K of 0": (
        {"rollout.max_attempts": "0"},
        "config: rollout.max_attempts must be an integer >= 1 and <= 256, got 0",
    ),
    "a section that is no table": (
        {"train": 3},
        "config: train must be a table, got int; write [train] and key = value lines",
    ),
    "a name that is a path": ({"run.name": "../x"}, "config: run.name must be text matching ^"),
    "updates that do not fill a batch": (
        {"train.questions_per_update": 5},
        "config: train.questions_per_update must divide rollout.questions_per_batch 32, got 5",
    ),
    "bf16 on a CPU": (
        {"student.dtype": "bfloat16"},
        "config: student.dtype must be float32 on run.device cpu",
    ),
    "local teacher nowhere": (
        {"teacher.kind": "local"},
        "config: teacher.path must be text of length >= 1, got no",
    ),
    "local teacher without a name": (
        LOCAL | {"teacher.path": ""},
        "config: teacher.path must be text of length >= 1",
    ),
    "endpoint teacher nowhere": (
        {"teacher.kind": "endpoint"},
        "config: teacher.url must be text matching ^https",
    ),
    "endpoint teacher without a model": (
        {"teacher.kind": "endpoint", "teacher.url": "http://h"},
        "config: teacher.model must be text of length >= 1, got nothing; set teacher.model",
    ),
    "no kind of teacher": (
        {"teacher.kind": "oracle"},
        "config: teacher.kind must be one of rule, local, endpoint, retry, got 'oracle'",
    ),
    "a setting of another kind": (
        {"teacher.url": "http://h"},
        "config: teacher.kind must be endpoint for teacher.url, got rule; set teacher.kind or "
        "leave teacher.url out",
    ),
    "a setting of two other kinds": (
        {"teacher.temperature": 0.5},
        "config: teacher.kind must be local or endpoint for teacher.temperature, got rule; set",
    ),
    "a teacher's typing error": (
        {"teacher.kind": "retry", "teacher.retry_txt": "again"},
        "config: unknown key teacher.retry_txt; did you mean teacher.retry_text?",
    ),
    "no grader": (
        {"data.grader": "regex"},
        "config: data.grader must be one of sciknoweval, mcq, exact, math, module:function, got "
        "'regex'",
    ),
    "no estimator": (
        {"advantage.estimator": "gae"},
        "config: advantage.estimator must be one of reinforce_plus_plus_baseline, "
        "reinforce_plus_plus, grpo, dr_grpo,",
    ),
    "the built-in tutor on other data": (
        {"data.train": "x.parquet"},
        "config: teacher.rule must be your own",
    ),
    "constant decay alone": (
        {"reward.schedule": "constant"},
        "config: reward.factor must be a number >= 0 and <= 1,",
    ),
    "a factor without use": (
        {"reward.factor": 0.5},
        "config: reward.schedule must be constant for reward.factor, got",
    ),
    "a word for a size": (
        {"engine.kv_cache_gib": "all"},
        "config: engine.kv_cache_gib must be a number > 0 and <= 4096 or auto, got 'all'",
    ),
    "a size of nothing": (
        {"engine.kv_cache_gib": 0},
        "config: engine.kv_cache_gib must be a number > 0 and <= 4096 or auto, got 0",
    ),
    "a teacher's cache of any size": (
        LOCAL | {"teacher.kv_cache_gib": "auto"},
        "config: teacher.kv_cache_gib must be a number > 0 and <= 4096, got 'auto'",
    ),
    "a teacher in halves": (
        LOCAL | {"teacher.dtype": "float16"},
        "config: teacher.dtype must be one of auto, float32, bfloat16, got 'float16'",
    ),
    "a rate that falls from where the run ends": (
        {"train.lr_schedule": "linear", "run.num_batches": 2},
        "config: train.warmup_updates must be below the run's 8 updates for train.lr_schedule "
        "linear, got 10; lower "
        "train.warmup_updates or raise run.num_batches",
    ),
    "an end for a rate that does not fall": (
        {"train.min_lr_ratio": 0.1},
        "config: train.min_lr_ratio must be 0 for train.lr_schedule constant, got 0.1; leave "
        "train.min_lr_ratio out",
    ),
    "pages of three": (
        {"engine.page_size": 3},
        "config: engine.page_size must be a power of two, got 3",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case: str) -> None:
    overrides, message = REFUSED[case]
    with pytest.raises(ValueError, match="^config: ") as refused:
        load_config(None, overrides)
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("teacher.api_key_env", "sk-abc123"),
        ("teacher.url", "https://user:hunter2@host/v1"),
        ("teacher.url", "https://host/v1?key=hunter2"),
        ("teacher.url", "https://host/v1#hunter2"),
    ],
)
def test_a_pasted_secret_is_refused_and_not_shown(name: str, secret: str) -> None:
    with pytest.raises(ValueError, match=name) as refused:
        load_config(None, {name: secret})
    assert secret not in str(refused.value)


def test_text_is_parsed_to_the_type_of_the_field() -> None:
    config = load_config(
        None,
        {
            "train.lr": "3e-4",
            "run.live": "false",
            "loss.dual_clip": "none",
            "reward.schedule": "none",
        },
    )
    assert (config.train.lr, config.run.live, config.loss.dual_clip) == (3e-4, False, None)
    assert config.reward.schedule == "none"


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("0.25", 0.25), ("3", 3.0)])
def test_a_kv_cache_is_a_number_or_auto(text: str, value: float | str, tmp_path: Path) -> None:
    """This holds on the command line and in TOML, which is written as it was read."""
    config = load_config(None, {"engine.kv_cache_gib": text})
    assert config.engine.kv_cache_gib == value
    assert isinstance(config.engine.kv_cache_gib, type(value))
    path = tmp_path / "config.toml"
    path.write_text(config_text(config), encoding="utf-8")
    assert f"kv_cache_gib = {json.dumps(value)}\n" in path.read_text(encoding="utf-8")
    assert load_config(path) == config
    assert load_config().engine.kv_cache_gib == "auto"


def test_overrides_apply_before_cross_field_checks(tmp_path: Path) -> None:
    """A file may be incomplete if the command line adds what it lacks."""
    path = tmp_path / "local.toml"
    path.write_text('[teacher]\nkind = "local"\n', encoding="utf-8")
    assert load_config(path, {"teacher.path": "models/x"}).teacher.path == "models/x"


def test_sections_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config().train.lr = 1.0  # type: ignore[misc]


def test_group_of_one_warns() -> None:
    with pytest.warns(UserWarning, match="group_size 1"):
        load_config(None, {"rollout.group_size": 1})


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text("[train\n", encoding="utf-8")
    for path, message in (
        (broken, "must be TOML"),
        (tmp_path / "none.toml", "must be a readable file"),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            load_config(path)
        assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem
)
def test_shipped_configs_load_and_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    written = tmp_path / "config.toml"
    written.write_text(config_text(config), encoding="utf-8")
    assert load_config(written) == config


@settings(max_examples=50, deadline=None)
@given(
    text=st.text(st.characters(codec="utf-8"), min_size=1),
    number=st.floats(min_value=1e-300, max_value=1.0),
)
def test_round_trip_of_any_text_and_number(
    tmp_path_factory: pytest.TempPathFactory, text: str, number: float
) -> None:
    overrides = {
        "student.path": f"models/{text}",
        "teacher.system_prompt": text,
        "train.lr": number,
    }
    config = load_config(None, LOCAL | overrides)
    path = tmp_path_factory.mktemp("config") / "config.toml"
    path.write_bytes(config_text(config).encode())
    assert load_config(path) == config


def test_fields_are_described_and_defaults_are_valid() -> None:
    for name, field in fields_of(Config).items():
        assert describe(Config, name), name
        assert rule_of(Config, name), name
        if not owners_of(Config, name):
            # The built-in student has a default of its own for the length of attempts.
            others = {"student.path": "m"} if name.startswith("rollout.") else {}
            explicit = load_config(None, {**others, name: field.default})
            assert explicit == load_config(None, others), name


def test_fields_of_a_request_are_a_table(tmp_path: Path) -> None:
    """They are JSON on the command line and a table in TOML, which is written as it was read."""
    fields = {
        "stop": ["a", "\U0001f600"],
        "\U0001f600": {"deep": [{"c": [1, True]}, []], "": 0},
        "n": 1.5,
    }
    fields |= {"chat_template_kwargs": {"enable_thinking": False}, "temperature": "none"}
    endpoint = {"teacher.kind": "endpoint", "teacher.url": "http://h", "teacher.model": "m"}
    config = load_config(None, endpoint | {"teacher.extra_body": json.dumps(fields)})
    assert config.teacher.model_dump()["extra_body"] == fields
    path = tmp_path / "config.toml"
    path.write_text(config_text(config), encoding="utf-8")
    assert load_config(path) == config
    for text in ("{", "max_tokens=1", "[1]"):
        with pytest.raises(ValueError, match="config: teacher.extra_body must be a table, got"):
            load_config(None, endpoint | {"teacher.extra_body": text})


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(b"\xef\xbb\xbf[run]\r\nseed = 3\r\n")
    assert load_config(path).run.seed == 3
