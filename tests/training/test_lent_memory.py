"""Checks lend_memory: one tensor holds KV pages in rollouts and fp32 gradients in updates.

rollout   | KV pages of the engine                  |
update    | fp32 gradients of all parameters |        the same tensor, lent to the optimizer
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from socpo_fast.config import Config, load_config
from socpo_fast.engine import Engine
from socpo_fast.engine.runner import Runner
from socpo_fast.session import Session
from socpo_fast.trainer import Trainer
from socpo_fast.training.optimizer import Optimizer, gradient_bytes
from socpo_fast.training.step import policy_gradients
from socpo_fast.training.update import Updater
from socpo_fast.types import SamplingParams
from tests.engine.test_storage import storage_of
from tests.helpers.error_rule import assert_bitwise_equal
from tests.helpers.made_rollouts import make_rollouts, make_student
from tests.helpers.tiny import bits, drain, make_engine
from tests.training.test_accumulate import MODELS

PARAMS = SamplingParams(n=3, temperature=1.0, max_new_tokens=9, eos_ids=(), ignore_eos=True, seed=2)
PROMPTS = [list(range(1, 12)), [5, 3, 2]]
KEYS = [(0, 0), (0, 1)]
SMALL: dict[str, Any] = {
    "run.num_batches": 2,
    "rollout.questions_per_batch": 2,
    "rollout.group_size": 2,
    "rollout.max_new_tokens": 16,
    "train.questions_per_update": 1,
    "data.builtin_train_questions": 4,
    "data.eval": "none",
    "engine.kv_cache_gib": 0.01,
}


def draws(engine: Engine) -> list[tuple]:
    """Returns first and second attempts of all prompts, to be compared bitwise."""
    groups = engine.generate(PROMPTS, PARAMS, keys=KEYS, keep=True)
    for group in groups:
        engine.resume(group[0], [8, 9], PARAMS, kept_tokens=4)
    attempts = [*groups[0], *groups[1], *drain(engine)]
    engine.release(attempts)
    return [bits(attempt) for attempt in attempts]


def holds(memory: Tensor, part: Tensor) -> bool:
    """Whether part lies in memory, aligned to the 256 bytes that kernels read fastest."""
    start = part.data_ptr() - memory.data_ptr()
    return 0 <= start <= memory.nbytes - part.nbytes and start % 256 == 0


@pytest.mark.parametrize(
    "options", [{}, {"tokens_per_sync": 4}, {"cascade": False}, {"attention": "ref"}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_data_in_lent_memory_is_never_read(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """NaN left in the pages reaches no result.

    Neither the unused slots of a partly filled page nor pages behind a shorter sequence are read.
    """
    student = make_student(dtype=dtype)
    engine = make_engine(student, **options)
    pointers = storage_of(engine)
    for _ in range(2):
        with engine.lend_memory() as memory:
            memory.fill_(0xFF)  # NaN in fp32 and bf16
        assert engine.runner.k_cache_LPSKE.isnan().all()
        assert draws(engine) == draws(make_engine(student, **options))
    assert storage_of(engine) == pointers


def test_triton_never_reads_data_in_lent_memory() -> None:
    engines = [make_engine(make_student(), num_pages=60, attention="triton") for _ in range(2)]
    with engines[0].lend_memory() as memory:
        memory.fill_(0xFF)
    assert draws(engines[0]) == draws(engines[1])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_stay_in_the_lent_memory(dtype: torch.dtype, model: str) -> None:
    """Every gradient keeps its address in the lent memory, and updates are bitwise the usual ones.

    This includes those that autograd adds: of norms, of biases and of the LM head, tied or not.
    """
    student, plain_student = (make_student(dtype=dtype, **MODELS[model]) for _ in range(2))
    optimizers = [Optimizer(x, lr=1e-2, warmup_updates=0) for x in (student, plain_student)]
    memory = torch.full((sum(gradient_bytes(student.parameters())),), 0xFF, dtype=torch.uint8)
    with optimizers[0].gradients_in(memory):
        pointers = {name: param.grad.data_ptr() for name, param in student.named_parameters()}
        for _ in range(2):
            for decoder in (student, plain_student):
                policy_gradients(decoder, make_rollouts(), token_budget=60, temperature=1.0)
            for (name, param), plain in zip(
                student.named_parameters(), plain_student.parameters(), strict=True
            ):
                assert param.grad.data_ptr() == pointers[name] and holds(memory, param.grad), name
                assert_bitwise_equal(param.grad, plain.grad, name=name)
            assert not any(optimizer.step().skipped for optimizer in optimizers)
    assert all(param.grad is None for param in student.parameters())
    for param, plain in zip(student.parameters(), plain_student.parameters(), strict=True):
        assert torch.equal(param, plain)


def test_a_skipped_update_clears_its_gradients() -> None:
    """After a skipped update the gradients in the lent memory are 0, not NaN."""
    student = make_student()
    optimizer = Optimizer(student, lr=1e-2)
    memory = torch.zeros(sum(gradient_bytes(student.parameters())) + 8, dtype=torch.uint8)
    with optimizer.gradients_in(memory):
        for param in student.parameters():
            param.grad.fill_(torch.nan)
        assert optimizer.step().skipped
        assert not any(param.grad.any() for param in student.parameters())


def test_replaced_gradients_return_to_lent_memory() -> None:
    """If zero_grad or other code replaces a .grad, the next update starts from zeros in memory."""
    student = make_student()
    optimizer = Optimizer(student, lr=1e-2)
    memory = torch.zeros(sum(gradient_bytes(student.parameters())), dtype=torch.uint8)
    with optimizer.gradients_in(memory):
        student.zero_grad()
        policy_gradients(student, make_rollouts(), token_budget=60, temperature=1.0)
        student.norm.weight.grad = student.norm.weight.grad * 0.5
        optimizer.step()
        for param in student.parameters():
            assert holds(memory, param.grad) and not param.grad.any()


def test_a_parameter_frozen_later_keeps_its_memory() -> None:
    student = make_student()
    optimizer = Optimizer(student, lr=1e-2)
    memory = torch.zeros(sum(gradient_bytes(student.parameters())), dtype=torch.uint8)
    student.layers[0].requires_grad_(False)
    with optimizer.gradients_in(memory):
        assert all(holds(memory, param.grad) for param in student.parameters())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_an_update_that_ends_early_leaves_no_gradient(error: BaseException) -> None:
    """After an update that failed, no .grad points into memory that rollouts write KV to."""
    student = make_student()
    engine = make_engine(student, min_memory_bytes=sum(gradient_bytes(student.parameters())))
    optimizer = Optimizer(student, lr=1e-2)
    expected = draws(engine)

    def update() -> None:
        with engine.lend_memory() as memory, optimizer.gradients_in(memory):
            policy_gradients(student, make_rollouts(), token_budget=60, temperature=1.0)
            raise error

    with pytest.raises(type(error)):
        update()
    assert all(param.grad is None for param in student.parameters())
    assert draws(engine) == expected


def test_memory_fits_both_pages_and_gradients() -> None:
    """The tensor is as large as the larger of KV pages and gradients."""
    student = make_student()
    needed = sum(gradient_bytes(student.parameters()))
    assert needed >= 4 * sum(param.numel() for param in student.parameters())
    for num_pages in (1, 2000):
        engine = make_engine(student, num_pages=num_pages, min_memory_bytes=needed)
        kv_bytes = num_pages * Runner.page_bytes(student, page_size=4)
        with engine.lend_memory() as memory:
            assert memory.nbytes == max(kv_bytes, needed)
        assert engine.stats.pages_total == num_pages


def test_lending_is_refused_while_pages_are_held() -> None:
    engine = make_engine(make_student())
    engine.submit(PROMPTS[0], PARAMS, key=(0, 0))
    while not (finished := engine.step()):
        pass
    refused = "lend_memory: sequences in the engine must be none, got 3; release or reset them"
    refuses_to_lend(engine, refused)
    engine.release(finished)
    engine.submit(PROMPTS[0], PARAMS, key=(0, 0))
    refuses_to_lend(engine, refused.replace("got 3", "got 1"))
    engine.reset()
    with engine.lend_memory():
        lent = "submit: memory of the engine must be at hand, got 'lent'; leave lend_memory first"
        with pytest.raises(ValueError, match=exactly(lent)):
            engine.submit(PROMPTS[0], PARAMS, key=(0, 0))
    assert draws(engine) == draws(make_engine(make_student()))


def refuses_to_lend(engine: Engine, message: str) -> None:
    with pytest.raises(ValueError, match=exactly(message)), engine.lend_memory():
        pass


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


@pytest.mark.parametrize("memory", [torch.zeros(9, dtype=torch.uint8), torch.zeros(10**6)])
def test_memory_that_cannot_hold_gradients(memory: Tensor) -> None:
    student = make_student()
    needed = sum(gradient_bytes(student.parameters()))
    optimizer = Optimizer(student, lr=1e-2)
    got = [memory.dtype, memory.numel()]
    message = f"Optimizer: memory of gradients must be [torch.uint8, >= {needed}], got {got}"
    with pytest.raises(ValueError, match=exactly(message)), optimizer.gradients_in(memory):
        pass


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(None, SMALL | {"run.dir": str(tmp_path)})


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Returns a list that receives, for each update, whether all gradients lie in lent memory."""
    is_in_memory: list[bool] = []
    engines: list[Engine] = []
    original_session = Session.__init__
    original_step = Optimizer.step

    def note_engine(self: Session, *args: Any, **options: Any) -> None:
        original_session(self, *args, **options)
        engines.append(self.engine)

    def note_gradients(self: Optimizer, *args: Any, **options: Any) -> Any:
        memory = engines[-1].runner.memory
        is_in_memory.append(all(holds(memory, param.grad) for param in self.params.values()))
        return original_step(self, *args, **options)

    monkeypatch.setattr(Session, "__init__", note_engine)
    monkeypatch.setattr(Optimizer, "step", note_gradients)
    return is_in_memory


def test_a_run_lends_its_memory(config: Config, updates: list[bool]) -> None:
    trainer = Trainer(config)
    trainer.run()
    assert updates == [True] * 4
    assert all(param.grad is None for param in trainer.student.parameters())
    with trainer.engine.lend_memory():
        pass


def test_a_failed_update_gives_the_memory_back(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failed update, rollouts are those of a session that never lent its memory."""
    trainer = Trainer(config)

    def fail(self: Updater, *args: Any) -> None:
        policy_gradients(self.student, args[0], token_budget=4096, temperature=1.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(Updater, "one_update", fail)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert all(param.grad is None for param in trainer.student.parameters())
    questions = trainer.train_questions[:2]
    fresh_session = Session(config)
    actual, expected = (
        sorted(
            (rollout.question_idx, rollout.rollout_idx, turn.text)
            for rollout in session.training_rollouts(questions, 7)
            for turn in rollout.turns
        )
        for session in (trainer.session, fresh_session)
    )
    assert actual == expected
    for session in (trainer.session, fresh_session):
        session.close()
