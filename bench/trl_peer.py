"""Runs TRL's part of an update on rollouts of ours: forward, loss and backward of GRPOTrainer.

A row is a whole rollout: prompt, attempts and bridges, padded to the longest. TRL projects only the
completions, in tiles (its fused LM head), and has no other way on a CPU. What is left to choose is
how many rows are one microbatch; the bench takes the fastest.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import measure
from socpo_fast.integrations.tensors import pad_rollouts
from socpo_fast.model import Decoder
from socpo_fast.model.hf_views import hf_rows
from socpo_fast.types import Rollout

MICROBATCHES = (2, 4, 8)
# Of GRPOConfig, in every bench with TRL: fp32 on the CPU, our clips, nothing recomputed.
TRL_SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "beta": 0.0,
    "loss_type": "dapo",
    "epsilon": 0.2,
    "epsilon_high": 0.2,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
}
COMPLETIONS = ("completion_ids", "completion_mask", "tool_mask")
COMPLETIONS = (*COMPLETIONS, "old_per_token_logps", "advantages")


class TrlUpdate:
    """GRPOTrainer's loss and backward of one update; gradients are left in `.model`."""

    def __init__(self, folder: Path | str, rollouts: Sequence[Rollout]):
        # Slow to import, and only some benches need it.
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
        from trl import GRPOConfig, GRPOTrainer

        logging.disable_progress_bar()
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.microbatch = MICROBATCHES[0]
        self.inputs = trl_inputs(rollouts)
        with tempfile.TemporaryDirectory() as output_dir:
            settings = GRPOConfig(
                **TRL_SETTINGS,
                output_dir=output_dir,
                temperature=1.0,
                num_generations=2,
                per_device_train_batch_size=2,
            )
            self.trainer = GRPOTrainer(
                self.model,
                reward_funcs=lambda prompts, completions, **_: [0.0] * len(prompts),
                args=settings,
                train_dataset=Dataset.from_list([{"prompt": "x"}]),
                processing_class=AutoTokenizer.from_pretrained(folder),
            )
        # The loss is divided by the tokens of the whole update, so microbatches add up.
        self.trainer.current_gradient_accumulation_steps = 1
        self.model.train()

    def run(self) -> None:
        """Computes the gradient of all rollouts, from none."""
        self.model.zero_grad(set_to_none=True)
        num_rows = len(self.inputs["prompt_ids"])
        for start in range(0, num_rows, self.microbatch):
            rows = slice(start, start + self.microbatch)
            # Columns that only rows of other microbatches need are left out, in TRL's favour.
            width = int(self.inputs["completion_mask"][rows].sum(1).max())
            part = {"num_items_in_batch": self.inputs["num_items_in_batch"]}
            part |= {name: self.inputs[name][rows] for name in ("prompt_ids", "prompt_mask")}
            part |= {name: self.inputs[name][rows, :width] for name in COMPLETIONS}
            self.trainer.compute_loss(self.model, part).backward()

    @property
    def num_tokens(self) -> int:
        """Returns how many tokens one run forwards, padding included."""
        prompt_width = self.inputs["prompt_ids"].shape[1]
        lengths = self.inputs["completion_mask"].sum(1)
        parts = lengths.split(self.microbatch)
        return sum(len(part) * (prompt_width + int(part.max())) for part in parts)

    def choose_microbatch(self) -> None:
        """Takes the fastest number of rows; each is tried once, after a run that warms up."""
        seconds = {}
        for self.microbatch in MICROBATCHES:
            if self.microbatch <= len(self.inputs["prompt_ids"]):
                seconds[self.microbatch] = measure.seconds_of(self.run)
        self.microbatch = min(seconds, key=seconds.__getitem__)

    def gradients_as(self, student: Decoder) -> list[Tensor]:
        """Returns the gradients in the order and the form of the student's parameters."""
        grads = {name: param.grad for name, param in self.model.named_parameters()}
        return [
            torch.cat([grads[hf_name] for hf_name, _ in parts]) for _, parts in hf_rows(student)
        ]


def trl_inputs(rollouts: Sequence[Rollout]) -> dict[str, Tensor]:
    """Returns what GRPOTrainer's loss takes; all prompts must have one length."""
    padded = pad_rollouts(rollouts, rows="rollout", pad_id=0)
    prompt_width = len(rollouts[0].prompt_ids)
    prompt_ids, completion_ids = padded.ids_BL.tensor_split([prompt_width], dim=1)
    tool_mask = padded.loss_mask_BL[:, prompt_width:].long()
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": torch.ones_like(prompt_ids),
        "completion_ids": completion_ids,
        "completion_mask": padded.attention_mask_BL[:, prompt_width:].long(),
        "tool_mask": tool_mask,
        "old_per_token_logps": padded.logprobs_BL[:, prompt_width:],
        "advantages": padded.advantages_BL[:, prompt_width:],
        "num_items_in_batch": tool_mask.sum(),
    }
