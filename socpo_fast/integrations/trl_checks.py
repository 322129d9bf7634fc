"""Says which of TRL's options SocraticGRPOTrainer takes, and reads a row of TRL's data.

Every refusal names the option, its value and what to do. TRL itself is not imported here.
"""

from typing import Any

from accelerate.utils import is_peft_model

from socpo_fast.ops._checks import check_rule, check_word
from socpo_fast.socratic.episode import RolloutOptions
from socpo_fast.types import Question

WHERE = "SocraticGRPOTrainer"
GENERATIONS = ("engine", "trl")
LOSSES = ("fused", "trl")
FUSED_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")
# Arguments of GRPOTrainer that we have an argument of our own for, or no use.
NOT_TAKEN = {
    "reward_funcs": "give it as grader=",
    "rollout_func": "leave it out; the rollouts are SocraticPO's",
    "tools": "leave it out; there are no tool calls",
    "environment_factory": "leave it out; there are no tool calls",
}
# Fields of GRPOConfig -> the only value that can be had.
CREDIT_FIELDS = {"scale_rewards": "group", "multi_objective_aggregation": "sum_then_normalize"}
ENGINE_FIELDS = {
    "repetition_penalty": 1.0,
    "generation_kwargs": None,
    "fsdp": None,
    "deepspeed": None,
}
FUSED_FIELDS = {
    "delta": None,
    "importance_sampling_level": "token",
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "cast_lm_head_to_fp32": False,
}
# Fields of a model's config by which some families scale or bound their logits.
LOGIT_FIELDS = (
    "final_logit_softcapping",
    "logit_scale",
    "output_multiplier",
    "lm_head_multiplier",
    "logits_scaling",
)


def check_arguments(
    model: Any,
    args: Any,
    trl_arguments: dict[str, Any],
    options: RolloutOptions,
    generation: str,
    loss: str,
) -> None:
    """Refuses arguments of SocraticGRPOTrainer, before TRL loads anything."""
    check_word(WHERE, "generation", generation, GENERATIONS)
    check_word(WHERE, "loss", loss, LOSSES)
    for name, advice in NOT_TAKEN.items():
        value = trl_arguments.get(name)
        check_rule(WHERE, name, value, value is None, "left out", advice)
    _check_fields(args, CREDIT_FIELDS, "with credit=CreditOptions(..)", "set it there")
    known = {"enable_thinking"}
    kwargs = args.chat_template_kwargs or {}
    check_rule(
        WHERE, "args.chat_template_kwargs", kwargs, kwargs.keys() <= known, f"one of {known} only"
    )
    # TRL would mask a whole rollout for its last attempt.
    masks = {"mask_truncated_completions": False}
    _check_fields(args, masks, "since a row is a whole rollout", "turn it off")
    _check_options(options, args)
    if generation == "engine":
        _check_engine(model, args, trl_arguments)
    if loss == "fused":
        _check_fused(args)


def check_trainer(trainer: Any, generation: str, loss: str) -> None:
    """Refuses what is known only once TRL's own constructor has run."""
    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    check_rule(
        WHERE,
        "model",
        "FSDP or DeepSpeed",
        not (is_sharded and generation == "engine"),
        "whole on each rank for generation='engine'",
        "use generation='trl'",
    )
    check_rule(
        WHERE,
        "processing_class",
        type(trainer.processing_class).__name__,
        not trainer._is_vlm,
        "a tokenizer, since a question is text",
    )
    if loss == "trl":
        return
    check_rule(
        WHERE,
        "DeepSpeed ZeRO-3",
        "on",
        not trainer._dist.is_zero3,
        "off for loss='fused'",
        "use loss='trl'",
    )
    check_rule(
        WHERE,
        "router_aux_loss_coef",
        trainer.router_aux_loss_coef,
        not trainer.aux_loss_enabled,
        "0 for loss='fused'",
        "use loss='trl'",
    )
    config = trainer.model.config.get_text_config().to_dict()
    for name in LOGIT_FIELDS:
        value = config.get(name)
        check_rule(
            WHERE,
            f"model.config.{name}",
            value,
            value in (None, 1.0),
            "none for loss='fused'",
            "use loss='trl'",
        )


