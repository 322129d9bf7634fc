"""What gpu_check measures on a card: host syncs of a decode step, generated tok/s, the policy loss beside torch's.

Each check takes (device, Sizes) and returns its figures, after looking at what was computed.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from bench._card import spread, time_rounds
from bench._gpu_engine import (
    PAGE_SIZE,
    Figures,
    Sizes,
    as_they_come,
    drain,
    make_engine,
    make_student,
    params_of,
    prompts_of,
)
from socpo_fast import Engine, SamplingParams
from socpo_fast.ops import linear_policy_loss, policy_loss


@contextmanager
def sync_debug(device: torch.device, mode: str) -> Iterator[None]:
    """What a synchronising call does on this card: "warn" or "error"; nothing on a CPU."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def host_syncs(device: torch.device, sizes: Sizes) -> Figures:
    """Synchronising calls of a decode step of one and of eight tokens; none at all in a round, replayed or not."""
    student, figures = make_student(sizes, device), {}
    for count in (1, 8):
        engine = make_engine(student, tokens_per_sync=count)
        engine.generate(prompts_of(sizes, 1, 21), params_of(sizes, n=2))  # compiles, captures
        if (loop := engine._loop) is not None:
            graph, rounds = loop._graph, loop._round
            loop._graph = lambda *size, graph=graph: SimpleNamespace(replay=unwatched(device, graph(*size).replay))
            loop._round = unwatched(device, rounds)
        engine.submit(prompts_of(sizes, 1, 21)[0], params_of(sizes, n=2), key=(1, 1))
        engine.step()
        with warnings.catch_warnings(record=True) as caught, sync_debug(device, "warn"):
            warnings.simplefilter("always")
            engine.step()
        figures[f"syncs_of_{count}_tokens"] = sum("synchroniz" in str(warning.message) for warning in caught)
        if loop is not None and device.type == "cuda":
            as_they_come(engine)
        drain(engine)
    return figures


def unwatched(device: torch.device, function: Callable[..., None]) -> Callable[..., None]:
    """The function; a synchronising call in it is an error."""

    def run(*args: Any) -> None:
        with sync_debug(device, "error"):
            function(*args)

    return run


def decode_speed(device: torch.device, sizes: Sizes) -> Figures:
    """Generated tok/s, prompt of 40, in bf16 on a card; the first run compiles and captures and is not timed."""
    student = make_student(sizes, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    figures = {}
    for batch in sizes.batches:
        num_pages = batch * -(-(40 + sizes.new_tokens) // PAGE_SIZE)
        engine, params = make_engine(student, num_pages=num_pages), params_of(sizes, n=1)
        prompts = prompts_of(sizes, batch, 40)
        engine.generate(prompts, params)
        seconds = [timed_generate(engine, prompts, params) for _ in range(sizes.rounds)]
        figures[f"tok_s_batch_{batch}"] = batch * sizes.new_tokens / spread(seconds).median_s
    return figures


def timed_generate(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> float:
    """Seconds; the tokens are on the host at the end, so the card is done."""
    started = time.perf_counter()
    engine.generate(prompts, params)
    return time.perf_counter() - started


def policy_loss_speed(device: torch.device, sizes: Sizes) -> Figures:
    """Forward and backward of linear_policy_loss beside logits stored and torch's log_softmax, bf16 on a card."""
    (rows, vocab, width), generator = sizes.loss, torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden = torch.randn(rows, width, generator=generator).to(device, dtype).requires_grad_()
    weight = (2 * torch.randn(vocab, width, generator=generator) / width**0.5).to(device, dtype).requires_grad_()
    targets = torch.randint(vocab, (rows,), generator=generator).to(device)
    with torch.no_grad():
        old = torch.cat([
            (h @ weight.T).float().log_softmax(-1).gather(1, t[:, None])[:, 0]
            for h, t in zip(hidden.split(512), targets.split(512), strict=True)
        ])  # fmt: skip
    advantages = torch.randn(rows, generator=generator).to(device)

    def ours() -> torch.Tensor:
        given = hidden, weight, targets, old, advantages
        return linear_policy_loss(*given, temperature=1.0, num_loss_tokens=rows).loss

    def naive() -> torch.Tensor:
        logprobs = (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
        return policy_loss(logprobs, old, advantages, num_loss_tokens=rows).loss

    def step(loss: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
        hidden.grad = weight.grad = None
        value = loss()
        value.backward()
        return value.item(), weight.grad.float()

    def mib(loss: Callable[[], torch.Tensor]) -> float:
        if device.type != "cuda":
            return 0.0
        hidden.grad = weight.grad = None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(loss)
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    (loss, grad), (expected, expected_grad) = step(ours), step(naive)
    error = float((grad - expected_grad).norm() / expected_grad.norm())
    is_right = abs(loss - expected) <= 2e-2 * abs(expected) + 1e-3 and error < 3e-2
    assert is_right, f"loss {loss}, expected {expected}; dW off by {error}"
    runs = [lambda loss=loss: step(loss) for loss in (ours, naive)]
    ours_ms, naive_ms = (1e3 * spread(seconds).median_s for seconds in time_rounds(runs, sizes.rounds))
    figures = {"ours_ms": ours_ms, "naive_ms": naive_ms, "ours_mib": mib(ours), "naive_mib": mib(naive)}
    return figures | {"weight_grad_error": error, "tflop_s": 6e-9 * rows * vocab * width / ours_ms}
