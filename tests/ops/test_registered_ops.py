"""Tests every op as PyTorch sees it: opcheck, torch.compile, FakeTensor, meta and autocast.

CASES has one call of each public function. The registered ops are caught while it runs, so that
opcheck sees what the public functions really hand over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from socpo_fast import ops
from socpo_fast.ops._register import LIBRARY
from tests.helpers.elementwise import needs_cpp

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Call(NamedTuple):
    """A public function, its tensor arguments, and the implementations it has.

    `differentiable` names the tensors that it has a gradient for.
    """

    run: Callable[..., Any]
    tensors: dict[str, Tensor]
    impls: tuple[str, ...] = ("cpp", "triton")
    differentiable: tuple[str, ...] = ()


def f(*shape: int) -> Tensor:
    """Returns normal numbers, which depend on the shape only."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def ints(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


DRAWS = {
    "temperature_B": torch.ones(3),
    "top_k_B": ints(0, 0, 0),
    "top_p_B": torch.ones(3),
    "min_p_B": torch.zeros(3),
}
PAGES = {"k_cache_PSKE": f(3, 4, 1, 8), "v_cache_PSKE": f(3, 4, 1, 8)}
ATTEMPTS = {"attempt_idx_A": ints(0, 0, 1, 1), "rewards_A": torch.tensor([1.0, 0.0, 0.0, 1.0])}
TOKENS = {"targets_N": ints(3, 1, 0), "rows_N": ints(0, 2, 2)}
OLD = {"old_logprobs_N": f(3), "advantages": f(3)}


def make_cases() -> dict[str, Call]:
    """Returns one call of each public function, on the smallest shapes that use everything."""
    lm_head = {"hidden_TD": f(3, 8), "weight_VD": f(20, 8)}
    batch = ATTEMPTS | {"num_tokens_A": ints(2, 3, 1, 4), "question_idx_A": ints(0, 1, 0, 1)}
    tables = {"cos_TE": f(4, 4).repeat(1, 2), "sin_TE": f(4, 4).repeat(1, 2)}
    sequences = {
        "block_table_BM": torch.arange(3, dtype=torch.int32)[None],
        "seq_lens_B": ints(9, dtype=torch.int32),
        "cu_seqlens_q": ints(0, 4, dtype=torch.int32),
    }
    linear = {"x_TD": f(3, 8), "weight_ND": f(5, 8), "bias_N": f(5)}
    norm = {"x_TD": f(3, 8), "weight_D": f(8), "residual_TD": f(3, 8)}
    loss = {"num_loss_tokens": 3.0}
    packed = {"q_THE": f(4, 2, 32), "k_TKE": f(4, 1, 32), "v_TKE": f(4, 1, 32)}
    packed["tree"] = ints(4, 3, 3, 4, dtype=torch.int32)
    head_norms = {"q_weight_E": f(8), "k_weight_E": f(8)}
    written = {"qkv_THE": f(4, 4, 8)} | tables | PAGES | {"slots_T": ints(1, 7, -1, 3)}

    def paged(impl: str, **tensors: Tensor) -> Tensor:
        return ops.paged_attention(**tensors, scale=0.3, impl=impl)

    adamw_tensors = {name: f(3, 4) for name in ("param", "exp_avg", "grad")} | {
        "exp_avg_sq": f(3, 4) ** 2
    }
    adamw_tensors["param"] = adamw_tensors["param"].bfloat16()
    adamw_tensors["low_bits"] = ints(*range(12), dtype=torch.int16).view(3, 4)
    adamw_numbers = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "step": 2}

    return {
        "adamw": Call(
            lambda **x: ops.adamw(**adamw_numbers, **x) or [],
            adamw_tensors | {"scale": torch.tensor(0.5)},
        ),
        "linear": Call(ops.linear, linear, ("cpp",), tuple(linear)),
        "rms_norm": Call(lambda **x: ops.rms_norm(eps=1e-5, **x), norm, differentiable=tuple(norm)),
        "swiglu": Call(ops.swiglu, {"gate_up_TJ": f(3, 8)}, differentiable=("gate_up_TJ",)),
        "rotary": Call(ops.rotary, {"x_THE": f(4, 2, 8)} | tables, differentiable=("x_THE",)),
        "rotary_qkv": Call(
            lambda **x: ops.rotary_qkv(num_kv_heads=1, eps=1e-5, **x),
            {"qkv_TXE": f(4, 4, 8)} | tables | head_norms,
            differentiable=("qkv_TXE", *head_norms),
        ),
        "rotary_write": Call(lambda **x: ops.rotary_write(eps=1e-5, **x), written | head_norms),
        "paged_attention": Call(paged, {"q_THE": f(4, 2, 8)} | PAGES | sequences),
        "tree_attention": Call(
            lambda **x: ops.tree_attention(scale=0.3, **x),
            packed,
            differentiable=("q_THE", "k_TKE", "v_TKE"),
        ),
        "sample": Call(
            ops.sample, {"logits_BV": f(3, 20), "row_keys_B": ints(1, 2, 3)} | DRAWS, ("cpp", "ref")
        ),
        "linear_sample": Call(ops.linear_sample, lm_head | {"row_keys_B": ints(1, 2, 3)} | DRAWS),
        "compute_advantages": Call(
            lambda **x: ops.compute_advantages(schedule="batch_mean", **x), batch
        ),
        "decay_rewards": Call(ops.decay_rewards, ATTEMPTS),
        "linear_logprob": Call(
            lambda **x: ops.linear_logprob(temperature=0.9, **x),
            lm_head | TOKENS,
            differentiable=tuple(lm_head),
        ),
        "linear_policy_loss": Call(
            lambda **x: ops.linear_policy_loss(temperature=0.9, **loss, **x),
            lm_head | TOKENS | OLD,
            differentiable=tuple(lm_head),
        ),
        "policy_loss": Call(
            lambda **x: ops.policy_loss(**loss, **x),
            {"logprobs_N": f(3)} | OLD,
            ("ref",),
            ("logprobs_N",),
        ),
    }


