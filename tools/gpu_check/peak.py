"""What an update and an engine take of a card's memory, counted without one.

    python -m tools.gpu_check.peak [--models NAME ..] [--tokens N ..]     (make gpu-peak)

Needs a CUDA build of PyTorch, no driver and no card. Read peak_of_update and memory_of_engine. Both
run the project's own code on the fake device and count storages as PyTorch's allocator would.

Not counted: CUDA's context and the libraries' workspaces (about 1 GiB), temporary memory inside one
op of torch such as a sort, and gaps between the allocator's blocks. Saved tensors of the graph are
freed when their node has run, as autograd's engine does it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from socpo_fast.engine import Engine
from socpo_fast.engine.runner import Runner
from socpo_fast.model import ModelConfig
from socpo_fast.training import step
from socpo_fast.training.optimizer import Optimizer
from socpo_fast.types import Attempt, Rollout, RolloutKey, SamplingParams
from tools.gpu_check.fake_cuda import fake_cuda
from tools.gpu_check.groups import add_turns
from tools.gpu_check.memory import Event
from tools.gpu_check.models import MODELS, make_model
from tools.gpu_check.recorder import Recorder
from tools.gpu_check.stand_ins import stage_stand_ins

DEVICE = torch.device("cuda")
DTYPE = torch.bfloat16
# A microbatch is one group of which nearly all tokens are answers: that takes the most memory.
NUM_ROLLOUTS = 16
MIN_PROMPT = 64
NUM_MICROBATCHES = 2  # so that gradients exist already while the second one is computed
# The engine's sequences.
PAGE_SIZE = 32
PROMPT = 300
GROUP_SIZE = 8
NUM_STEPS = 8  # of the engine: all prefills, and some decode rounds with their captures
UNKNOWN_TOKEN = 7  # the token that every draw on the fake device gives
PHASES = ("forward", "head", "backward", "step")
GIB = 2**30
_MARK = 0  # the key of an event that begins a phase; no storage has it


@dataclass(frozen=True)
class Peak:
    """The largest memory of a phase, and the tensors of that moment that are not resident."""

    num_bytes: int  # of all tensors, resident ones included
    tensors: tuple[tuple[str, int, int], ...]  # (dtype and shape, count, bytes of all of them)


@dataclass(frozen=True)
class UpdateMemory:
    """Bytes of one update. Resident are parameters, low bits and moments."""

    parameters: int
    low_bits: int  # the low halves of bf16 masters
    moments: int
    peaks: dict[str, Peak]  # by phase

    @property
    def resident(self) -> int:
        return self.parameters + self.low_bits + self.moments

    @property
    def largest(self) -> tuple[str, Peak]:
        """The phase with the largest peak, and that peak."""
        return max(self.peaks.items(), key=lambda item: item[1].num_bytes)


@dataclass(frozen=True)
class EngineMemory:
    """Bytes of an engine besides the student, after it has decoded its largest batch."""

    pages: int
    rest: int  # buffers, and the pools of captured graphs
    peak: int  # the largest memory, parameters included


def peak_of_update(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    tokens: int,
    checkpointing: bool,
    num_microbatches: int = NUM_MICROBATCHES,
) -> UpdateMemory:
    """Runs policy_gradients and Optimizer.step on the fake device and counts their memory.

    Args:
        tokens: packed rows of a microbatch, >= 128. Each is one group: a prompt that 16 answers
                share, all of which carry loss.

    Raises:
        RuntimeError: the recorder has found a fault on the fake device.
    """
    with on_fake_card() as recorder:
        memory = recorder.memory
        student = make_model(config, device=DEVICE, dtype=dtype)
        parameters = memory.live_bytes
        optimizer = Optimizer(student, lr=1e-6)
        low_bits = sum(x.nbytes for x in optimizer.low_bits.values())
        resident = memory.live_bytes
        rollouts = [r for g in range(num_microbatches) for r in _group(tokens, g)]
        log: list[Event] = []
        memory.log = log
        with _phases(log), recorder.section("update", may_read=True):
            stats = step.policy_gradients(
                student,
                rollouts,
                token_budget=tokens,
                temperature=1.0,
                checkpointing=checkpointing,
            )
            _name_gradients(log, student.parameters())
            log.append(_mark("step"))
            optimizer.step(stats.loss_stats_7[0], also_read=stats.loss_stats_7)
        memory.log = None
        _raise_faults(recorder)
        assert stats.num_microbatches == num_microbatches
        assert stats.tokens_forwarded == num_microbatches * tokens
    moments = resident - parameters - low_bits
    return UpdateMemory(parameters, low_bits, moments, peaks_of(log, resident))


def memory_of_engine(
    config: ModelConfig, *, dtype: torch.dtype, kv_cache_gib: float, max_running: int
) -> EngineMemory:
    """Counts the memory of an engine on the fake device that decodes max_running sequences."""
    with on_fake_card() as recorder:
        memory = recorder.memory
        student = make_model(config, device=DEVICE, dtype=dtype)
        parameters = memory.live_bytes
        memory.start()
        with recorder.section("engine", may_read=True):
            engine = Engine(
                student, kv_cache_gib=kv_cache_gib, page_size=PAGE_SIZE, max_running=max_running
            )
            # What the cache takes is known; the difference to all that is held are buffers and
            # graphs.
            pages = engine.stats.pages_total * Runner.page_bytes(student, PAGE_SIZE)
            params = SamplingParams(
                temperature=1.0,
                max_new_tokens=64,
                eos_ids=(),
                ignore_eos=True,
                n=GROUP_SIZE,
            )
            for idx in range(max_running // GROUP_SIZE):
                engine.submit([0] * PROMPT, params, key=(0, idx))
            for _ in range(NUM_STEPS):
                engine.step()
        _raise_faults(recorder)
        return EngineMemory(pages, memory.held_bytes - parameters - pages, memory.most_bytes)


@contextlib.contextmanager
def on_fake_card() -> Iterator[Recorder]:
    """Runs the block on the fake card, with everything that stages ask of torch.cuda."""
    options = {"has_details": False, "unknown": UNKNOWN_TOKEN}
    with fake_cuda(**options) as recorder, stage_stand_ins(recorder):
        yield recorder


def peaks_of(log: Sequence[Event], resident: int) -> dict[str, Peak]:
    """Returns the peak of each phase that is marked in the log."""
    live: dict[int, tuple[int, str]] = {}
    total = resident
    phase = ""
    peaks: dict[str, tuple[int, list[tuple[int, str]]]] = {}
    for key, num_bytes, label in log:
        if key == _MARK:
            phase = label
        elif num_bytes:
            live[key] = num_bytes, label
            total += num_bytes
        elif key in live:
            total -= live.pop(key)[0]
        if phase and total > peaks.get(phase, (0, []))[0]:
            peaks[phase] = total, list(live.values())
    return {phase: Peak(size, _by_label(tensors)) for phase, (size, tensors) in peaks.items()}


def _name_gradients(log: list[Event], parameters: Iterable[Tensor]) -> None:
    """Labels gradients in the log as such, since activations may have the same shape."""
    # A storage's address can be reused, so the last allocation with this key is the live one.
    last_event = {key: idx for idx, (key, num_bytes, _) in enumerate(log) if num_bytes}
    for parameter in parameters:
        assert parameter.grad is not None
        idx = last_event[parameter.grad.untyped_storage()._cdata]
        key, num_bytes, label = log[idx]
        log[idx] = key, num_bytes, f"gradient {label}"


def _mark(phase: str) -> Event:
    """Returns the event that begins a phase."""
    return _MARK, 0, phase


def _by_label(tensors: list[tuple[int, str]]) -> tuple[tuple[str, int, int], ...]:
    """Groups tensors by dtype and shape, the largest group first."""
    counts = Counter(label for _, label in tensors)
    sizes: Counter[str] = Counter()
    for num_bytes, label in tensors:
        sizes[label] += num_bytes
    return tuple((label, counts[label], size) for label, size in sizes.most_common())


@contextlib.contextmanager
def _phases(log: list[Event]) -> Iterator[None]:
    """Marks in the log where a forward, the head and the backward of the layers begin."""
    policy_loss = step.linear_policy_loss
    backward = Tensor.backward

    def marked_policy_loss(*arguments: Any, **options: Any) -> Any:
        log.append(_mark("head"))
        return policy_loss(*arguments, **options)

    def marked_backward(root: Tensor, gradient: Tensor | None = None) -> None:
        if root.dim() > 0:  # from hidden states; a backward from the loss belongs to the head
            log.append(_mark("backward"))
        backward(root, gradient)
        if root.dim() > 0:
            log.append(_mark("forward"))

    log.append(_mark("forward"))
    patch = mock.patch.object
    with (
        patch(step, "linear_policy_loss", marked_policy_loss),
        patch(Tensor, "backward", marked_backward),
    ):
        yield


def _group(tokens: int, question_idx: int) -> list[Rollout]:
    """Makes one group of exactly so many packed rows: an answer's last token is not packed."""
    # Answers take equal numbers of rows; the prompt takes what is left.
    rows = (tokens - MIN_PROMPT) // NUM_ROLLOUTS
    prompt_ids = [0] * (tokens - NUM_ROLLOUTS * rows)
    values = torch.zeros(rows + 1)
    rollouts = []
    for idx in range(NUM_ROLLOUTS):
        key = RolloutKey(0, question_idx)
        attempt = Attempt([0] * (rows + 1), values, values, "length", key, idx, 0, 0)
        rollout = Rollout(question_idx=question_idx, rollout_idx=idx, prompt_ids=prompt_ids)
        add_turns(rollout, [attempt], [])
        rollouts.append(rollout)
    return rollouts


