"""Checks students made of live transformers models: copies, shared storage, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from socpo_fast import adopt_student, load_student, policy_gradients
from socpo_fast.model import save_student
from socpo_fast.model.hf_views import hf_rows, hf_views
from tests.helpers.adopted import IDS, logits_of, perturb
from tests.helpers.made_rollouts import make_rollouts


@pytest.fixture(autouse=True)
def seed() -> None:
    """Makes the random models of make_hf the same in every run."""
    torch.manual_seed(0)


def grads_by_name(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("family", ["llama_tied", "llama_biases", "mistral", "qwen2_untied"])
def test_adopted_student_has_the_models_logits(make_hf: Callable, family: str, share: bool) -> None:
    model, folder = make_hf(family)
    student = adopt_student(model, share=share)
    loaded = load_student(folder)
    assert student.config == loaded.config
    assert torch.equal(logits_of(student), logits_of(loaded))
    torch.testing.assert_close(model(IDS[None]).logits[0], logits_of(student), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama3_rope", "llama_biases", "qwen3_tied", "qwen2_untied"])
def test_shared_parameters_are_views(make_hf: Callable, family: str) -> None:
    """A write on either side is a write on both; the module keeps its Parameter objects."""
    model, _ = make_hf(family)
    before = {name: id(p) for name, p in model.named_parameters()}
    student = adopt_student(model, share=True)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    params = dict(model.named_parameters())
    for name, view in hf_views(student):
        assert params[name].data_ptr() == view.data_ptr(), name
        params[name].data.fill_(2.0)
        assert bool((view == 2.0).all()), name


def test_a_copy_is_on_its_own(make_hf: Callable) -> None:
    model, _ = make_hf("llama3_rope")
    student = adopt_student(model)
    old = logits_of(student)
    perturb(model)
    assert torch.equal(logits_of(student), old)
    assert student.shared is None


@pytest.mark.parametrize("family", ["llama3_rope", "qwen2_untied"])
def test_shared_model_saves_as_before(make_hf: Callable, tmp_path: Path, family: str) -> None:
    model, _ = make_hf(family)
    model.save_pretrained(tmp_path / "before")
    student = adopt_student(model, share=True)
    model.save_pretrained(tmp_path / "after")
    files = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert sorted(path.name for path in (tmp_path / "after").iterdir()) == files
    for name in files:
        before, after = ((tmp_path / x / name).read_bytes() for x in ("before", "after"))
        assert before == after, name
    save_student(student, tmp_path / "ours")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    for (name, a), b in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b), name


# Gradients


@pytest.mark.parametrize("family", ["llama3_rope", "llama_biases", "qwen3_tied"])
def test_gradients_are_views_and_equal_autograds(make_hf: Callable, family: str) -> None:
    """What policy_gradients leaves in the module is what it leaves in a student on its own."""
    model, folder = make_hf(family)
    student = adopt_student(model, share=True)
    alone = load_student(folder)
    for decoder in (student, alone):
        policy_gradients(decoder, make_rollouts(), token_budget=60, temperature=1.0)
    params = dict(model.named_parameters())
    for name, hf_parts in hf_rows(alone):
        expected, fused = (x.get_parameter(name).grad for x in (alone, student))
        for hf_name, rows in hf_parts:
            assert torch.equal(params[hf_name].grad, expected[rows]), hf_name
            assert params[hf_name].grad.data_ptr() == fused[rows].data_ptr(), hf_name


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_begin_anew_after_zero_grad(make_hf: Callable, set_to_none: bool) -> None:
    model, _ = make_hf("llama3_rope")
    student = adopt_student(model, share=True)
    results = []
    for _ in range(2):
        policy_gradients(student, make_rollouts(), token_budget=60, temperature=1.0)
        results.append(grads_by_name(model))
        model.zero_grad(set_to_none=set_to_none)
    for name, grad in results[0].items():
        assert torch.equal(results[1][name], grad), name


def test_gradients_add_to_the_modules_own(make_hf: Callable) -> None:
    """A loss of the module's own forward and policy_gradients accumulate into one .grad."""
    model, _ = make_hf("llama3_rope")
    student = adopt_student(model, share=True)

    def own_loss() -> None:
        model(IDS[None], labels=IDS[None]).loss.backward()

    def ours() -> None:
        policy_gradients(student, make_rollouts(), token_budget=60, temperature=1.0)

    sums = []
    for order in ((own_loss, ours), (ours, own_loss), (ours, ours)):
        model.zero_grad()
        for add in order:
            add()
        sums.append(grads_by_name(model))
    model.zero_grad()
    own_loss()
    expected = grads_by_name(model)
    for name, grad in sums[2].items():
        expected[name] += grad / 2
    for name, grad in expected.items():
        for total in sums[:2]:
            torch.testing.assert_close(total[name], grad, atol=1e-6, rtol=1e-5)