def question_of_row(row: dict[str, Any], question_idx: int) -> Question:
    """Returns the question of a row of TRL's data set."""
    messages = row["prompt"]
    is_chat = isinstance(messages, list) and all(
        isinstance(message.get("content"), str) for message in messages
    )
    check_rule(WHERE, "prompt", messages, is_chat, "messages whose content is text")
    check_rule(
        WHERE,
        "prompt",
        messages,
        any(message["role"] == "user" for message in messages),
        "messages with a user's, which the teacher sees",
    )
    truth = row.get("ground_truth")
    check_rule(
        WHERE,
        "ground_truth",
        truth,
        isinstance(truth, str),
        "a column of text",
        "add it, and leave args.remove_unused_columns False",
    )
    return Question(
        question_idx=question_idx,
        messages=tuple(messages),
        ground_truth=row["ground_truth"],
        data_source=row.get("data_source") or "",
        reference_solution=row.get("reference_solution"),
    )


def _check_fields(args: Any, fields: dict[str, Any], when: str, advice: str) -> None:
    """Refuses fields of GRPOConfig that have another value than the given one."""
    for name, expected in fields.items():
        value = getattr(args, name)
        holds = value == expected or (expected is None and not value)
        check_rule(WHERE, f"args.{name}", value, holds, f"{expected!r} {when}", advice)


def _check_options(options: RolloutOptions, args: Any) -> None:
    """Refuses options of rollouts that do not fit TRL's rows."""
    check_rule(
        WHERE,
        "options.group_size",
        options.group_size,
        options.group_size == args.num_generations,
        f"args.num_generations {args.num_generations}",
    )
    # A row is one sequence: what the next attempt does not see of an earlier one has no place.
    check_rule(
        WHERE,
        "options.attempt_limit",
        options.attempt_limit,
        options.attempt_limit >= args.max_completion_length,
        f"at least args.max_completion_length {args.max_completion_length}, since a row of TRL "
        "holds no cut attempt",
        "raise it",
    )
    check_rule(
        WHERE,
        "options.context",
        options.context,
        options.context == "tokens",
        "'tokens', since a row of TRL holds no rewritten attempt",
    )


def _check_engine(model: Any, args: Any, trl_arguments: dict[str, Any]) -> None:
    """Refuses what our engine cannot generate with."""
    has_adapter = trl_arguments.get("peft_config") is not None or is_peft_model(model)
    check_rule(
        WHERE,
        "model",
        "one with an adapter (PEFT)",
        not has_adapter,
        "without an adapter for generation='engine'",
        "use generation='trl', or merge the adapter",
    )
    _check_fields(args, ENGINE_FIELDS, "for generation='engine'", "use generation='trl'")


def _check_fused(args: Any) -> None:
    """Refuses losses that our op does not compute."""
    when = "for loss='fused'"
    advice = "use loss='trl'"
    check_rule(
        WHERE,
        "args.loss_type",
        args.loss_type,
        args.loss_type in FUSED_LOSS_TYPES,
        f"one of {', '.join(FUSED_LOSS_TYPES)} {when}",
        advice,
    )
    _check_fields(args, FUSED_FIELDS, when, advice)
    if args.beta == 0:
        return
    # TRL multiplies its KL by the ratio, but not by vLLM's weight; our op does it the other way.
    is_corrected = args.use_vllm and args.vllm_importance_sampling_correction
    for name, value in (
        ("use_bias_correction_kl", args.use_bias_correction_kl),
        ("vllm_importance_sampling_correction", is_corrected),
    ):
        check_rule(WHERE, f"args.{name}", value, not value, f"False {when} with beta", advice)
