"""Checks that the engine reads the trainer's parameters in place, so an update copies nothing.

Captured CUDA graphs hold memory addresses. So neither weights nor buffers of the engine may move.
"""

from __future__ import annotations

import copy

import pytest
import torch

from socpo_fast.engine import Engine
from socpo_fast.model import Decoder, packed_forward
from socpo_fast.ops import visible_until_of_sequences
from socpo_fast.training.optimizer import Optimizer
from socpo_fast.training.step import policy_gradients
from socpo_fast.types import SamplingParams
from tests.helpers.made_rollouts import make_rollouts, make_student
from tests.helpers.tiny import bits, drain, generate_same, make_engine

PARAMS = SamplingParams(
    n=3, temperature=1.0, max_new_tokens=20, eos_ids=(), ignore_eos=True, seed=2
)
PROMPT = list(range(1, 12))


def storage_of(engine: Engine) -> dict[str, int]:
    """Returns the address of every tensor that a captured CUDA graph would read or write."""
    tensors = {**dict(engine.student.named_parameters()), **dict(engine.student.named_buffers())}
    tensors |= {
        name: value
        for name, value in vars(engine.runner).items()
        if isinstance(value, torch.Tensor)
    }
    if engine.steps.loop is not None:
        tensors |= {
            name: value
            for name, value in vars(engine.steps.loop).items()
            if isinstance(value, torch.Tensor)
        }
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


def trainer_logprobs(student: Decoder, token_ids: list[int], num_sampled: int) -> torch.Tensor:
    """Returns log-probs of the last num_sampled tokens, by the trainer's packed forward."""
    ids = torch.tensor(token_ids)
    until = visible_until_of_sequences([len(token_ids)])
    with torch.no_grad():
        hidden = packed_forward(student, ids, torch.arange(len(ids)), until)
        logprobs = student.lm_head(hidden).log_softmax(-1)
    return logprobs[:-1].gather(1, ids[1:, None])[-num_sampled:, 0]


@pytest.mark.parametrize("tokens_per_sync", [1, 4])
def test_updates_move_nothing_and_are_seen_at_once(tokens_per_sync: int) -> None:
    """After each update the engine draws what a fresh engine with a copy of the weights draws."""
    student = make_student()
    engine = make_engine(student, tokens_per_sync=tokens_per_sync)
    optimizer = Optimizer(student, lr=0.02, warmup_updates=0)
    groups = [list(map(bits, generate_same(engine, [PROMPT], PARAMS)[0]))]
    pointers = storage_of(engine)
    assert len(pointers) > 15
    for update_idx in range(3):
        engine.submit(PROMPT, PARAMS, key=(7, update_idx))  # running when the weights change
        for _ in range(3):
            engine.step()
        policy_gradients(student, make_rollouts(), token_budget=60, temperature=1.0)
        assert not optimizer.step().skipped
        engine.bump_policy_version()
        assert storage_of(engine) == pointers
        engine.release(drain(engine))

        group = generate_same(engine, [PROMPT], PARAMS)[0]
        fresh_group = generate_same(make_engine(copy.deepcopy(student)), [PROMPT], PARAMS)[0]
        assert list(map(bits, group)) == list(map(bits, fresh_group))
        for attempt in group:
            expected = trainer_logprobs(student, PROMPT + attempt.token_ids, attempt.num_tokens)
            torch.testing.assert_close(attempt.logprobs, expected, atol=1e-5, rtol=1e-5)
        groups.append(list(map(bits, group)))
    assert storage_of(engine) == pointers
    assert all(a != b for i, a in enumerate(groups) for b in groups[:i])
