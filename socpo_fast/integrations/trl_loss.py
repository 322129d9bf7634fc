"""Computes TRL's clipped losses with our op, inside the model's own forward.

Read add_policy_head, then fused_loss. DDP and FSDP gather weights and reduce gradients in hooks
around a module's forward. So head and loss must run in there, not behind it.

Departures from TRL's loss: log ratios are clamped to 20 nats, so that a ratio stays finite; and a
head that FSDP2 shards by itself gets the mean gradient of all ranks, where TRL 1.16 leaves each
shard with the gradient of its own rank's rows. TRL itself is not imported here.
"""

import functools
import math
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from socpo_fast.ops._checks import is_sharded
from socpo_fast.ops.linear_policy_loss import linear_policy_loss
from socpo_fast.ops.policy_loss import PolicyLoss, PolicyLossOptions

PolicyHead = Callable[[Tensor, Tensor, Tensor | None], PolicyLoss]


def add_policy_head(model: Any) -> None:
    """Patches a causal language model: model(.., policy_head=f) returns what f returns.

        f(hidden_BLD, weight_VD, bias_V)     the last hidden states, and the LM head

    Without policy_head the forward is what it was, so generation is not changed. f brings its own
    tensors, because FSDP may cast the tensors among a forward's arguments to bf16.
    """
    original_forward = model.forward

    # generate() checks its arguments against the signature, which must stay.
    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, policy_head: PolicyHead | None = None, **kwargs: Any) -> Any:
        if policy_head is None:
            return original_forward(*args, **kwargs)
        kwargs.pop("labels", None)  # PEFT passes all that a forward may take
        # Looked up in each call, since wrappers replace parts of a model.
        hidden_BLD = self.base_model(*args, **kwargs, use_cache=False).last_hidden_state
        lm_head = self.get_output_embeddings()
        bias_V = None if lm_head.bias is None else _whole(lm_head.bias)
        return policy_head(hidden_BLD, _whole(lm_head.weight), bias_V)

    model.forward = MethodType(forward, model)