def test_frozen_parameters_stay_frozen(make_hf: Callable) -> None:
    model, _ = make_hf("llama3_rope")
    model.model.embed_tokens.requires_grad_(False)
    student = adopt_student(model, share=True)
    policy_gradients(student, make_rollouts(), token_budget=60, temperature=1.0)
    assert model.model.embed_tokens.weight.grad is None
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


def test_freezing_after_adoption(make_hf: Callable) -> None:
    """Each parameter is frozen or trained as the module says now, whatever it is fused with."""
    model, _ = make_hf("qwen3_tied")
    attention = model.model.layers[0].self_attn
    student = adopt_student(model, share=True)

    def names_with_grad() -> set[str]:
        model.zero_grad()
        policy_gradients(student, make_rollouts(), token_budget=60, temperature=1.0)
        return {name for name, p in model.named_parameters() if p.grad is not None}

    everything = names_with_grad()
    assert everything == {name for name, _ in model.named_parameters()}
    attention.q_proj.requires_grad_(False)
    assert everything - names_with_grad() == {"model.layers.0.self_attn.q_proj.weight"}
    model.requires_grad_(False)
    attention.v_proj.requires_grad_(True)
    assert names_with_grad() == {"model.layers.0.self_attn.v_proj.weight"}
    model.requires_grad_(True)
    assert names_with_grad() == everything


def test_an_optimizer_of_the_student_may_clear(make_hf: Callable) -> None:
    """Gradients that the student's own zero_grad has dropped do not come back by the module."""
    model, _ = make_hf("llama3_rope")
    student = adopt_student(model, share=True)
    results = []
    for _ in range(3):
        policy_gradients(student, make_rollouts(), token_budget=60, temperature=1.0)
        results.append(grads_by_name(model))
        student.zero_grad()
    for name, grad in results[0].items():
        assert torch.equal(results[2][name], grad), name


def test_a_deep_copy_shares_nothing(make_hf: Callable) -> None:
    model, _ = make_hf("llama3_rope")
    twin = copy.deepcopy(adopt_student(model, share=True))
    old = logits_of(twin)
    perturb(model)
    assert twin.shared is None
    assert torch.equal(logits_of(twin), old)


# Refusals


def wrapped_in_ddp(model: PreTrainedModel) -> nn.Module:
    class DistributedDataParallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = model

    return DistributedDataParallel()


def with_adapter(model: PreTrainedModel) -> nn.Module:
    model.model.layers[0].self_attn.q_proj.lora_A = nn.Linear(24, 2, bias=False)
    return model


def with_value_head(model: PreTrainedModel) -> nn.Module:
    model.score = nn.Linear(24, 1)
    return model


def without_data(model: PreTrainedModel) -> nn.Module:
    model.model.norm.weight.data = torch.empty(0)
    return model


def in_two_dtypes(model: PreTrainedModel) -> nn.Module:
    model.model.norm.to(torch.bfloat16)
    return model


def untied(model: PreTrainedModel) -> nn.Module:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def shifted_config(model: PreTrainedModel) -> nn.Module:
    model.config.intermediate_size += 2
    return model


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (wrapped_in_ddp, r"class of the model must be one of .* 'DistributedDataParallel'; unwrap"),
        (with_adapter, "must be without an adapter, got one; merge it first"),
        (with_value_head, "2 missing or extra, score.bias first"),
        (without_data, "model.norm.weight must be loaded, with data of its own"),
        (in_two_dtypes, "dtype of the parameters must be the same for all"),
        (untied, "lm_head.weight must be tied as config.tie_word_embeddings says"),
        (shifted_config, r"shape of .* must be \[42, 24\] by the config, got \[40, 24\]"),
    ],
)
@pytest.mark.parametrize("share", [False, True])
def test_other_models_are_refused(
    make_hf: Callable, damage: Callable, message: str, share: bool
) -> None:
    """A refused model is left as it was."""
    model = damage(make_hf("llama3_rope")[0])
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        adopt_student(model, share=share)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before


def test_a_folder_is_no_live_model(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"got PosixPath; read a folder with load_student"):
        adopt_student(tmp_path)


def test_other_architectures_are_refused() -> None:
    """A config that says something our decoder does not compute is refused as in a folder."""
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "vocab_size": 53}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, hidden_act="gelu"))
    with pytest.raises(ValueError, match=r"model.config: hidden_act must be 'silu', got 'gelu'"):
        adopt_student(model)
