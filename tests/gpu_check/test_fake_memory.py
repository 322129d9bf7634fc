"""Checks the memory of the fake card, on cases counted by hand and against autograd's engine.

"The engine" in this file is autograd's. On the fake device tools.gpu_check.graph walks the graph in
its place, because the engine would ask the device for its streams.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from socpo_fast.training.optimizer import Optimizer
from socpo_fast.training.step import policy_gradients
from tools.gpu_check import graph
from tools.gpu_check.groups import GroupShape, make_rollouts
from tools.gpu_check.launches import tensors_of
from tools.gpu_check.memory import CARD_GIB, Event, Memory
from tools.gpu_check.models import MODELS, make_model
from tools.gpu_check.stand_ins import Graph

MIB = 2**20
LARGE = 2**14


def mib(number: int) -> Tensor:
    """Returns a tensor of `number` MiB."""
    return torch.empty(number * MIB, dtype=torch.int8)


class Tracker(TorchDispatchMode):
    """Counts the tensors that ops return, on any device."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tensors_of(out):
            self.memory.add(x)
        return out


@contextlib.contextmanager
def by_graph() -> Iterator[None]:
    """Replaces Tensor.backward by that of the fake device within the block."""

    def backward(root: Tensor, gradient: Tensor | None = None) -> None:
        graph.backward([root], [torch.ones_like(root) if gradient is None else gradient])

    with mock.patch.object(Tensor, "backward", backward), graph.saved_until_read():
        yield


def allocations(log: list[Event]) -> list[tuple[str, int]]:
    """Returns (tensor, bytes in use) for each allocation of at least LARGE bytes."""
    sizes: dict[int, int] = {}
    large = []
    for key, num_bytes, tensor_name in log:
        sizes[key] = num_bytes
        if num_bytes >= LARGE:
            large.append((tensor_name, sum(sizes.values())))
    return large


def test_views_count_once_and_freed_memory_does_not() -> None:
    memory = Memory()
    x = mib(3)
    y = mib(2)
    assert memory.add(x) and memory.add(y) and not memory.add(x)
    view = x[5:].view(torch.uint8)
    assert not memory.add(view) and memory.live_bytes == 5 * MIB
    del x
    assert memory.live_bytes == 5 * MIB  # a view keeps the whole storage alive
    del view
    assert memory.live_bytes == 2 * MIB and memory.most_bytes == 5 * MIB
    memory.add(z := mib(1))
    assert memory.live_bytes == memory.held_bytes == 3 * MIB and memory.most_bytes == 5 * MIB
    memory.reset_peak()  # torch's peak, which a stage may reset; most_bytes stays
    assert memory.peak_bytes == 3 * MIB and memory.most_bytes == 5 * MIB
    memory.start()
    assert memory.most_bytes == 3 * MIB
    del y, z
    assert memory.live_bytes == 0


def test_a_parameter_counts_once_however_it_is_tied() -> None:
    with Tracker() as tracker:
        embed = nn.Embedding(256, 1024)
        head = nn.Linear(1024, 256, bias=False)
        assert tracker.memory.live_bytes == 2 * MIB
        head.weight = embed.weight
        head.weight.data.zero_()
        assert head.weight.T.shape == (1024, 256)
    assert tracker.memory.live_bytes == MIB


def test_sizes_are_rounded_as_the_allocator_does() -> None:
    memory = Memory()
    tensors = [torch.empty(size, dtype=torch.int8) for size in (0, 1, 512, 513)]
    assert [memory.add(x) for x in tensors] == [False, True, True, True]
    assert memory.live_bytes == 512 + 512 + 1024


