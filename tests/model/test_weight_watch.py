"""Checks what an engine notices of weights that others write or replace, and update_weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils.parametrizations import spectral_norm
from transformers import PreTrainedModel

from socpo_fast import adopt_student, load_student
from tests.helpers.adopted import (
    GREEDY,
    IDS,
    draw,
    engine_of,
    expected_tokens,
    logits_of,
    perturb,
)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Makes the random models of make_hf the same in every run."""
    torch.manual_seed(0)


class PointerSGD(torch.optim.SGD):
    """An optimizer that writes past torch's counts, as some compiled ones do."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.sub_(parameter.grad, alpha=group["lr"])


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda params: torch.optim.AdamW(params, lr=0.05),
        lambda params: torch.optim.AdamW(params, lr=0.05, foreach=True),
        lambda params: torch.optim.AdamW(params, lr=0.05, fused=True),
        lambda params: PointerSGD(params, lr=5.0),
    ],
    ids=["adamw", "foreach", "fused", "pointers"],
)
def test_engine_sees_an_optimizer_step(make_hf: Callable, make_optimizer: Callable) -> None:
    """Nothing is called between the step and the next draw; no page of old weights is used."""
    model, _ = make_hf("llama3_rope")
    optimizer = make_optimizer(model.parameters())
    engine = engine_of(adopt_student(model, share=True))
    texts = [draw(engine)]
    for update in range(1, 4):
        model(IDS[None], labels=IDS.flip(0)[None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        texts.append(draw(engine))
        assert engine.policy_version == update
        assert texts[-1] == expected_tokens(model)
    assert len({tuple(text) for text in texts}) > 1, "the steps must change what is drawn"


def test_weights_change_under_a_running_attempt(make_hf: Callable) -> None:
    """KV of the old weights is recomputed: the rest is what the new ones say of the whole row."""
    model, _ = make_hf("llama3_rope")
    engine = engine_of(adopt_student(model, share=True))
    engine.submit(IDS.tolist(), GREEDY, key=(0, 0))
    for _ in range(4):
        engine.step()
    perturb(model)
    finished = []
    while engine.has_work:
        finished += engine.step()
    row = IDS.tolist() + finished[0].token_ids
    with torch.no_grad():
        best = model(torch.tensor([row])).logits[0].argmax(-1)
    assert row[-4:] == best[-5:-1].tolist()
    assert engine.policy_version == 1


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_engine_sees_steps_on_the_student(make_hf: Callable, share: bool, fused: bool) -> None:
    """An optimizer may as well hold the student's own parameters."""
    model, _ = make_hf("llama3_rope")
    student = adopt_student(model, share=share)
    engine = engine_of(student)
    draw(engine)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.05, fused=fused)
    logits_of(student).logsumexp(-1).sum().backward()
    optimizer.step()
    assert draw(engine) == draw(engine_of(copy.deepcopy(student)))
    assert engine.policy_version == 1


def step_something_else() -> None:
    """Makes an optimizer step that concerns no student."""
    other = nn.Linear(3, 3)
    other(torch.ones(3)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=1.0).step()


def test_another_optimizer_changes_nothing(make_hf: Callable) -> None:
    model, _ = make_hf("llama3_rope")
    engine = engine_of(adopt_student(model, share=True))
    step_something_else()
    draw(engine)
    assert engine.policy_version == 0


def to_bf16(model: PreTrainedModel) -> None:
    model.to(torch.bfloat16)


def assign(model: PreTrainedModel) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def assign_one(model: PreTrainedModel) -> None:
    k_proj = model.model.layers[1].self_attn.k_proj
    k_proj.weight = nn.Parameter(k_proj.weight.detach().clone())


def replace_module(model: PreTrainedModel) -> None:
    """As peft puts an adapter in."""
    model.model.layers[1].self_attn.k_proj = nn.Linear(24, 32, bias=False)


def untie(model: PreTrainedModel) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def parametrize(model: PreTrainedModel) -> None:
    spectral_norm(model.model.layers[0].mlp.up_proj)