CASES = make_cases()
WRITTEN = {
    "rotary_write": ("k_cache_PSKE", "v_cache_PSKE"),
    "adamw": ("param", "low_bits", "exp_avg", "exp_avg_sq"),
}
EVERY = [
    pytest.param(name, impl, marks=needs_cpp if impl == "cpp" else (), id=f"{name}-{impl}")
    for name, call in CASES.items()
    for impl in call.impls
]


def tensors_of(call: Call, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Returns fresh copies; the differentiable ones require a gradient."""
    fresh = {name: x.clone().to(DEVICE) for name, x in call.tensors.items()}
    for name in call.differentiable:
        fresh[name] = fresh[name].to(dtype).requires_grad_()
    return fresh


def run(name: str, impl: str, tensors: dict[str, Tensor]) -> list[Tensor]:
    """Returns the outputs of one call; policy_loss has no `impl`, as it has one implementation."""
    call = CASES[name]
    out = call.run(**tensors) if name == "policy_loss" else call.run(impl=impl, **tensors)
    return [out] if isinstance(out, Tensor) else list(out)


def values_and_gradients(
    name: str, impl: str, function: Callable[..., list[Tensor]]
) -> list[Tensor]:
    """Returns the outputs of a case, and the gradients of their sum."""
    tensors = tensors_of(CASES[name])
    outputs = function(name, impl, tensors)
    leaves = [tensors[key] for key in CASES[name].differentiable]
    scalar = sum(x.sum() for x in outputs if x.requires_grad)
    gradients = torch.autograd.grad(scalar, leaves) if leaves else []
    return [*(x.detach() for x in outputs), *gradients]


class Caught(TorchDispatchMode):
    """Notes the calls of our registered ops that reach the dispatcher below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "socpo_fast":
            copies = tuple(x.detach().clone() if isinstance(x, Tensor) else x for x in args)
            self.calls.append((func, copies))
        return func(*args, **(kwargs or {}))


def caught(name: str, impl: str) -> list[tuple[Any, tuple]]:
    """Returns the registered ops that a case calls, with their arguments."""
    with Caught() as mode:
        values_and_gradients(name, impl, run)
    return mode.calls


def test_every_op_has_a_case() -> None:
    """CASES has every public op, and together they call every registered one."""
    assert set(CASES) == set(ops.available_impls())
    ops_called = {
        func._schema.name for name, call in CASES.items() for func, _ in caught(name, call.impls[0])
    }
    assert ops_called == {
        f"socpo_fast::{name.split('::')[1].split('.')[0]}" for name in LIBRARY._op_defs
    }


@pytest.mark.parametrize(("name", "impl"), EVERY)
def test_opcheck(name: str, impl: str) -> None:
    """opcheck accepts every call, without gradients and, in the forward, with them."""
    for func, args in caught(name, impl):
        torch.library.opcheck(func, args)
        # Backward ops have no derivative, nor has the matmul that linear's backward calls.
        if CASES[name].differentiable and not func._schema.name.endswith(("_backward", "matmul")):
            with_gradient = tuple(
                x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
                for x in args
            )
            torch.library.opcheck(func, with_gradient)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(("name", "impl"), EVERY)
def test_compiles_without_a_graph_break(name: str, impl: str, backend: str) -> None:
    """torch.compile needs one graph and changes nothing but rounding."""
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend=backend)
    for eager, from_compiled in zip(
        *(values_and_gradients(name, impl, function) for function in (run, compiled)), strict=True
    ):
        torch.testing.assert_close(eager, from_compiled, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(("name", "impl"), EVERY)
def test_shapes_are_known_without_values(name: str, impl: str) -> None:
    """Shapes and dtypes are known for fake tensors, and for meta ones, which only auto takes."""
    real = run(name, impl, tensors_of(CASES[name]))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = run(
            name, impl, {key: mode.from_tensor(x) for key, x in tensors_of(CASES[name]).items()}
        )
    meta = run(name, "auto", {key: x.to("meta") for key, x in tensors_of(CASES[name]).items()})
    for outputs in zip(real, fake, meta, strict=True):
        assert len({(x.shape, x.dtype) for x in outputs}) == 1


@needs_cpp
@pytest.mark.parametrize("name", [name for name, call in CASES.items() if call.differentiable])
def test_under_autocast(name: str) -> None:
    """bf16 from a model under autocast may meet fp32 weights.

    Outputs and gradients are near those in fp32.
    """
    call = CASES[name]
    expected = values_and_gradients(name, "auto", run)
    tensors = tensors_of(call)
    first = call.differentiable[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = run(
            name,
            "auto",
            tensors | {first: tensors[first].bfloat16()} if name != "policy_loss" else tensors,
        )
    scalar = sum(x.float().sum() for x in outputs if x.requires_grad)
    gradients = torch.autograd.grad(scalar, [tensors[key] for key in call.differentiable])
    for actual, in_fp32 in zip((*outputs, *gradients), expected, strict=True):
        torch.testing.assert_close(actual.float(), in_fp32, rtol=0.1, atol=0.1, equal_nan=True)


@pytest.mark.parametrize("impl", ["ref", pytest.param("cpp", marks=needs_cpp)])
def test_autocast_halves_what_is_given_only(impl: str) -> None:
    """Autocast changes the inputs of an op only; within it fp32 stays fp32.

    Otherwise log-probs of sampler and trainer would differ.
    """
    hidden = 3 * f(40, 64).bfloat16()
    weight = f(200, 64).bfloat16()
    draws = {key: x[:1].expand(40).contiguous() for key, x in DRAWS.items()}
    heads = 3 * f(30, 3, 64).bfloat16()
    until_T = torch.full((30,), 30, dtype=torch.int32)

    def outputs(dtype: torch.dtype, impl: str) -> list[Tensor]:
        x = hidden.to(dtype)
        w = weight.to(dtype)
        h = heads.to(dtype)
        sampled = ops.linear_sample(x, w, torch.arange(40), **draws, impl="auto")
        logprobs = ops.linear_logprob(x, w, sampled[0], temperature=1.0, impl=impl)[0]
        attended = ops.tree_attention(h, h[:, :1], h[:, 1:2], until_T, scale=0.125, impl="auto")
        return [sampled[0], sampled[1], logprobs, attended]

    truth = outputs(torch.float64, "ref")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        token_ids, *actual = outputs(torch.float32, impl)
    assert torch.equal(token_ids, truth[0])
    for result, expected, tolerance in zip(actual, truth[1:], (1e-4, 1e-4, 5e-2), strict=True):
        torch.testing.assert_close(result.double(), expected.double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("name", "impl"), EVERY)
def test_outputs_can_be_changed_in_place(name: str, impl: str) -> None:
    """Outputs share no memory with inputs, and torch knows of inputs that an op writes to.

    A single output of rms_norm and those of policy_loss are left out.
    """
    tensors = tensors_of(CASES[name])
    old_versions = {key: x._version for key, x in tensors.items()}
    outputs = run(name, impl, tensors)
    # Changing an output that is a view of an input would change the version of the input too.
    if name != "policy_loss" and not (name == "rms_norm" and len(outputs) == 1):
        for x in outputs:
            if x.dim() > 1:
                x.mul_(1)
    written = {key for key, x in tensors.items() if x._version > old_versions[key]}
    assert written == set(WRITTEN.get(name, ()))


@needs_cpp
@pytest.mark.parametrize(
    "name", ["linear", "rms_norm", "swiglu", "linear_policy_loss", "tree_attention"]
)
def test_forward_mode_is_refused(name: str) -> None:
    """Forward-mode differentiation has no derivative here, and says so."""
    tensors = tensors_of(CASES[name])
    key = CASES[name].differentiable[0]
    x = tensors.pop(key).detach()
    with pytest.raises(NotImplementedError, match="no derivative in forward mode"):
        torch.func.jvp(lambda x: run(name, "cpp", tensors | {key: x})[0], (x,), (x,))


@needs_cpp
def test_checkpointing_runs_the_head_once() -> None:
    """Under checkpointing the LM head runs once.

    The forward has computed the gradient already, so the backward need not run it again.
    """
    tensors = tensors_of(CASES["linear_policy_loss"])
    with Caught() as mode:
        outputs = checkpoint(run, "linear_policy_loss", "cpp", tensors, use_reentrant=False)
        tensors["advantages"].mul_(2)  # which the backward must not see
        outputs[0].backward()
    assert len(mode.calls) == 1
