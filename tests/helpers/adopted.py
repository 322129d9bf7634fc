"""Draws from students made of live transformers models, and changes the models' weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from socpo_fast import Engine, SamplingParams, adopt_student
from socpo_fast.model import Decoder, packed_forward
from socpo_fast.ops import visible_until_of_sequences

IDS = torch.arange(12)
GREEDY = SamplingParams(n=1, temperature=0.0, max_new_tokens=8, eos_ids=(), ignore_eos=True)


def logits_of(student: Decoder) -> Tensor:
    """Returns the logits of IDS, by our decoder."""
    until = visible_until_of_sequences([len(IDS)])
    hidden_TD = packed_forward(student, IDS, torch.arange(len(IDS)), until)
    return student.lm_head(hidden_TD)


def engine_of(student: Decoder) -> Engine:
    return Engine(student, kv_cache_gib=0.01, page_size=4)


def draw(engine: Engine) -> list[int]:
    """Returns the tokens that the engine draws behind IDS."""
    return engine.generate([IDS.tolist()], GREEDY)[0][0].token_ids


def expected_tokens(model: PreTrainedModel) -> list[int]:
    """Returns the tokens that the model's current weights mean, from a fresh engine."""
    return draw(engine_of(adopt_student(copy.deepcopy(model))))


def perturb(model: nn.Module) -> None:
    """Writes other weights in place, as an optimizer does."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