def _raise_faults(recorder: Recorder) -> None:
    """Raises the first fault, if there is one: counts after a fault mean nothing."""
    faults = [fault for section in recorder.sections for fault in section.faults]
    if faults:
        raise RuntimeError(f"peak: {faults[0]}")


def main(arguments: list[str] | None = None) -> int:
    title = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check.peak", description=title)
    models = [name for name in MODELS if name.startswith("Qwen3-")]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=models)
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 8192, 16384])
    parser.add_argument("--largest", type=int, default=10, help="tensors listed below each row")
    options = parser.parse_args(arguments)
    if torch.version.cuda is None or os.environ.get("TRITON_INTERPRET") == "1":
        needed = "a CUDA build of torch, without TRITON_INTERPRET"
        print(f"peak: torch must be {needed}, got torch {torch.__version__}", file=sys.stderr)
        return 2
    columns = ("parameters", "low", "moments", *PHASES)
    print(f"{'GiB, bf16':28}" + "".join(f"{name:>11}" for name in columns))
    for model in options.models:
        for checkpointing in (False, True):
            for tokens in options.tokens:
                name = f"{model}, {tokens}" + ", checkpoints" * checkpointing
                memory = peak_of_update(
                    MODELS[model], dtype=DTYPE, tokens=tokens, checkpointing=checkpointing
                )
                print("\n".join(_lines(name, memory, options.largest)), flush=True)
        engine = memory_of_engine(MODELS[model], dtype=DTYPE, kv_cache_gib=8, max_running=256)
        sizes = ", ".join(f"{name} {size / GIB:.2f}" for name, size in vars(engine).items())
        print(f"{model}, engine of 256: {sizes}", flush=True)
    return 0


def _lines(name: str, memory: UpdateMemory, num_largest: int) -> list[str]:
    """Returns a row of GiB, and the largest tensors at the largest peak."""
    sizes = [memory.parameters, memory.low_bits, memory.moments]
    sizes += [memory.peaks[phase].num_bytes for phase in PHASES]
    row = f"{name:28}" + "".join(f"{size / GIB:11.2f}" for size in sizes)
    phase, peak = memory.largest
    tensors = [
        f"    {phase}: {size / GIB:7.3f} GiB {count:4} x {label}"
        for label, count, size in peak.tensors[:num_largest]
    ]
    return [row, *tensors]


if __name__ == "__main__":
    sys.exit(main())
