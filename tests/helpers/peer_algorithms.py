"""Loads the formulas of other trainers: verl's alone, and TRL's in a trainer of a tiny model."""

from __future__ import annotations

import os
import sys
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers.tiny_tokenizers import family

PACKAGES = ["verl", "verl.trainer", "verl.trainer.ppo", "verl.utils", "verl.workers"]
# verl's formulas take these names only as types, or do not need them for an advantage or a loss.
# Their modules would import Ray, tensordict and omegaconf, which need not be installed.
STAND_INS = {
    "omegaconf": ["DictConfig"],
    "tensordict": ["TensorDict"],
    "verl.trainer.config": ["AlgoConfig"],
    "verl.utils": ["as_torch_index", "group_mean_std"],
    "verl.utils.device": ["get_device_name", "get_torch_device"],
    "verl.workers.config": ["ActorConfig"],
}


def verl_algorithms() -> ModuleType:
    """Returns verl.trainer.ppo.core_algos; skips the test if verl is not installed."""
    site_packages = _site_packages("verl")
    before = {name: module for name, module in sys.modules.items() if _is_verls(name)}
    for name in before:
        del sys.modules[name]
    try:
        for name in [*PACKAGES, *STAND_INS]:
            module = sys.modules.setdefault(name, ModuleType(name))
            if name in PACKAGES:  # its __init__ does not run, its other modules are found
                module.__path__ = [str(site_packages.joinpath(*name.split(".")))]
            for attribute in STAND_INS.get(name, []):
                setattr(module, attribute, type(attribute, (), {}))
        return import_module("verl.trainer.ppo.core_algos")
    finally:
        for name in [name for name in sys.modules if _is_verls(name)]:
            del sys.modules[name]
        sys.modules.update(before)


class ActorConfig(SimpleNamespace):
    """The fields of verl's actor configuration that its losses read."""

    def get(self, name: str, default: Any) -> Any:
        return getattr(self, name, default)


def trl_trainer(output_dir: Path) -> Any:
    """Returns TRL's GRPOTrainer for a tiny model; skips the test if TRL is not installed.

    Its completions are made up. Tests set what it reads: `rewards` (fp64), `logprobs`, and TRL's
    own attributes such as loss_type.
    """
    _site_packages("trl")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func is experimental
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    class Trainer(GRPOTrainer):
        """Takes rewards and log-probs as given."""

        logprobs = torch.zeros(1, 1)

        def _calculate_rewards(self, *_args: Any) -> Tensor:
            return self.rewards.double()[:, None]

        def _get_per_token_logps_and_entropies(self, *_args: Any, **_options: Any) -> Any:
            return self.logprobs, torch.zeros_like(self.logprobs), None

    def make_completions(prompts: list[Any], _trainer: Any) -> dict[str, Any]:
        ids = [[5]] * len(prompts)
        return {"prompt_ids": ids, "completion_ids": ids, "logprobs": None}

    config = LlamaConfig(
        vocab_size=300,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    return Trainer(
        model=LlamaForCausalLM(config),
        reward_funcs=lambda **_columns: [],
        args=GRPOConfig(
            output_dir=str(output_dir),
            steps_per_generation=4,
            use_bias_correction_kl=False,
            use_cpu=True,
            bf16=False,
            report_to=[],
        ),
        processing_class=family("smollm2"),
        train_dataset=Dataset.from_list([{"prompt": "1 + 1?"}]),
        rollout_func=make_completions,
    )


def _site_packages(name: str) -> Path:
    """Returns the folder that holds a package; skips the test if it is not installed."""
    try:
        return Path(str(metadata.distribution(name).locate_file("")))
    except metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed")


def _is_verls(name: str) -> bool:
    return name.partition(".")[0] in ("verl", "omegaconf", "tensordict")
