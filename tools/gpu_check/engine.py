"""Stage `engine`: checks that the engine on a card generates what the engine on a CPU generates.

Checked are
- tokens against those of the CPU's engine, both in fp32: they may differ only at a near tie;
- graphs against the same rounds launched one by one, and one token a host read against eight: they
  must be bitwise equal;
- preemption, with pages for few sequences;
- new weights under graphs that were captured before;
- how often a step makes the host wait.

The parts run at once, as each waits for the CPU most of the time.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from socpo_fast.training.optimizer import Optimizer
from tests.helpers.tiny import generate_same
from tools.gpu_check.check import ROOT, Check, Part
from tools.gpu_check.engines import (
    PAGE_SIZE,
    PROMPTS,
    SUFFIX,
    compare_engines,
    drain,
    exact,
    launch_rounds,
    make_engine,
    make_student,
    params_of,
    prompts_of,
)


def beside_cpu(model: str) -> Part:
    """Returns a part that compares groups and second attempts, with enough pages for all."""

    def part(check: Check) -> None:
        devices = (check.device, "cpu")
        ours, theirs = (make_engine(make_student(check, model, device)) for device in devices)
        compare_engines(check, ours, theirs, of=model)

    return part


def forced_preemption(check: Check) -> None:
    """Checks that with pages for 2.5 of 16 sequences the tokens are those of a large cache."""
    tokens = max(length for _, length in PROMPTS) + SUFFIX
    # Pages that the longest sequence needs with both of its attempts.
    longest = -(-(tokens + 2 * params_of(check).max_new_tokens) // PAGE_SIZE)
    student = make_student(check, "small SmolLM2", check.device)
    ours = make_engine(student, num_pages=longest * 5 // 2)
    theirs = make_engine(make_student(check, "small SmolLM2", "cpu"))
    compare_engines(check, ours, theirs, of="with preemption")
    check.figure("engine.preemptions", ours.stats.preemptions)
    # Without a preemption this part would have compared nothing new.
    assert ours.stats.preemptions > 0, "nobody was preempted"


def graph_replay(check: Check) -> None:
    """Checks that replayed and launched rounds, and 1 and 8 tokens a read, are bitwise equal."""
    student = make_student(check, "small Qwen3", check.device)
    prompts = prompts_of(student, 3, 21)
    replayed, launched = (make_engine(student, tokens_per_sync=8) for _ in range(2))
    launch_rounds(launched)
    settings: tuple[dict[str, Any], ...] = (
        {"n": 3, "eos_ids": (0, 1, 2), "ignore_eos": False},
        {"top_k": 7},
    )
    for changes in settings:
        params = params_of(check, **changes)
        outputs = [exact(generate_same(engine, prompts, params)) for engine in (replayed, launched)]
        assert outputs[0] == outputs[1], "graph and eager rounds differ"
    by_one, by_eight = (
        exact(generate_same(make_engine(student, tokens_per_sync=n), prompts[:1], params_of(check)))
        for n in (1, 8)
    )
    assert by_one == by_eight, "one and eight tokens a host read differ"


def weights_stay(check: Check) -> None:
    """Checks over three updates that pointers stay and old graphs use the new weights."""
    student = make_student(check, "small Qwen3", check.device)
    prompts = prompts_of(student, 2, 21)
    params = params_of(check)
    engine = make_engine(student, tokens_per_sync=8)
    # A large learning rate, so that an update changes tokens.
    optimizer = Optimizer(student, lr=1e-3, warmup_updates=0)
    outputs = [exact(generate_same(engine, prompts, params))]
    pointers = [x.data_ptr() for x in [*student.parameters(), *student.buffers()]]
    for _ in range(3):
        for idx, parameter in enumerate(student.parameters()):
            # On the CPU, so that the gradients are the same on every device.
            generator = torch.Generator().manual_seed(idx + len(outputs))
            grad = torch.randn(parameter.shape, generator=generator)
            parameter.grad = grad.to(check.device)
        assert not optimizer.step().skipped
        engine.bump_policy_version()
        outputs.append(exact(generate_same(engine, prompts, params)))
        new_pointers = [x.data_ptr() for x in [*student.parameters(), *student.buffers()]]
        assert new_pointers == pointers, "storage moved"
        # An engine made after the update has seen no other weights.
        fresh = make_engine(copy.deepcopy(student), tokens_per_sync=8)
        assert outputs[-1] == exact(generate_same(fresh, prompts, params)), (
            "old weights in the engine"
        )
        assert_changed(outputs[-2], outputs[-1])


def assert_changed(before: object, after: object) -> None:
    """Asserts that an update changed the tokens, so that the comparison above means something."""
    assert before != after, "an update changed no token"


def host_syncs(check: Check) -> None:
    """Counts a decode step's synchronising calls; inside a round there must be none."""
    student = make_student(check, "small Qwen3", check.device)
    prompt = prompts_of(student, 1, 21)[0]
    params = params_of(check, n=2)
    for count in (1, 8):
        engine = make_engine(student, tokens_per_sync=count)
        generate_same(engine, [prompt], params)  # compile and capture first
        # A synchronising call inside of a round raises, whether it is captured or replayed.
        if (loop := engine.steps.loop) is not None:
            graph = loop.graph_for
            rounds = loop.run_round
            loop.graph_for = lambda *size, graph=graph: SimpleNamespace(
                replay=with_sync_errors(check.device, graph(*size).replay)
            )
            loop.run_round = with_sync_errors(check.device, rounds)
        # A first step prefills; the one that is counted decodes.
        engine.submit(prompt, params, key=(1, 1))
        engine.step()
        num_waits = len(host_waits(check.device, engine.step))
        check.figure(f"engine.syncs_of_{count}_token{'s' * (count > 1)}", num_waits)
        if loop is not None and check.is_cuda:
            launch_rounds(engine)
        drain(engine)


def host_waits(device: torch.device, run: Callable[[], object]) -> list[str]:
    """Returns where the host waits for the device during a call, as file:line for each time."""
    with warnings.catch_warnings(record=True) as caught, sync_debug(device, "warn"):
        warnings.simplefilter("always")
        run()
    return [
        f"{warning.filename.removeprefix(f'{ROOT}/')}:{warning.lineno}"
        for warning in caught
        if "synchroniz" in str(warning.message)
    ]


@contextmanager
def sync_debug(device: torch.device, mode: str) -> Iterator[None]:
    """Sets what a synchronising call does on this card: "warn" or "error"; nothing on a CPU."""
    if device.type != "cuda":
        yield
        return
    old_mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(old_mode)


def with_sync_errors(device: torch.device, function: Callable[..., None]) -> Callable[..., None]:
    """Returns the function with synchronising calls turned into errors."""

    def run(*args: Any) -> None:
        with sync_debug(device, "error"):
            function(*args)

    return run


PARTS: dict[str, Part] = {
    "beside the CPU, SmolLM2": beside_cpu("small SmolLM2"),
    "beside the CPU, Qwen3": beside_cpu("small Qwen3"),
    "preemption": forced_preemption,
    "graphs": graph_replay,
    "weights": weights_stay,
    "syncs": host_syncs,
}
