"""Runs the programs of examples/ as a user would, with small arguments, and docs/embedding.md."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import functools
import json
import re
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from socpo_fast import (
    AsyncEngine,
    Engine,
    Rollout,
    RolloutOptions,
    SamplingParams,
    arollouts,
    load_student,
    pad_rollouts,
    socratic_advantages,
    socratic_episode,
)
from socpo_fast.model.hf_views import hf_views
from socpo_fast.socratic.bridge import Bridge
from socpo_fast.socratic.graders import as_grader, grade_exact
from socpo_fast.socratic.tasks.molar_mass import STUDENT_DIR, questions, tutor
from socpo_fast.socratic.teachers import as_teacher
from tests.helpers.faulty_server import reply, running_server
from tests.helpers.peer_algorithms import verl_algorithms

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
DOC = (ROOT / "docs" / "embedding.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)
GUIDANCE = "There is a mistake in the line of Na. Recheck its atomic mass."
OPTIONS = RolloutOptions(group_size=2, guidance_limit=64)


def main_of(name: str) -> Callable:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_has_under_60_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60


def test_doc_names_every_example() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} <= set(re.findall(r"`(\w+\.py)`", DOC))


def test_own_loop_op(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The op has the textbook's gradients as it is, traced by dynamo, and under FSDP2."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rendezvous = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in rendezvous.items():
        monkeypatch.setenv(name, str(value))
    torch._dynamo.reset()
    main_of("own_loop_op")(backend="eager")
    names = re.findall(r"rank 0: (\w+) has the textbook's gradients", capsys.readouterr().out)
    assert names == ["plain", "compiled", "FSDP2"]


@pytest.mark.slow
def test_own_loop_op_on_two_ranks() -> None:
    """The same, with Inductor's code, and weights and rows that are spread over two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    finished = subprocess.run(
        [*command, str(EXAMPLES / "own_loop_op.py")], capture_output=True, text=True, timeout=600
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("has the textbook's gradients") == 6


def test_own_trainer(capsys: pytest.CaptureFixture) -> None:
    """The loop trains the module that it was given: every weight has moved a little."""
    model = main_of("own_trainer")(num_batches=2, questions_per_batch=4, group_size=4)
    printed = capsys.readouterr().out
    assert len(re.findall(r"batch \d: \d+% right alone, \d+% with guidance", printed)) == 2
    params = dict(model.named_parameters())
    for name, before in hf_views(load_student(STUDENT_DIR)):
        moved = (params[name] - before).abs().max()
        assert 0 < moved < 1e-3, name


