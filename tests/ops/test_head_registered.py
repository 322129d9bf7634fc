"""Checks the LM-head ops as torch sees them.

That is opcheck, torch.compile, tensors without values, autocast and DTensor.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from socpo_fast.ops import (
    PolicyLoss,
    available_impls,
    linear_logprob,
    linear_policy_loss,
    policy_loss,
)
from tests.helpers.loss_options import gathered

pytestmark = pytest.mark.skipif(
    "cpp" not in available_impls().values(), reason="extension not built"
)

# Options of the loss. Arguments that can be given in several ways occur in each of them.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "terms": {"entropy_coef": 0.1, "kl_coef": 0.2, "softcap": 3.0, "logit_scale": 1.3},
    "none": {"temperature": 0.7, "rows_N": None, "old_logprobs_N": None, "bias_V": None},
    "tis": {"tis_clip": 1.1, "metrics": "all", "logit_scale": 0.5},
    "weights": {
        "attempt_of_token_N": None,
        "num_loss_tokens": 7,
        "weights_N": None,
        "kl_coef": 0.1,
    },
}
Inputs = dict[str, Any]
LEAVES = "hidden_TD", "weight_VD", "bias_V"


def make_inputs(**options: Any) -> Inputs:
    """Returns eleven rows in fp64; one has no target, others have weight or advantage 0."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    inputs = {
        "hidden_TD": normal(11, 5),
        "weight_VD": normal(13, 5),
        "bias_V": normal(13),
        "targets_N": torch.randint(13, (11,), generator=rng).index_fill(0, torch.tensor([3]), -100),
        "rows_N": torch.randint(11, (11,), generator=rng),
        "temperature": normal(11).abs() + 0.5,
        "old_logprobs_N": -normal(11).abs(),
        "attempt_of_token_N": torch.arange(11) % 3,
        "weights_N": normal(11).abs() * (torch.arange(11) % 4 != 0),
        "ref_logprobs_N": -normal(11).abs(),
        "sampler_logprobs_N": -normal(11).abs(),
    }
    by_token = "attempt_of_token_N" in options
    inputs["advantages"] = normal(11) if by_token else torch.tensor([1.5, -0.7, 0.0]).double()
    return inputs | options