def test_graph_pool_lives_as_long_as_the_graph() -> None:
    """Memory allocated in a capture stays in the graph's pool until the last graph on it is gone.

    A second graph on the same pool reuses what the first one has freed.
    """
    memory = Memory()
    graphs = [Graph(), Graph()]
    with memory.capture(graphs[0], None) as pool:
        output = mib(1)
        memory.add(output)
        for _ in range(3):  # each reuses the memory of the one before
            memory.add(mib(4))
    assert memory.live_bytes == MIB and memory.held_bytes == memory.most_bytes == 5 * MIB
    with memory.capture(graphs[1], pool):
        memory.add(mib(3))  # fits into what the first has freed
        memory.add(mib(6))
    assert memory.held_bytes == 7 * MIB and memory.peak_bytes == 7 * MIB
    memory.add(x := mib(2))  # outside of captures
    assert memory.held_bytes == 9 * MIB
    graphs.pop()
    assert memory.held_bytes == 9 * MIB
    graphs.pop()
    assert memory.held_bytes == 3 * MIB
    del output, x
    assert memory.held_bytes == 0


def test_is_full_beyond_the_memory_of_a_card() -> None:
    memory = Memory()
    halves = torch.empty(2, int(CARD_GIB * 2**29), dtype=torch.int8, device="meta").clone()
    memory.add(halves)
    assert not memory.is_full
    del halves
    memory.add(small := mib(1))
    assert not memory.is_full
    memory.add(torch.empty(int(CARD_GIB * 2**30), dtype=torch.int8, device="meta"))
    assert memory.is_full and memory.live_bytes == small.nbytes


@pytest.mark.parametrize("impl", ["ref", "auto"])
@pytest.mark.parametrize("is_trained", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_backward_uses_as_much_memory_as_the_engine(
    checkpointing: bool, is_trained: bool, impl: str
) -> None:
    """The fake device's backward allocates the engine's tensors, with nearly the same peak.

    Gradients are bitwise equal. Large tensors are allocated in the same order, and at each of them
    about as many bytes are in use. The rest of a few bytes a token is what no node of the graph
    reads. With checkpointing, after the peak, the inputs of the recomputed first layer also live
    longer.
    """
    config = MODELS["tiny"]
    shape = GroupShape(60, 80, 20, rollouts=6)
    options = {"token_budget": 16384, "temperature": 1.0, "checkpointing": checkpointing}
    traces: list[list[tuple[str, int]]] = []
    gradients = []
    for engine in (contextlib.nullcontext, by_graph):
        with engine(), Tracker() as tracker:
            tracker.memory.log = log = []
            student = make_model(config, device="cpu", dtype=torch.float32)
            if is_trained:  # from here on gradients are added up in place
                Optimizer(student, lr=1e-3)
            policy_gradients(student, make_rollouts(config.vocab_size, shape), **options, impl=impl)
        gc.collect()
        traces.append(allocations(log))
        gradients.append([p.grad for p in student.parameters()])
    peaks = [max(used for _, used in trace) for trace in traces]
    assert peaks[1] == pytest.approx(peaks[0], rel=5e-3)
    for (name, used), (our_name, our_used) in zip(*traces, strict=True):
        assert our_name == name and our_used == pytest.approx(used, abs=0.07 * peaks[0]), name
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))


def test_grad_matches_autograd_and_leaves_grad_alone() -> None:
    """graph.grad returns torch.autograd.grad's gradients, and writes to no tensor's .grad."""
    x, w, unused = (torch.randn(4, 4).requires_grad_() for _ in range(3))
    loss = ((x @ w).relu() * x).sum() + w.exp().sum()
    expected = torch.autograd.grad(loss, (w, x), retain_graph=True)
    actual = graph.grad([loss], (w, x, unused), [torch.ones(())])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual, expected, strict=False))
    assert actual[2] is None and x.grad is w.grad is None
    product = x @ w
    with pytest.raises(NotImplementedError, match="must be leaves"):
        graph.grad([product.sum()], (product,), [torch.ones(())])


def test_a_graph_is_walked_once() -> None:
    """A second backward through a graph is an error, since its saved tensors are gone."""
    with graph.saved_until_read():
        x = torch.randn(3).requires_grad_()
        loss = x.exp().sum()
    graph.backward([loss], [torch.ones(())])
    with pytest.raises(AssertionError, match="walked again"):
        graph.backward([loss], [torch.ones(())])