def test_rollouts_dataset(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    main_of("rollouts_dataset")(str(tmp_path))
    printed = capsys.readouterr().out
    assert re.search(r"Student: <reasoning>.*Teacher: There is a mistake", printed, re.DOTALL)
    assert re.search(r"\[16, \d+\] token ids, \d+ of them sampled", printed)
    assert (tmp_path / "rollouts.parquet").exists()


def test_your_grader(capsys: pytest.CaptureFixture) -> None:
    """All three kinds of verdicts reward the same attempts; correct_at lets more of them pass."""
    main_of("your_grader")()
    rows = re.findall(r"(\w+): (\d) correct, rewards (.*), parts (.*)", capsys.readouterr().out)
    num_correct = {name: int(number) for name, number, *_ in rows}
    assert list(num_correct) == ["bool", "float", "near", "parts"]
    assert num_correct["bool"] == num_correct["float"] == num_correct["parts"] < num_correct["near"]
    assert rows[-1][-1] == "{'answer': 0.9, 'format': 0.1}"


def test_your_teacher_is_a_function(capsys: pytest.CaptureFixture) -> None:
    main_of("your_teacher")()
    assert re.search(r"wrong\n  There is a mistake in the line of \w+\.", capsys.readouterr().out)


def test_your_teacher_asks_a_server(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", "sk-1")
    with running_server() as server:
        server.script = [reply(GUIDANCE)]
        main_of("your_teacher")(server.url, "a-model")
    assert capsys.readouterr().out.count(GUIDANCE) == len(server.seen) > 0
    for call in server.seen:
        assert call["path"] == "/v1/chat/completions"
        assert call["headers"]["Authorization"] == "Bearer sk-1"
        assert call["body"]["model"] == "a-model"
        assert "What is the molar mass of" in call["body"]["messages"][0]["content"]


def test_notebook_runs_in_an_event_loop(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cell by cell, as Jupyter runs it, on fewer batches and questions."""
    monkeypatch.chdir(tmp_path)
    cells = json.loads((EXAMPLES / "first_run.ipynb").read_text(encoding="utf-8"))["cells"]
    smaller = {"num_batches=20": "num_batches=2", "questions_per_batch=16": "questions_per_batch=8"}
    smaller |= {"n=40,": "n=8,"}
    names: dict[str, Any] = {"__name__": "__main__"}

    async def run_cells() -> None:
        for cell in cells:
            source = "".join(cell["source"])
            for full, small in smaller.items():
                source = source.replace(full, small)
            if cell["cell_type"] == "code":
                flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
                if awaited := eval(compile(source, "first_run.ipynb", "exec", flags=flags), names):
                    await awaited

    asyncio.run(run_cells())
    run = names["run"]
    assert [row["kind"] for row in run.metrics].count("batch") == 2
    assert (len(names["rows"]), len(names["held_out"])) == (400, 8)
    assert len(names["curves"]["unassisted, eval"]) == 2
    assert re.search(
        r"Student: .*\n\nTeacher: .*Recheck its atomic mass", *(capsys.readouterr().out, re.DOTALL)
    )
    assert "<pre" in run._repr_html_()
    assert not any(cell.get("outputs") for cell in cells)


def run_block(idx: int, **names: Any) -> dict[str, Any]:
    """Runs a block of docs/embedding.md, which may await, and returns its names."""
    code = compile(BLOCKS[idx], "embedding.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if awaited := eval(code, names):
        asyncio.run(awaited)
    return names


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(load_student(STUDENT_DIR), kv_cache_gib=0.05)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(STUDENT_DIR)


@pytest.fixture
def params(tokenizer: Any) -> SamplingParams:
    return SamplingParams(temperature=1.0, max_new_tokens=128, eos_ids=(tokenizer.eos_token_id,))


def test_doc_grades_and_guides() -> None:
    question = questions(0, 1)[0]
    ran = run_block(
        0,
        as_grader=as_grader,
        as_teacher=as_teacher,
        my_grader=grade_exact,
        my_teacher=lambda request: GUIDANCE,
        text=question.reference_solution,
        question=question,
        request=None,
    )
    assert ran["grade"].is_correct
    assert ran["guidance"].text == GUIDANCE


class Loop:
    """Stands for verl's agent loop; the server's generate has verl's arguments and result."""

    def __init__(self, engine: Engine, eos_ids: tuple[int, ...]):
        self.engine = engine
        self.eos_ids = eos_ids

    async def play(self, run: Callable) -> Rollout:
        async with AsyncEngine(self.engine) as server:

            async def generate(
                *, request_id: str, prompt_ids: list[int], sampling_params: dict[str, Any]
            ) -> SimpleNamespace:
                params = SamplingParams(
                    temperature=sampling_params["temperature"],
                    max_new_tokens=sampling_params["max_tokens"],
                    eos_ids=self.eos_ids,
                )
                attempt = await server.generate(request_id, prompt_ids, params)
                return SimpleNamespace(token_ids=attempt.token_ids)

            verls = SimpleNamespace(server_manager=SimpleNamespace(generate=generate))
            return await run(verls, {"temperature": 1.0}, questions(0, 3)[2])


def test_doc_agent_loop_plays_an_episode(engine: Engine, tokenizer: Any) -> None:
    """The loop of verl's section plays two attempts; the second one goes on with kept pages."""
    bridge = Bridge(tokenizer, guidance_limit=OPTIONS.guidance_limit)
    ran = run_block(
        1,
        asyncio=asyncio,
        functools=functools,
        uuid4=uuid4,
        socratic_episode=socratic_episode,
        max_new_tokens=128,
        episode_settings={
            "teacher": tutor,
            "grader": lambda text, question: False,
            "bridge": bridge,
            "options": OPTIONS,
            "max_new_tokens": 128,
            "max_tokens": 512,
        },
    )
    prefilled = engine.stats.prefill_tokens
    rollout = asyncio.run(Loop(engine, bridge.eos_ids).play(ran["run"]))
    assert rollout.end_reason == "max_attempts" and len(rollout.turns) == 2
    row = pad_rollouts([rollout], rows="rollout", pad_id=0)
    new = engine.stats.prefill_tokens - prefilled
    assert new < row.ids_BL.shape[1] - rollout.turns[1].attempt.num_tokens


def test_doc_estimator_finds_attempts() -> None:
    """verl's registry takes the estimator; two attempts of a row have their own advantages."""
    verl = verl_algorithms()
    names = {"torch": torch, "np": np, "socratic_advantages": socratic_advantages}
    run_block(2, register_adv_est=verl.register_adv_est, **names)
    mask_BT = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 0, 0]])
    rewards_BT = torch.tensor([[0.0, 0, 0, 0, 1], [0, 0, 1, 0, 0]])
    index = np.array(["a", "a"], dtype=object)
    advantages_BT, _ = verl.get_adv_estimator_fn("socratic_po")(rewards_BT, mask_BT, index)
    wrong, rescued, alone = advantages_BT[0, 0], advantages_BT[0, 4], advantages_BT[1, 0]
    assert wrong < rescued < alone


def test_doc_async_calls(
    engine: Engine, tokenizer: Any, params: SamplingParams, capsys: pytest.CaptureFixture
) -> None:
    question = questions(0, 1)[0]
    settings = {"teacher": tutor, "grader": grade_exact, "params": params, "options": OPTIONS}
    prompt_ids = Bridge(tokenizer, guidance_limit=64).prompt_ids(question.messages)
    ran = run_block(
        3,
        AsyncEngine=AsyncEngine,
        arollouts=arollouts,
        contextlib=contextlib,
        engine=engine,
        tokenizer=tokenizer,
        questions=[question],
        settings=settings,
        params=params,
        prompt_ids=prompt_ids,
        more_ids=tokenizer(GUIDANCE)["input_ids"],
    )
    assert capsys.readouterr().out.count("0 ") == OPTIONS.group_size
    assert ran["second"].attempt_idx == 1
    assert not engine.has_work
