"""Runs a whole step of a tiny student in one implementation.

That is rollouts with a teacher, credit and two updates. Read auto_means and Record, which say what
runs and what ran, then sample and two_updates.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from socpo_fast.config import Config, load_config
from socpo_fast.engine import Engine
from socpo_fast.model.accumulate import accumulate_in_fp32
from socpo_fast.model.decoder import Decoder
from socpo_fast.ops import CreditOptions, _impl, adamw
from socpo_fast.ops._impl import pick_impl
from socpo_fast.socratic.credit import assign_credit
from socpo_fast.socratic.episode import RolloutOptions
from socpo_fast.socratic.rollout import socratic_rollouts
from socpo_fast.training.optimizer import EPS
from socpo_fast.training.step import compute_logprobs, policy_gradients
from socpo_fast.training.update import Updater
from socpo_fast.types import Question, Rollout, SamplingParams
from tests.helpers.made_rollouts import make_student
from tests.helpers.scripted import BRIDGE, END, TOKENIZER
from tests.helpers.updates import updates_of

TEMPERATURE = 0.9
BUDGET = 1000  # tokens: one microbatch an update
ATTEMPT_LIMIT = 2  # one less than max_new_tokens, so that some attempts are cut
# As small as possible: each program takes the interpreter milliseconds. 32 is the smallest head dim
# that every attention kernel takes.
SIZES = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "head_dim": 32,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "llama": {
        "tie_word_embeddings": False,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
}
# Large enough that a parameter which moves the wrong way, or not at all, breaks the error rule: a
# step is a hundred tolerances in fp32. In fp16 it is two, as numbers near 1 are half a tolerance
# apart. Much larger steps would push all ratios of the second question beyond the clips, where the
# gradient is 0.
LR = {torch.float32: 1e-3, torch.float16: 4e-3}
Tensors = dict[str, Tensor]


@contextmanager
def auto_means(impl: str) -> Iterator[None]:
    """Makes "auto" pick this implementation on the CPU where an op has it, else ref."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_impl.FASTEST, "cpu", impl)
        yield