def changed(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """Returns the inputs with `change` applied to every tensor."""
    return {name: change(x) if isinstance(x, Tensor) else x for name, x in inputs.items()}


def leaves_of(inputs: Inputs, names: tuple[str, ...]) -> Inputs:
    """Returns copies of some inputs that require a gradient."""
    chosen = {name: inputs[name] for name in names if inputs[name] is not None}
    return changed(chosen, lambda x: x.detach().clone().requires_grad_())


def loss_of(inputs: Inputs, impl: str) -> PolicyLoss:
    """Calls the fused op."""
    return linear_policy_loss(**gathered(inputs), impl=impl)


def logprobs_of(inputs: Inputs, impl: str) -> PolicyLoss:
    """Calls linear_logprob, then policy_loss.

    The outputs have the form of the fused op's, so that both can be compared.
    """
    names = (
        "hidden_TD",
        "weight_VD",
        "targets_N",
        "rows_N",
        "temperature",
        "bias_V",
        "softcap",
        "logit_scale",
    )
    head_inputs = {name: inputs[name] for name in names if name in inputs}
    logprobs_N, entropy_N = linear_logprob(**head_inputs, entropy_grad=True, impl=impl)
    loss_inputs = {name: x for name, x in inputs.items() if name not in (*head_inputs, "metrics")}
    weights_N = loss_inputs.pop("weights_N")
    if weights_N is None:
        weights_N = torch.full_like(logprobs_N, 1 / loss_inputs.pop("num_loss_tokens")).detach()
    loss_inputs["weights_N"] = weights_N.where(inputs["targets_N"] != -100, 0)
    return policy_loss(logprobs_N, entropy_N=entropy_N, **gathered(loss_inputs))


def solve(op: Any, inputs: Inputs) -> list[Tensor]:
    """Returns all outputs, and the gradients of three times the loss."""
    leaves = leaves_of(inputs, LEAVES)
    result = op(inputs | leaves)
    (3 * result.loss).backward()
    return [x.detach() for x in result] + [x.grad for x in leaves.values()]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("impl", ["cpp", "ref"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("op", [loss_of, logprobs_of])
def test_compiles_as_one_graph(op: Any, options: dict[str, Any], impl: str, backend: str) -> None:
    """torch.compile needs one graph and changes nothing but rounding."""
    inputs = make_inputs(**options)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda call_inputs: op(call_inputs, impl), fullgraph=True, backend=backend
    )
    torch.testing.assert_close(
        solve(compiled, inputs),
        solve(lambda x: op(x, impl), inputs),
        equal_nan=True,
    )


@pytest.mark.parametrize("impl", ["cpp", "ref", "meta"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("op", [loss_of, logprobs_of])
def test_tensors_without_values(op: Any, options: dict[str, Any], impl: str) -> None:
    """Shapes and dtypes are known for fake and meta tensors."""
    inputs = make_inputs(**options)
    expected = solve(lambda x: op(x, "auto"), inputs)
    if impl == "meta":
        moved = changed(inputs, lambda x: x.to("meta"))
        actual = solve(lambda x: op(x, "auto"), moved)
    else:
        with FakeTensorMode() as mode:
            fake = changed(inputs, mode.from_tensor)
            actual = solve(lambda x: op(x, impl), fake)
    assert [(x.shape, x.dtype) for x in actual] == [(x.shape, x.dtype) for x in expected]


@pytest.mark.parametrize("impl", ["cpp", "triton"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_opcheck(options: dict[str, Any], impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """opcheck accepts the calls that the public functions make, with and without gradients.

    All rows have a loss here, as opcheck takes a NaN to differ from itself.
    """
    calls: list[tuple[Any, tuple]] = []
    for name, stem in (
        ("linear_policy_loss", "_fused_policy_loss"),
        ("linear_logprob", "linear_logprob"),
    ):
        module = sys.modules[f"socpo_fast.ops.{stem}"]
        op = getattr(module, f"{name}_op")
        monkeypatch.setattr(
            module,
            f"{name}_op",
            lambda *args, op=op: calls.append((op, args)) or op(*args),
        )
    inputs = make_inputs(**options)
    # Every row gets a target, a weight and an advantage, so that nothing is NaN.
    inputs["targets_N"] = inputs["targets_N"].clamp(min=0)
    for name in ("weights_N", "advantages"):
        inputs[name] = None if inputs[name] is None else inputs[name] + 0.1
    for needed in ((), ("hidden_TD",), LEAVES):
        leaves = leaves_of(inputs, needed)
        for op in (loss_of, logprobs_of):
            op(inputs | leaves, impl)
    assert len(calls) == 6
    for op, args in calls:
        torch.library.opcheck(op, args)


@pytest.mark.parametrize("impl", ["cpp", "triton"])
def test_opcheck_of_the_logprobs_backward(impl: str) -> None:
    inputs = make_inputs()
    row = inputs["old_logprobs_N"]
    head_inputs = (inputs[name] for name in (*LEAVES, "rows_N", "targets_N", "temperature"))
    saved = (*head_inputs, row.abs() + 3)
    for tail in (
        (row, row, 0.5, None, True, True, True),
        (None, None, None, 0.1, False, True, False),
    ):
        grad_entropy, *flags = tail
        args = (row, grad_entropy, *saved, *flags, impl)
        torch.library.opcheck(torch.ops.socpo_fast.linear_logprob_backward.default, args)


@pytest.mark.parametrize("impl", ["cpp", "ref"])
def test_outputs_share_no_memory(impl: str) -> None:
    """Outputs share no memory with inputs or each other, and gradients are handed out once."""
    inputs = make_inputs()
    leaves = leaves_of(inputs, LEAVES)
    inputs |= leaves
    result = loss_of(inputs, impl)
    first = torch.autograd.grad(result.loss, leaves.values(), retain_graph=True)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(2 * result.loss, leaves.values())
    torch.testing.assert_close(list(first), kept, rtol=0, atol=0)
    torch.testing.assert_close(list(second), [2 * x for x in kept], rtol=1e-14, atol=0)
    tensors = *first, *second, *leaves.values(), *logprobs_of(inputs, impl)
    storages = [x.untyped_storage().data_ptr() for x in tensors]
    assert len(set(storages)) >= len(storages) - 1  # policy_loss hands its log-probs through


@pytest.mark.parametrize("impl", ["cpp", "ref", "triton"])
def test_autocast(impl: str) -> None:
    """Under autocast fp32 weights and bf16 hidden states compute in bf16.

    Gradients come back in the dtype of each leaf.
    """
    inputs = changed(make_inputs(), lambda x: x.float() if x.is_floating_point() else x)
    inputs["hidden_TD"] = inputs["hidden_TD"].bfloat16()
    in_bf16 = inputs | {name: inputs[name].bfloat16() for name in ("weight_VD", "bias_V")}
    for op in (loss_of, logprobs_of):
        expected = solve(lambda x, op=op: op(x, impl), in_bf16)
        in_autocast = torch.autocast("cpu", dtype=torch.bfloat16)(lambda x, op=op: op(x, impl))
        actual = solve(in_autocast, inputs)
        torch.testing.assert_close(
            actual,
            expected,
            equal_nan=True,
            check_dtype=False,
            rtol=1e-6,
            atol=1e-6,
        )
        assert [x.dtype for x in actual[-3:]] == [torch.bfloat16, torch.float32, torch.float32]
    with pytest.raises(ValueError, match=r"weight_VD must be bfloat16 \[V, D=5\], got float32"):
        loss_of(inputs, impl)


DTENSOR = """
import sys, torch, torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
from tests.ops.test_head_registered import logprobs_of, loss_of, make_inputs
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
for op in (loss_of, logprobs_of):
    for impl in ("cpp", "ref"):
        gradients = []
        for is_sharded in (True, False):
            inputs = make_inputs()
            for name in ("weight_VD", "bias_V"):
                if is_sharded:
                    inputs[name] = distribute_tensor(inputs[name], mesh, [Shard(0)])
                inputs[name].requires_grad_()
            op(inputs, impl).loss.backward()
            gradients.append([inputs[name].grad for name in ("weight_VD", "bias_V")])
        for ours, plain in zip(*gradients, strict=True):
            assert isinstance(ours, DTensor) and torch.equal(ours.full_tensor(), plain)
        inputs["hidden_TD"] = distribute_tensor(inputs["hidden_TD"], mesh, [Shard(0)])
        try:
            op(inputs, impl)
        except ValueError as error:
            print(error)
dist.destroy_process_group()
"""


def test_weights_may_be_dtensors(tmp_path: Path) -> None:
    """Sharded weights are gathered, and their gradient arrives at the shards.

    A hidden state that is sharded is refused.
    """
    command = [sys.executable, "-c", DTENSOR, str(tmp_path / "store")]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    refused = "hidden_TD must be a whole tensor, got a DTensor"
    # torch 2.10 prints of its connections, too.
    lines = [line for line in done.stdout.splitlines() if not line.startswith("[Gloo]")]
    assert [line.partition(",")[0] + ", got a DTensor" for line in lines] == [
        *[f"linear_policy_loss: {refused}"] * 2,
        *[f"linear_logprob: {refused}"] * 2,
    ]
