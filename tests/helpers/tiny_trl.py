"""Makes a SocraticGRPOTrainer small enough for a test: a tiny Llama, and twelve questions.

trained() also trains it, and records the gradients of every step.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import GRPOConfig

from socpo_fast.integrations.trl import SocraticGRPOTrainer
from socpo_fast.socratic.episode import RolloutOptions
from socpo_fast.types import GuidanceRequest, Question, Rollout
from tests.helpers.tiny_tokenizers import family

LENGTH = 8


def make_model(seed: int = 0, *, tied: bool = True) -> LlamaForCausalLM:
    """Returns a tiny Llama with random weights, for the tokenizer of SmolLM2's family."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


def make_data(num_rows: int = 12) -> Dataset:
    """Returns questions in TRL's columns."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"the sum of {i} and two?"}],
            "ground_truth": str(i),
        }
        for i in range(num_rows)
    ]
    return Dataset.from_list(rows)


def grade(text: str, question: Question) -> float:
    """Grades by the text alone, so that a fair share of random answers is right."""
    return float(sum(map(ord, text)) % 3 == 0)


def teach(request: GuidanceRequest) -> str:
    return "check every step"


def make_args(folder: Path, **changes: Any) -> GRPOConfig:
    """Returns settings for the CPU: two questions of four rollouts a step."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "num_generations": 4,
        "max_steps": 2,
        "max_completion_length": LENGTH,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    return GRPOConfig(**(settings | changes))


def make_trainer(folder: Path, *, of_trl: dict[str, Any] | None = None, **ours: Any) -> Any:
    """Returns a trainer.

    Args:
        of_trl: changes to its GRPOConfig.
        ours:   changes to its arguments.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        args = make_args(folder, **(of_trl or {}))
        arguments: dict[str, Any] = {
            "model": make_model(),
            "train_dataset": make_data(),
            "processing_class": family("smollm2"),
            "teacher": teach,
            "grader": grade,
            "kv_cache_gib": 0.01,
            "options": RolloutOptions(
                group_size=args.num_generations, attempt_limit=LENGTH, guidance_limit=20
            ),
        }
        return SocraticGRPOTrainer(args=args, **(arguments | ours))


class GradRecorder(TrainerCallback):
    """Keeps the gradients of every optimizer step."""

    def __init__(self) -> None:
        self.grads: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, *_args: Any, model: Any, **_kwargs: Any) -> None:
        self.grads.append({name: p.grad.clone() for name, p in model.named_parameters()})


def trained(folder: Path, *, of_trl: dict[str, Any] | None = None, **ours: Any) -> Any:
    """Returns a trainer after training; `recorder` has its gradients, which are not clipped."""
    recorder = GradRecorder()
    trainer = make_trainer(
        folder, of_trl={"max_grad_norm": 0.0} | (of_trl or {}), callbacks=[recorder], **ours
    )
    trainer.train()
    trainer.recorder = recorder
    return trainer


def logged(trainer: Any, name: str) -> list[float]:
    """Returns the values of a metric, step by step."""
    return [row[name] for row in trainer.state.log_history if name in row]


def largest_difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Returns the largest difference of any entry, relative to the largest entry of its tensor."""
    assert actual.keys() == expected.keys()
    return max(
        float((actual[name] - expected[name]).abs().max() / expected[name].abs().max())
        for name in expected
    )


def tokens_of(rollouts: list[Rollout]) -> list[list[list[int]]]:
    return [[attempt.token_ids for attempt in rollout.attempts] for rollout in rollouts]