@pytest.mark.parametrize(
    "replace", [to_bf16, assign, assign_one, replace_module, untie, parametrize]
)
def test_replaced_storage_is_refused(make_hf: Callable, replace: Callable) -> None:
    """Neither a new prompt nor a running one gets another token from the old tensors."""
    model, _ = make_hf("llama3_rope")
    engine = engine_of(adopt_student(model, share=True))
    engine.submit(IDS.tolist(), GREEDY, key=(0, 0))
    engine.step()
    replace(model)
    step_something_else()
    match = "must stay views of the student's"
    for attempt_to_go_on in (engine.step, engine.update_weights, engine.bump_policy_version):
        with pytest.raises(RuntimeError, match=match):
            attempt_to_go_on()
    engine.reset()
    with pytest.raises(RuntimeError, match=match):
        draw(engine)


def test_replaced_weights_of_a_student_are_refused(make_hf: Callable) -> None:
    """A loaded student: new storage is told, and taken over by bump_policy_version."""
    model, folder = make_hf("llama3_rope")
    student = load_student(folder)
    engine = engine_of(student)
    draw(engine)
    perturb(model)
    student.load_state_dict(adopt_student(model).state_dict(), assign=True)
    with pytest.raises(RuntimeError, match="must keep their storage"):
        draw(engine)
    engine.bump_policy_version()
    assert draw(engine) == expected_tokens(model)
    student.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="must keep their storage"):
        draw(engine)
    with pytest.raises(RuntimeError, match=r"must stay torch.float32 on cpu, got torch.bfloat16"):
        engine.bump_policy_version()


# update_weights


@pytest.mark.parametrize("family", ["llama3_rope", "qwen3_untied"])
@pytest.mark.parametrize("source", ["parameters", "state_dict", "generator_of_bf16"])
def test_update_weights_copies(make_hf: Callable, family: str, source: str) -> None:
    model, _ = make_hf(family)
    engine = engine_of(adopt_student(model))
    draw(engine)
    perturb(model)
    if source == "generator_of_bf16":
        model.to(torch.bfloat16).to(torch.float32)
    engine.update_weights(
        {
            "parameters": model.named_parameters,
            "state_dict": model.state_dict,
            "generator_of_bf16": lambda: ((n, p.bfloat16()) for n, p in model.named_parameters()),
        }[source]()
    )
    assert engine.policy_version == 1
    assert draw(engine) == expected_tokens(model)
    assert engine.policy_version == 1, "the copy itself must not count again"


def test_update_weights_refuses_names_and_shapes(make_hf: Callable) -> None:
    model, _ = make_hf("llama3_rope")
    engine = engine_of(adopt_student(model))
    with pytest.raises(ValueError, match=r"tensor name must be one of the student's .* got 'lm'"):
        engine.update_weights({"lm": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"shape of model.norm.weight must be \[24\], got \[3\]"):
        engine.update_weights([("model.norm.weight", torch.zeros(3))])
    # Part of the weights may have been copied, so no page of before may be used.
    assert engine.policy_version == 2


@pytest.fixture
def fsdp(tmp_path: Path) -> Iterator[Callable]:
    """Yields fully_shard, with a process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        yield partial(fully_shard, mesh=init_device_mesh("cpu", (1,)))
    finally:
        dist.destroy_process_group()


def test_sharded_models_are_refused_but_copied(make_hf: Callable, fsdp: Callable) -> None:
    """FSDP2's parameters cannot be adopted; a whole student takes them by update_weights."""
    model, folder = make_hf("llama3_rope")
    engine = engine_of(load_student(folder))
    draw(engine)
    perturb(model)
    expected = expected_tokens(model)
    fsdp(model)
    for share in (False, True):
        with pytest.raises(ValueError, match="parameters must be whole, got FSDP shards"):
            adopt_student(model, share=share)
    engine.update_weights(model.named_parameters())
    assert draw(engine) == expected
