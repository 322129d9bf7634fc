"""Says which of TRL's options SocraticGRPOTrainer takes, and reads a row of TRL's data.

Every refusal names the option, its value and what to do. TRL itself is not imported here.
"""

from typing import Any

from accelerate.utils import is_peft_model

from socpo_fast.ops._checks import check_rule, check_word
from socpo_fast.socratic.episode import RolloutOptions
from socpo_fast.socratic.question_rows import Columns, to_question
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
# Columns of TRL's data sets that make a question.
COLUMNS = Columns(
    question="prompt", ground_truth="ground_truth", reference_solution="reference_solution"
)
# Fields of GRPOConfig -> the only value that can be had; why or when, and what to do.
FIELDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "credit": (
        "with credit=CreditOptions(..)",
        "set it there",
        {"scale_rewards": "group", "multi_objective_aggregation": "sum_then_normalize"},
    ),
    # TRL would mask a whole rollout for its last attempt.
    "rows": (
        "since a row is a whole rollout",
        "turn it off",
        {"mask_truncated_completions": False},
    ),
    "engine": (
        "for generation='engine'",
        "use generation='trl'",
        {
            "repetition_penalty": 1.0,
            "generation_kwargs": None,
            "fsdp": None,
            "deepspeed": None,
        },
    ),
    "fused": (
        "for loss='fused'",
        "use loss='trl'",
        {
            "delta": None,
            "importance_sampling_level": "token",
            "top_entropy_quantile": 1.0,
            "off_policy_mask_threshold": None,
            "entropy_coef": 0.0,
            "use_adaptive_entropy": False,
            "cast_lm_head_to_fp32": False,
        },
    ),
    "trl": ("", "", {}),  # TRL's own generation or loss takes all of its options
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
    for kind in ("credit", "rows", generation, loss):
        when, advice, fields = FIELDS[kind]
        for name, expected in fields.items():
            value = getattr(args, name)
            holds = value == expected or (expected is None and not value)
            check_rule(WHERE, f"args.{name}", value, holds, f"{expected!r} {when}", advice)
    known = {"enable_thinking"}
    kwargs = args.chat_template_kwargs or {}
    has_adapter = trl_arguments.get("peft_config") is not None or is_peft_model(model)
    # TRL multiplies its KL by the ratio, but not by vLLM's weight; our op does it the other way.
    is_corrected = args.use_vllm and args.vllm_importance_sampling_correction
    has_fused_kl = loss == "fused" and args.beta != 0
    _check(
        ("args.chat_template_kwargs", kwargs, kwargs.keys() <= known, f"one of {known} only", ""),
        (
            "options.group_size",
            options.group_size,
            options.group_size == args.num_generations,
            f"args.num_generations {args.num_generations}",
            "",
        ),
        # A row is one sequence: what the next attempt does not see of an earlier one has no place.
        (
            "options.attempt_limit",
            options.attempt_limit,
            options.attempt_limit >= args.max_completion_length,
            f"at least args.max_completion_length {args.max_completion_length}, since a row of TRL "
            "holds no cut attempt",
            "raise it",
        ),
        (
            "options.context",
            options.context,
            options.context == "tokens",
            "'tokens', since a row of TRL holds no rewritten attempt",
            "",
        ),
        (
            "model",
            "one with an adapter (PEFT)",
            not (generation == "engine" and has_adapter),
            "without an adapter for generation='engine'",
            "use generation='trl', or merge the adapter",
        ),
        (
            "args.loss_type",
            args.loss_type,
            loss == "trl" or args.loss_type in FUSED_LOSS_TYPES,
            f"one of {', '.join(FUSED_LOSS_TYPES)} for loss='fused'",
            "use loss='trl'",
        ),
        (
            "args.use_bias_correction_kl",
            args.use_bias_correction_kl,
            not (has_fused_kl and args.use_bias_correction_kl),
            "False for loss='fused' with beta",
            "use loss='trl'",
        ),
        (
            "args.vllm_importance_sampling_correction",
            is_corrected,
            not (has_fused_kl and is_corrected),
            "False for loss='fused' with beta",
            "use loss='trl'",
        ),
    )


def check_trainer(trainer: Any, generation: str, loss: str) -> None:
    """Refuses what is known only once TRL's own constructor has run."""
    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    is_fused = loss == "fused"
    config = trainer.model.config.get_text_config().to_dict()
    _check(
        (
            "model",
            "FSDP or DeepSpeed",
            not (is_sharded and generation == "engine"),
            "whole on each rank for generation='engine'",
            "use generation='trl'",
        ),
        (
            "processing_class",
            type(trainer.processing_class).__name__,
            not trainer._is_vlm,
            "a tokenizer, since a question is text",
            "",
        ),
        (
            "DeepSpeed ZeRO-3",
            "on",
            not (is_fused and trainer._dist.is_zero3),
            "off for loss='fused'",
            "use loss='trl'",
        ),
        (
            "router_aux_loss_coef",
            trainer.router_aux_loss_coef,
            not (is_fused and trainer.aux_loss_enabled),
            "0 for loss='fused'",
            "use loss='trl'",
        ),
        *(
            (
                f"model.config.{name}",
                config.get(name),
                not is_fused or config.get(name) in (None, 1.0),
                "none for loss='fused'",
                "use loss='trl'",
            )
            for name in LOGIT_FIELDS
        ),
    )


def question_of_row(row: dict[str, Any], question_idx: int) -> Question:
    """Returns the question of a row of TRL's data set."""
    truth = row.get("ground_truth")
    advice = "add it, and leave args.remove_unused_columns False"
    check_rule(WHERE, "ground_truth", truth, truth is not None, "a column of text", advice)
    try:
        return to_question(
            row, COLUMNS, question_idx=question_idx, default_source="", truths_as_json=False
        )
    except ValueError as error:
        raise ValueError(f"{WHERE}: {error}") from error


def _check(*rules: tuple[str, object, bool, str, str]) -> None:
    """Refuses the first value that breaks its rule: name, value, whether it holds, rule, advice."""
    for rule in rules:
        check_rule(WHERE, *rule)
