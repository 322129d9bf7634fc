"""What a session makes, in which order. The engine comes last: it takes the memory that is left."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from socpo_fast import session as session_module
from socpo_fast.config import load_config
from socpo_fast.model import Decoder
from socpo_fast.session import Session
from socpo_fast.trainer import Trainer
from socpo_fast.types import Question

CONFIG = Path(__file__).parent.parent / "configs" / "molar_mass.toml"
SETTINGS = {"engine.kv_cache_gib": "auto", "data.eval": "none", "data.builtin_train_questions": 16}


@pytest.fixture
def created(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Records (function name, result) of each call that allocates memory, in order."""
    calls: list[tuple[str, Any]] = []
    for name in ("load_student", "make_teacher", "Engine"):
        make = getattr(session_module, name)

        def record(*args: Any, name: str = name, make: Any = make, **kwargs: Any) -> Any:
            calls.append((name, make(*args, **kwargs)))
            return calls[-1][1]

        monkeypatch.setattr(session_module, name, record)
    return calls


def is_trained(model: Decoder) -> bool:
    flags = {parameter.requires_grad for parameter in model.parameters()}
    assert len(flags) == 1
    return flags.pop()


def test_the_engine_is_made_last(created: list[tuple[str, Any]], tmp_path: Path) -> None:
    settings = {**SETTINGS, "loss.kl_coef": 0.1, "run.dir": str(tmp_path)}
    trainer = Trainer(load_config(CONFIG, settings))
    names = [name for name, _ in created]
    assert names == ["load_student", "make_teacher", "load_student", "Engine"]
    (_, student), _, (_, reference), (_, engine) = created
    assert (trainer.student, trainer.updater.reference) == (student, reference)
    assert trainer.engine is engine
    assert is_trained(student) and not is_trained(reference)
    assert engine.kv_cache.note == "KV cache 1 GiB (auto)"


def test_models_of_an_evaluation_are_frozen(created: list[tuple[str, Any]]) -> None:
    """An evaluation needs neither gradients nor the reference, even if the loss has a KL term."""
    session = Session(load_config(CONFIG, SETTINGS | {"loss.kl_coef": 0.1}))
    assert [name for name, _ in created] == ["load_student", "make_teacher", "Engine"]
    assert session.reference is None and not is_trained(session.student)


def test_no_reference_without_a_kl_term() -> None:
    session = Session(load_config(CONFIG, SETTINGS), for_training=True)
    assert session.reference is None and is_trained(session.student)


@pytest.mark.parametrize("split", ["train", "eval"])
def test_builtin_questions_need_a_fitting_grader(split: str) -> None:
    """With a grader of letters no answer could be right, and the headline would say 0 %."""
    session = Session(
        load_config(CONFIG, SETTINGS | {"data.eval": "builtin", "data.grader": "mcq"})
    )
    with pytest.raises(
        ValueError, match=f"data.{split} builtin: ground_truth must be one of A, B, .* grader mcq"
    ):
        getattr(session, f"{split}_questions")()


def test_closing_waits_for_no_hung_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang() -> None:
        await asyncio.sleep(60)

    session = Session(load_config(CONFIG, SETTINGS))
    monkeypatch.setattr(session.teacher, "aclose", hang)
    monkeypatch.setattr(session_module, "CLOSE_S", 0.1)
    started = time.perf_counter()
    session.close()
    assert time.perf_counter() - started < 5


def test_shape_caches_are_bounded_by_a_session() -> None:
    """The sizes are read once, at the first product, so a Session must set them before."""
    program = """
import os, sys
os.environ["LRU_CACHE_CAPACITY"] = "64"  # the user's own stays
from socpo_fast.config import load_config
from socpo_fast.session import Session
Session(load_config(sys.argv[1]))
print(os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"], os.environ["LRU_CACHE_CAPACITY"])
"""
    result = subprocess.run(
        [sys.executable, "-c", program, str(CONFIG)], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "128 64"


async def says_yes(text: str, question: Question) -> bool:
    await asyncio.sleep(0)
    return True


def test_a_named_grader_may_be_async() -> None:
    session = Session(load_config(CONFIG, SETTINGS | {"data.grader": f"{__name__}:says_yes"}))
    [rollout] = [*session.training_rollouts(session.train_questions()[:1], 0)][:1]
    assert rollout.turns[0].is_correct and len(rollout.turns) == 1
