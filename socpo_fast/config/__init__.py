"""Holds the configuration: typed, frozen sections, read from TOML and `section.key` overrides.

Read Config, then load_config and the rules between sections: find_conflicts refuses,
find_suspicious warns. sections.py defines the sections, data.py and teachers.py two larger ones.
text.py converts values from and to text and words the errors. torch is not imported here, so that a
mistyped setting is refused before the slow import.
"""

import tomllib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ValidationError, model_validator

from socpo_fast.config.data import DataConfig
from socpo_fast.config.sections import (
    REWARDS,
    AdvantageConfig,
    AnyReward,
    EngineConfig,
    EvalConfig,
    GraderConfig,
    LossConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    Section,
    StudentConfig,
    TrainConfig,
)
from socpo_fast.config.teachers import (
    AnyTeacher,
    EndpointTeacherConfig,
    LocalTeacherConfig,
    RetryTeacherConfig,
    RuleTeacherConfig,
    TeacherConfig,
)
from socpo_fast.config.text import choose_kinds, did_you_mean, expand_home, explain, from_text
from socpo_fast.registries import LR_SCHEDULES

__all__ = [
    "DEMO",
    "AdvantageConfig",
    "Config",
    "DataConfig",
    "EndpointTeacherConfig",
    "EngineConfig",
    "EvalConfig",
    "GraderConfig",
    "LocalTeacherConfig",
    "LossConfig",
    "RetryTeacherConfig",
    "RewardConfig",
    "RolloutConfig",
    "RuleTeacherConfig",
    "RunConfig",
    "StudentConfig",
    "TeacherConfig",
    "TrainConfig",
    "load_config",
    "read_toml",
]

BUILTIN_NEW_TOKENS = 128  # the built-in student has 512 positions in all
# The settings of `socpo demo`: the built-in task, about a minute on two cores.
DEMO = Path(__file__).parent.parent / "configs" / "molar_mass.toml"


