"""Makes problems for the tests of linear_policy_loss, and solves them in two ways.

`materialised` stores all logits at once and calls policy_loss; `fused` calls the op. Read make_case
first.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from socpo_fast.ops import PolicyLoss, available_impls, linear_policy_loss, policy_loss
from tests.helpers.error_rule import assert_error_rule
from tests.helpers.loss_options import gathered

IMPLS = ["ref", *(["cpp"] if "cpp" in available_impls().values() else [])]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "entropy_and_kl": {"entropy_coef": 0.05, "kl_coef": 0.1, "kl_estimator": "k3"},
    "no_dual_clip": {"dual_clip": None, "clip_low": 0.1, "clip_high": 0.3},
}
HEADS: dict[str, dict[str, Any]] = {
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.3},
    "softcap": {"softcap": 2.0},
    "all": {"bias": True, "softcap": 3.0, "logit_scale": 1.7},
}
ALL_IMPLS = [*IMPLS, "triton"]
Leaves = tuple[Tensor, Tensor, Tensor]  # hidden, weight, bias
Solution = tuple[PolicyLoss, Tensor, Tensor]  # with the gradients of hidden and weight


class Case(NamedTuple):
    """Inputs of one call in fp64.

    bf16 holds hidden and weight exactly, so every dtype computes on the same numbers.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    rows: Tensor
    temperature: Tensor
    old: Tensor
    advantages: Tensor  # per attempt, the last one exactly 0
    attempt_of_token: Tensor
    weights: Tensor  # about a quarter 0
    ref: Tensor


def make_case(
    num_tokens: int = 37, num_rows: int = 53, vocab: int = 97, width: int = 16, peak: float = 4.0
) -> Case:
    """Returns prime sizes, peaked logits and ratios on both sides of the clips.

    Some log-probs are near 0 and some far below.
    """
    rng = torch.Generator().manual_seed(num_tokens * 1000 + num_rows)
    hidden = torch.randn(num_tokens, width, generator=rng)
    weight = torch.randn(vocab, width, generator=rng)
    rows = (
        torch.randint(num_tokens, (num_rows,), generator=rng)
        if num_tokens
        else torch.zeros(0, dtype=torch.int64)
    )
    logits = hidden[rows] @ weight.T * (peak / width**0.5)
    most_likely = logits.argmax(-1)
    targets = torch.where(
        torch.rand(num_rows, generator=rng) < 0.5,
        most_likely,
        torch.randint(vocab, (num_rows,), generator=rng),
    )
    temperature = 0.5 + torch.rand(num_rows, generator=rng)
    logprobs = (logits / temperature[:, None]).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    case = Case(
        hidden=(hidden * (peak / width**0.5)).bfloat16(),
        weight=weight.bfloat16(),
        targets=targets,
        rows=rows,
        temperature=temperature,
        old=logprobs + 0.5 * torch.randn(num_rows, generator=rng),
        advantages=torch.tensor([1.5, -0.7, -2.0, 0.0]),
        attempt_of_token=torch.arange(num_rows) % 4,
        weights=torch.rand(num_rows, generator=rng)
        * (torch.rand(num_rows, generator=rng) < 0.75)
        / max(1, num_rows),
        ref=logprobs + 0.5 * torch.randn(num_rows, generator=rng),
    )
    return Case(*(x.double() if x.is_floating_point() else x for x in case))


def materialised(case: Case, dtype: torch.dtype, **options: Any) -> Solution:
    """Solves the case with all logits at once, then policy_loss; also returns both gradients."""
    hidden, weight = (x.to(dtype, copy=True).requires_grad_() for x in (case.hidden, case.weight))
    wide = torch.promote_types(dtype, torch.float32)
    log_softmax = (
        (hidden[case.rows] @ weight.T).to(wide) / case.temperature.to(wide)[:, None]
    ).log_softmax(-1)
    finite = log_softmax.masked_fill(log_softmax == -torch.inf, 0.0)
    result = policy_loss(
        log_softmax.gather(1, case.targets[:, None])[:, 0],
        case.old.to(wide),
        case.advantages.to(wide),
        case.attempt_of_token,
        weights_N=case.weights.to(wide),
        entropy_N=-(log_softmax.exp() * finite).sum(-1),
        ref_logprobs_N=case.ref.to(wide),
        **gathered(options),
    )
    result.loss.backward()
    return result, hidden.grad, weight.grad


def fused(case: Case, dtype: torch.dtype, **options: Any) -> Solution:
    """Solves the case with the op; returns the same as `materialised`."""
    hidden, weight = (x.to(dtype, copy=True).requires_grad_() for x in (case.hidden, case.weight))
    result = call(case, hidden, weight, **options)
    result.loss.backward()
    return result, hidden.grad, weight.grad