class Record(TorchDispatchMode):
    """A record of what pick_impl answered, by op, and of the registered ops that ran.

    It needs both: a reference need not be a registered op, and no pick_impl decides about the
    backward of a registered op.
    """

    def __init__(self) -> None:
        super().__init__()
        self.picked: dict[str, set[str]] = defaultdict(set)
        self.ran: set[tuple[str, str]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func._schema.name.split("::")
        if namespace == "socpo_fast":
            self.ran.add((name, args[-1]))
        elif namespace == "socpo":
            self.ran.add((name, "cpp"))
        return func(*args, **(kwargs or {}))

    def pick(self, op: str, impl: str, x: Tensor) -> str:
        """Calls pick_impl and notes its answer."""
        picked = pick_impl(op, impl, x)
        self.picked[op].add(picked)
        return picked


@contextmanager
def recorded() -> Iterator[Record]:
    """Yields a record of everything that runs in the block."""
    record = Record()
    with pytest.MonkeyPatch.context() as patch, record:
        for name, module in list(sys.modules.items()):
            if name.startswith("socpo_fast.") and vars(module).get("pick_impl") is pick_impl:
                patch.setattr(module, "pick_impl", record.pick)
        yield record


def make_start(model: str, dtype: torch.dtype) -> Decoder:
    """Returns a student whose attempts end in every way.

    The seed is one with which no draw is so close that the rounding of fp32 decides it.
    """
    student = make_student(seed=71, **SIZES | MODELS[model])
    with torch.no_grad():
        for param in student.parameters():
            if param.ndim > 1:
                param.div_(3)  # log-probs near those of equal chances
        student.lm_head.weight[END] *= 6  # some attempts end by themselves
    return student.to(dtype)


def sample(student: Decoder) -> list[Rollout]:
    """Rolls out two questions and assigns credit.

    A second attempt follows where the first is wrong, which is as good as random.
    """
    questions = [
        Question(
            question_idx=idx,
            messages=({"role": "user", "content": str(idx)},),
            ground_truth="",
            data_source="test",
        )
        for idx in range(2)
    ]
    rollouts = socratic_rollouts(
        Engine(student, kv_cache_gib=0.002, page_size=8, tokens_per_sync=2),
        TOKENIZER,
        questions,
        teacher=lambda request: "again",
        grader=lambda text, question: len(text.encode()) % 3 == 0,
        params=SamplingParams(
            temperature=TEMPERATURE,
            max_new_tokens=ATTEMPT_LIMIT + 1,
            eos_ids=BRIDGE.eos_ids,
        ),
        options=RolloutOptions(group_size=3, max_attempts=2, attempt_limit=ATTEMPT_LIMIT),
        batch_idx=0,
    )
    ordered = sorted(rollouts, key=lambda rollout: (rollout.question_idx, rollout.rollout_idx))
    assign_credit(ordered, options=CreditOptions())
    return ordered


def logprobs_of(student: Decoder, rollouts: list[Rollout]) -> list[list[Tensor]]:
    return compute_logprobs(student, rollouts, token_budget=BUDGET, temperature=TEMPERATURE)


class Updates(NamedTuple):
    """The results of two updates."""

    gradients: list[Tensors]  # before clipping
    params: Tensors


def two_updates(student: Decoder, rollouts: list[Rollout], dtype: torch.dtype) -> Updates:
    """Makes two updates, one question each.

    dtype is the one of the run, or of the run that this fp64 one is the truth for.
    """
    changes = {
        "rollout.temperature": TEMPERATURE,
        "train.lr": LR[dtype],
        "train.warmup_updates": 0,
        "train.token_budget": BUDGET,
    }
    config = load_config(None, changes)
    groups = [[r for r in rollouts if r.question_idx == idx] for idx in range(2)]
    if student.lm_head.weight.dtype == torch.float32:
        gradients = updates_by_updater(student, groups, config)
    else:
        gradients = updates_by_hand(student, groups, config, recomputes=dtype != torch.float32)
    params = {name: param.detach() for name, param in student.named_parameters()}
    return Updates(gradients, params)


def updates_by_updater(
    student: Decoder,
    groups: list[list[Rollout]],
    config: Config,
) -> list[Tensors]:
    """Makes the updates with Updater; returns the gradients before clipping."""
    updater = Updater(student, config, reference=None)
    gradients = []
    original = updater.optimizer.step

    def step(loss: Tensor, **options: Any) -> Any:
        gradients.append({name: x.grad for name, x in updater.optimizer.params.items()})
        return original(loss, **options)

    updater.optimizer.step = step
    assert len(list(updates_of(updater, groups, [[0], [1]]))) == 2
    assert updater.optimizer.num_skipped == 0
    return gradients


def updates_by_hand(
    student: Decoder,
    groups: list[list[Rollout]],
    config: Config,
    *,
    recomputes: bool,
) -> list[Tensors]:
    """Does what Updater and Optimizer do, for students in fp16 and fp64, which they refuse.

    In real runs fp16 would lose small steps, and fp64 is the truth of tests only. With `recomputes`
    the first update takes the current log-probs as old ones and the second computes them again; the
    sampler's serve as old ones in fp32 only.
    """
    old: list[Any] = [None, None]
    if recomputes:
        old = ["current", logprobs_of(student, groups[1])]
    params = dict(student.named_parameters())
    options = config.train
    wide = torch.promote_types(student.lm_head.weight.dtype, torch.float32)
    if wide == torch.float32:
        accumulate_in_fp32(params.values())
    moments = {
        name: [torch.zeros_like(param, dtype=wide, requires_grad=False) for _ in range(2)]
        for name, param in params.items()
    }
    gradients = []
    for num_steps, (group, old_logprobs) in enumerate(zip(groups, old, strict=True)):
        policy_gradients(
            student,
            group,
            token_budget=BUDGET,
            temperature=TEMPERATURE,
            old_logprobs=old_logprobs,
        )
        gradients.append({name: param.grad for name, param in params.items()})
        size = nn.utils.get_total_norm(gradients[-1].values())
        for name, param in params.items():
            adamw(
                param,
                None,
                *moments[name],
                param.grad,
                lr=options.lr,
                betas=(options.beta1, options.beta2),
                eps=EPS,
                weight_decay=options.weight_decay if param.ndim >= 2 else 0.0,
                step=num_steps + 1,
                scale=(options.max_grad_norm / (size + 1e-6)).clamp(max=1.0),
            )
            param.grad = None
    return gradients
