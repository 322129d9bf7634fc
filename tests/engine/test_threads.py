"""Checks that samples, gradients and updates are thread-invariant: 1, 2 and 3 threads, bitwise."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from socpo_fast.engine import Engine
from socpo_fast.model import Decoder, load_student
from socpo_fast.ops._head import matmul_
from socpo_fast.socratic.tasks.molar_mass import STUDENT_DIR
from socpo_fast.training.optimizer import Optimizer
from socpo_fast.training.step import policy_gradients
from socpo_fast.types import Attempt, Rollout, SamplingParams
from tests.helpers.error_rule import assert_bitwise_equal
from tests.helpers.made_rollouts import make_student, turns_of
from tests.helpers.tiny import generate_same, kept

BRIDGE = [5, 6, 7, 8, 9]


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    """Restores the number of threads after each test."""
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def built_in_student() -> Decoder:
    return load_student(STUDENT_DIR)


def awkward_student() -> Decoder:
    """Returns a student whose widths are no multiples of a vector; three heads share a KV head."""
    heads = {"hidden_size": 72, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 24}
    return make_student(vocab_size=131, intermediate_size=126, **heads)


def sample_rollouts(student: Decoder) -> list[Rollout]:
    """Returns pairs of rollouts with two attempts each.

    A step prefills 373 prompt tokens, so that two threads split the work in the middle of a row.
    """
    rng = random.Random(0)
    engine = Engine(student, kv_cache_gib=0.05, page_size=16)
    params = SamplingParams(n=2, temperature=1.0, max_new_tokens=5, eos_ids=(3,))
    prompts = [[rng.randrange(4, 131) for _ in range(length)] for length in (67, 71, 73, 79, 83)]
    firsts = [
        attempt for group in generate_same(engine, prompts, params, keep=True) for attempt in group
    ]
    for attempt in firsts:
        engine.resume(
            attempt, BRIDGE, params, kept_tokens=kept(prompts[attempt.key.question], attempt)
        )
    seconds: dict[tuple[int, int], Attempt] = {}
    while engine.has_work:
        seconds |= {
            (attempt.key.question, attempt.rollout_idx): attempt for attempt in engine.step()
        }
    rollouts = []
    for first in firsts:
        prompt_ids = prompts[first.key.question]
        attempts = [first, seconds[first.key.question, first.rollout_idx]]
        turns = turns_of(prompt_ids, attempts, [BRIDGE])
        for turn in turns:
            turn.advantage = rng.uniform(-2, 2)
        indices = {"question_idx": first.key.question, "rollout_idx": first.rollout_idx}
        rollouts.append(Rollout(**indices, prompt_ids=prompt_ids, turns=turns))
    return rollouts


def run_update(student: Decoder, num_threads: int) -> dict[str, Tensor]:
    """Returns all results of a rollout and an update, by name.

    Tokens, log-probs, gradients and statistics of both packings, and the weights after an update.
    """
    torch.set_num_threads(num_threads)
    rollouts = sample_rollouts(student)
    results = {}
    attempts = [attempt for rollout in rollouts for attempt in rollout.attempts]
    results["token_ids"] = torch.tensor(
        [token_id for attempt in attempts for token_id in attempt.token_ids]
    )
    results["logprobs"] = torch.cat([attempt.logprobs for attempt in attempts])
    for packing in ("tree", "rows"):
        student.zero_grad()
        stats = policy_gradients(
            student, rollouts, packing=packing, token_budget=1024, temperature=1.0
        )
        numbers = (
            stats.loss,
            stats.figures.entropy,
            stats.figures.ratio_mean,
            stats.figures.sampler_mismatch_max_nats,
        )
        results[f"{packing} statistics"] = torch.tensor(numbers, dtype=torch.float64)
        results |= {
            f"{packing} gradient of {name}": param.grad.clone()
            for name, param in student.named_parameters()
        }
    results["gradient norm"] = torch.tensor(
        Optimizer(student, lr=1e-3, warmup_updates=0).step().grad_norm
    )
    return results | {
        f"updated {name}": param.detach() for name, param in student.named_parameters()
    }


def library_sums_in_one_order() -> bool:
    """Whether the GEMM of weight gradients is thread-invariant on this machine.

    oneDNN's is, at these sizes. MKL's, which runs on Intel processors, splits long sums among
    threads and is not.
    """
    generator = torch.Generator().manual_seed(0)
    products = []
    grad_TN = torch.randn(950, 120, generator=generator)
    x_TD = torch.randn(950, 72, generator=generator)
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        product = torch.empty(120, 72)
        matmul_(product, grad_TN.T, x_TD)
        products.append(product)
    return all(torch.equal(product, products[0]) for product in products)


@pytest.mark.parametrize(
    "make", [awkward_student, pytest.param(built_in_student, marks=pytest.mark.slow)]
)
def test_thread_invariant(make) -> None:
    """1, 2 and 3 threads give bitwise equal results.

    Our own kernels always do. Sums over tokens are the library's, so they are compared to rounding
    where the library does not keep their order.
    """
    expected = run_update(make(), 1)
    is_exact = library_sums_in_one_order()
    for num_threads in (2, 3):
        for name, value in run_update(make(), num_threads).items():
            if is_exact or name in ("token_ids", "logprobs"):
                assert_bitwise_equal(value, expected[name], name=f"{name}, {num_threads} threads")
            else:
                bound = 1e-3 if name.startswith("updated") else 1e-5
                error = float(
                    (value.double() - expected[name].double()).norm()
                    / expected[name].double().norm()
                )
                assert error <= bound, f"{name}, {num_threads} threads: relative error {error:.2g}"