def fused_loss(trainer: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
    """Returns the loss of a microbatch, and logs the metrics that TRL's own loss logs.

    Args:
        trainer: a GRPOTrainer whose options trl_checks.py has let pass.
        model:   its model, wrapped or not, with a policy head.
        inputs:  its microbatch: prompt_ids and prompt_mask [B, P]; completion_ids,
                 completion_mask, tool_mask and advantages [B, C]; num_items_in_batch; and, if
                 there are any, old_per_token_logps, ref_per_token_logps [B, C] and
                 importance_sampling_ratio [B, C] or [B, 1].

    Returns:
        scalar, of this rank; ranks and accumulation steps are averaged and summed by TRL.
    """
    token_ids_BL = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask_BC = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
    num_columns = mask_BC.shape[1]

    def of_loss_tokens(name: str) -> Any:
        return inputs[name][mask_BC] if name in inputs else None

    def policy_head(hidden_BLD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> PolicyLoss:
        # A token is predicted by the row before it. Counted from the end, since an adapter may have
        # put rows of its own before the prompt.
        rows_BL = torch.arange(hidden_BLD.shape[:2].numel(), device=mask_BC.device)
        rows_BC = rows_BL.view(hidden_BLD.shape[:2])[:, -num_columns - 1 : -1]
        return linear_policy_loss(
            hidden_BLD.flatten(0, 1),
            weight_VD,
            of_loss_tokens("completion_ids"),
            of_loss_tokens("old_per_token_logps"),
            of_loss_tokens("advantages"),
            rows_N=rows_BC[mask_BC],
            weights_N=_weights(trainer, inputs, mask_BC)[mask_BC],
            ref_logprobs_N=of_loss_tokens("ref_per_token_logps"),
            bias_V=bias_V,
            temperature=trainer.temperature,
            metrics="all",  # TRL's entropy is that of all loss tokens
            options=PolicyLossOptions(
                clip_low=trainer.epsilon_low,
                clip_high=trainer.epsilon_high,
                dual_clip=None,
                kl_coef=trainer.beta,
            ),
        )

    with trainer.accelerator.autocast():
        outcome = model(
            input_ids=token_ids_BL,
            attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            policy_head=policy_head,
        )
    _log(
        trainer,
        outcome,
        of_loss_tokens("advantages"),
        of_loss_tokens("ref_per_token_logps"),
        mask_BC,
    )
    return outcome.loss


def _whole(weight: Any) -> Tensor:
    """Returns the full tensor of FSDP2's shard of a head, whose gradient is the mean over ranks."""
    if not is_sharded(weight):
        return weight
    from torch.distributed.tensor import Partial

    num_ranks = weight.device_mesh.size()
    # Each rank has the gradient of its own rows, so the whole gradient is their sum.
    full: Tensor = weight.full_tensor(grad_placements=[Partial()] * weight.device_mesh.ndim)
    if full.requires_grad:
        full.register_hook(lambda grad: grad / num_ranks)
    return full


def _weights(trainer: Any, inputs: dict[str, Any], mask_BC: Tensor) -> Tensor:
    """Returns [B, C] fp32: the weight of each token, by args.loss_type."""
    is_training = trainer.model.training
    num_steps = trainer.current_gradient_accumulation_steps if is_training else 1
    num_rows = len(mask_BC)
    num_tokens_B1 = mask_BC.sum(dim=1, keepdim=True)
    # num_items_in_batch counts the loss tokens of all ranks and all steps of a generation.
    num_items = inputs["num_items_in_batch"].clamp(min=1) / trainer.accelerator.num_processes
    share_of_step = num_steps / trainer.args.steps_per_generation if is_training else 1
    norms = {
        "grpo": num_rows * num_tokens_B1.clamp(min=1) * num_steps,
        "bnpo": num_tokens_B1.sum().clamp(min=1) * num_steps,
        "dr_grpo": num_rows * trainer.max_completion_length * num_steps,
        "dapo": num_items * share_of_step,
    }
    # vLLM's sampler is not the trainer, so TRL weighs its tokens.
    ratio = inputs.get("importance_sampling_ratio", 1.0)
    return torch.ones_like(mask_BC, dtype=torch.float32) * ratio / norms[trainer.loss_type]


def _log(
    trainer: Any,
    outcome: PolicyLoss,
    advantages_N: Tensor,
    ref_logprobs_N: Tensor | None,
    mask_BC: Tensor,
) -> None:
    """Logs entropy, KL and shares of clipped tokens under TRL's names, over all ranks."""
    metrics = trainer._metrics["train" if trainer.model.training else "eval"]
    is_low_N = (outcome.ratio < 1 - trainer.epsilon_low) & (advantages_N < 0)
    is_high_N = (outcome.ratio > 1 + trainer.epsilon_high) & (advantages_N > 0)
    columns = {
        "entropy": outcome.entropy,
        "clip_ratio/low_mean": is_low_N,
        "clip_ratio/high_mean": is_high_N,
        "clip_ratio/region_mean": is_low_N | is_high_N,
    }
    if ref_logprobs_N is not None:
        d_N = ref_logprobs_N - outcome.logprobs
        columns["kl"] = torch.expm1(d_N) - d_N
    sums = [column_N.float().sum() for column_N in columns.values()]
    totals = trainer.accelerator.reduce(torch.stack([*sums, mask_BC.sum()]), reduction="sum")
    *totals, num_tokens = totals.tolist()
    for name, total in zip(columns, totals, strict=True):
        metrics[name].append(total / max(num_tokens, 1))
    for name, is_clipped_N, extreme in (
        ("clip_ratio/low_min", is_low_N, torch.amin),
        ("clip_ratio/high_max", is_high_N, torch.amax),
    ):
        count_B = mask_BC.float().masked_scatter(mask_BC, is_clipped_N.float()).sum(1)
        share_B = trainer.accelerator.gather(count_B / mask_BC.sum(1))
        share_B = share_B[~share_B.isnan()]  # a row without loss tokens has no share
        metrics[name].append(extreme(share_B).item() if len(share_B) else math.nan)