class Config(Section):
    """All settings of a run. The sections stand in the order in which a batch meets them."""

    run: RunConfig = RunConfig()
    student: StudentConfig = StudentConfig()
    data: DataConfig = DataConfig()
    grader: GraderConfig = GraderConfig()
    rollout: RolloutConfig = RolloutConfig()
    teacher: AnyTeacher = RuleTeacherConfig()
    reward: AnyReward = REWARDS[0]()
    advantage: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    engine: EngineConfig = EngineConfig()
    eval: EvalConfig = EvalConfig()

    @property
    def folder(self) -> Path:
        """Returns the run folder, run.dir/run.name."""
        return Path(self.run.dir) / self.run.name

    def settled(
        self,
        *,
        token_budget: int = 8192,
        checkpointing: bool = False,
        kv_cache_gib: float | Literal["auto"] = "auto",
    ) -> Self:
        """Returns the config with "auto" replaced by these values; other values stay.

        The defaults are those of a CPU. kv_cache_gib="auto" leaves the decision to the engine.
        """
        return self.model_copy(
            update={
                "train": _without_auto(
                    self.train, token_budget=token_budget, checkpointing=checkpointing
                ),
                "engine": _without_auto(self.engine, kv_cache_gib=kv_cache_gib),
            }
        )

    @property
    def num_updates(self) -> int:
        """Returns the number of optimizer steps of the whole run."""
        return (
            self.run.num_batches
            * self.train.epochs
            * (self.rollout.questions_per_batch // self.train.questions_per_update)
        )

    @model_validator(mode="before")
    @classmethod
    def _shorten_attempts_of_builtin(cls, tables: Any) -> Any:
        """Makes rollout.max_new_tokens default to what suits the built-in student."""
        if not isinstance(tables, dict):
            return tables
        student, rollout = tables.get("student", {}), tables.get("rollout", {})
        are_tables = isinstance(student, dict) and isinstance(rollout, dict)
        if not are_tables or student.get("path", "builtin") != "builtin":
            return tables
        return {**tables, "rollout": {"max_new_tokens": BUILTIN_NEW_TOKENS, **rollout}}

    @model_validator(mode="after")
    def _check_between_sections(self) -> Self:
        """Refuses conflicts between sections and warns of suspicious combinations."""
        if conflict := find_conflicts(self):
            raise ValueError(f"config: {conflict}")
        for suspicion in find_suspicious(self):
            warnings.warn(f"config: {suspicion}", stacklevel=2)
        return self


def _without_auto(section: Section, **values: object) -> Section:
    """Returns the section with `values` for those of its fields that are "auto"."""
    return section.model_copy(
        update={name: value for name, value in values.items() if getattr(section, name) == "auto"}
    )


def load_config(
    toml_path: str | Path | None = None, overrides: Mapping[str, object] | None = None
) -> Config:
    """Loads a TOML file, applies overrides, and returns the configuration; the rest is defaults.

    Args:
        toml_path: a file of `[section]` tables; None = defaults only.
        overrides: "section.key" -> value. Text is converted to the field's type, as on the command
                   line.

    Raises:
        ValueError: no such file, broken TOML, an unknown key, a value outside its range, or values
                    that contradict each other.
    """
    tables = {} if toml_path is None else read_toml(toml_path)
    # The config.toml in a run's folder also lists earlier settings of the run. They do not apply.
    tables.pop("history", None)
    choose_kinds(Config, tables, overrides or {})
    for name, value in (overrides or {}).items():
        section, _, key = name.rpartition(".")
        table = tables.setdefault(section, {}) if section else tables
        # A section that is not a table (`train = 3`) is refused below, by pydantic.
        if isinstance(table, dict):
            table[key] = from_text(Config, name, value) if isinstance(value, str) else value
    # `from None`: pydantic's own message repeats values that may be secret (see text.explain).
    try:
        return Config.model_validate(tables)
    except ValidationError as error:
        raise ValueError(explain(Config, error)) from None


def read_toml(toml_path: str | Path) -> dict[str, Any]:
    """Returns the tables of a TOML file, unchecked; a run's config.toml also has a history."""
    path = Path(expand_home(str(toml_path)))
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(
            f"config: {toml_path} must be a readable file: {error.strerror}{_near(path)}"
        ) from None
    except (ValueError, RecursionError) as error:  # broken TOML, not UTF-8, nested without end
        raise ValueError(f"config: {toml_path} must be TOML: {error}") from None


def _near(path: Path) -> str:
    """Returns which TOML file is in a folder, or has a name like that of a file that is missing."""
    folder = path if path.is_dir() else path.parent
    names = sorted(file.name for file in folder.glob("*.toml"))
    cutoff = 0.0 if folder == path else 0.6
    if near := did_you_mean(path.name, names, prefix=f"{folder}/", cutoff=cutoff):
        return near
    there = ", ".join(str(folder / name) for name in names[:3])
    return f"; there is {there}" if names else "; socpo init FOLDER writes one"


def find_conflicts(config: Config) -> str | None:
    """Returns the first broken rule between fields, as an error message; None if all hold."""
    data = config.data
    train = config.train
    rollout = config.rollout
    is_builtin_data = {data.train, data.eval} <= {"builtin", None}
    is_builtin_rule = (
        isinstance(config.teacher, RuleTeacherConfig) and config.teacher.rule == "builtin"
    )
    is_falling = LR_SCHEDULES[train.lr_schedule] is not None
    rules = [
        (
            rollout.questions_per_batch % train.questions_per_update == 0,
            "train.questions_per_update must divide rollout.questions_per_batch "
            f"{rollout.questions_per_batch}, "
            f"got {train.questions_per_update}",
        ),
        (
            config.run.device != "cpu" or config.student.dtype == "float32",
            f"student.dtype must be float32 on run.device cpu, got {config.student.dtype}; it is "
            "emulated there",
        ),
        (
            is_builtin_data or not is_builtin_rule or rollout.max_attempts == 1,
            f"teacher.rule must be your own module:function for data {(data.train, data.eval)}, "
            "got builtin; set it or teacher.kind",
        ),
        (
            data.train == "builtin" or data.eval != "builtin",
            f"data.eval must be your own questions or none for data.train {data.train}, got "
            "builtin",
        ),
        (
            config.engine.page_size.bit_count() == 1,
            f"engine.page_size must be a power of two, got {config.engine.page_size}",
        ),
        (
            not is_falling or train.warmup_updates < config.num_updates,
            f"train.warmup_updates must be below the run's {config.num_updates} updates "
            f"for train.lr_schedule {train.lr_schedule}, got {train.warmup_updates}; "
            "lower train.warmup_updates or raise run.num_batches",
        ),
        (
            is_falling or train.min_lr_ratio == 0,
            f"train.min_lr_ratio must be 0 for train.lr_schedule {train.lr_schedule}, got "
            f"{train.min_lr_ratio}; "
            "leave train.min_lr_ratio out",
        ),
    ]
    return next((rule for holds, rule in rules if not holds), None)


def find_suspicious(config: Config) -> list[str]:
    """Returns warnings about settings that are allowed but rarely intended."""
    estimator = config.advantage.estimator
    # With one rollout per question there is hardly anything in the group to compare with.
    # reinforce_plus_plus has no baseline: it compares attempts over the whole batch.
    if config.rollout.group_size > 1 or estimator == "reinforce_plus_plus":
        return []
    return [
        f"rollout.group_size 1 leaves {estimator} little to compare; raise it or use "
        "reinforce_plus_plus"
    ]