def call(case: Case, hidden: Tensor, weight: Tensor, **options: Any) -> PolicyLoss:
    """Calls the op on these leaves in place of the case's hidden and weight."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return linear_policy_loss(
        hidden,
        weight,
        case.targets,
        case.old.to(wide),
        case.advantages.to(wide),
        case.attempt_of_token,
        temperature=case.temperature.to(wide),
        rows_N=case.rows,
        weights_N=case.weights.to(wide),
        ref_logprobs_N=case.ref.to(wide),
        **gathered(options),
    )


def assert_as_right_as_plain(
    case: Case, dtype: torch.dtype, impl: str, workspace_mib: float = 256.0, **options: Any
) -> Solution:
    """Asserts the error rule for every output and both gradients.

    Each is scaled to at most 1, where the rule's tolerance belongs.
    """
    truth = materialised(case, torch.float64, **options)
    plain = materialised(case, dtype, **options)
    actual = fused(case, dtype, metrics="all", impl=impl, workspace_mib=workspace_mib, **options)
    for name in (*PolicyLoss._fields, "hidden.grad", "weight.grad"):
        values = [output(solution, name) for solution in (actual, plain, truth)]
        size = values[2][values[2].isfinite()].abs().max().item() if values[2].numel() else 0.0
        assert_error_rule(*(x.double() / max(1.0, size) for x in values), name=name, dtype=dtype)
    assert actual[1].dtype == actual[2].dtype == dtype
    return actual


def output(solution: Solution, name: str) -> Tensor:
    """Returns a field of PolicyLoss, or a gradient."""
    gradients = {"hidden.grad": solution[1], "weight.grad": solution[2]}
    return gradients[name] if name in gradients else getattr(solution[0], name)


def shapes_inside(run: Callable[[], object]) -> list[tuple[str, list[list[int]]]]:
    """Returns name and input shapes of each op that runs, also inside registered ops."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        run()
    return [(event.name, event.input_shapes) for event in profiled.events() if event.input_shapes]


def leaves_of(case: Case, dtype: torch.dtype) -> Leaves:
    """Returns hidden, weight and a bias, all of which bf16 holds exactly, as leaves."""
    bias = torch.randn(case.weight.shape[0], generator=torch.Generator().manual_seed(2)).bfloat16()
    leaves = case.hidden, case.weight, bias
    hidden, weight, bias = (x.to(dtype, copy=True).requires_grad_() for x in leaves)
    return hidden, weight, bias


def head_of(settings: dict[str, Any], leaves: Leaves) -> dict[str, Any]:
    """Returns the settings of one of HEADS, with the leaf as its bias."""
    return {name: leaves[2] if name == "bias" else value for name, value in settings.items()}


def plain_logprob(
    case: Case,
    leaves: Leaves,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Computes the docstring's formula over all logits at once."""
    wide = torch.promote_types(leaves[0].dtype, torch.float32)
    logits = (leaves[0][case.rows] @ leaves[1].T).to(wide)
    logits = logit_scale * (logits if bias is None else logits + bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    log_softmax = (logits / case.temperature.to(wide)[:, None]).log_softmax(-1)
    logprobs = log_softmax.gather(1, case.targets[:, None])[:, 0]
    return logprobs, -(log_softmax.exp() * log_softmax).sum(-1)


def loss_arguments(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the arguments of the loss, in the dtype that the logits are held in."""
    wide = torch.promote_types(dtype, torch.float32)
    return {
        "old_logprobs_N": case.old.to(wide),
        "advantages": case.advantages.to(wide),
        "attempt_of_token_N": case.attempt_of_token,
        "weights_N": case.weights.to(wide),
        "ref_logprobs_N": case.ref.to(wide),
    }


def solve(
    case: Case,
    dtype: torch.dtype,
    settings: dict[str, Any],
    impl: str | None,
    **options: Any,
) -> dict[str, Tensor]:
    """Returns outputs and gradients of the loss; impl None solves it by the plain formula."""
    leaves = leaves_of(case, dtype)
    arguments = loss_arguments(case, dtype) | gathered(options)
    settings = head_of(settings, leaves)
    wide = arguments["weights_N"].dtype
    if impl is None:
        logprobs, entropy = plain_logprob(case, leaves, **settings)
        result = policy_loss(logprobs, entropy_N=entropy, **arguments)
    else:
        settings |= {"bias_V": settings.pop("bias")} if "bias" in settings else {}
        call_settings = {
            "temperature": case.temperature.to(wide),
            "rows_N": case.rows,
            "metrics": "all",
            "impl": impl,
        }
        call_settings |= {"workspace_mib": 1e-6}  # chunks of 16 rows
        result = linear_policy_loss(
            *leaves[:2], case.targets, **arguments, **settings, **call_settings
        )
    (3 * result.loss).backward()
    gradients = zip(("dX", "dW", "dbias"), (x.grad for x in leaves), strict=True)
    return result._asdict() | {name: x for name, x in gradients if x is not None}


def without(case: Case, left_out: Tensor) -> Case:
    """Returns the case without the rows that left_out marks."""
    by_row = ("targets", "rows", "temperature", "old", "attempt_of_token", "weights", "ref")
    return case._replace(**{name: getattr(case, name)[~left_out] for name in by_row})


def keep_all(_: Tensor, *by_row: Tensor | None) -> list[Tensor | None]:
    """Keeps all rows, as keep_rows does on a card.

    There the host would have to wait for the number of wanted rows, so none are dropped.
    """
    return [x if x is None else x.contiguous() for x in by_row]
