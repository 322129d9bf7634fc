"""What fits into a card, before anything is made there. Read settle, make_plan, then Plan.

One tensor serves rollouts as KV pages and updates as fp32 gradients, so that

    residents + max(KV, gradients) + max(an update's, a rollout's temporaries) + gaps <= the card

The plan decides what is left at "auto", in this order. train.checkpointing: only where the longest
rollout, which is never split, would otherwise leave a group of such rollouts no room for their KV.
train.token_budget: as large as leaves KV and gradients two thirds of what residents leave, since a
microbatch of 8,000 tokens keeps a card busy and more KV lets more rollouts run.
engine.kv_cache_gib: the rest. The first two depend on the kind of card and on settings, never on
what others hold.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from socpo_fast.config import Config, LocalTeacherConfig
from socpo_fast.files import read_json
from socpo_fast.model import ModelConfig
from socpo_fast.ops._checks import check_rule
from socpo_fast.ops._head import GPU_WORKSPACE_MIB
from socpo_fast.report import sizes
from socpo_fast.report.cards import GIB, Card, card_of

if TYPE_CHECKING:
    import torch

ITEMSIZES = {"float32": 4, "bfloat16": 2, "auto": 2}  # "auto" is a local teacher's
MAX_TOKEN_BUDGET = 32 * 1024
BUDGET_STEP = 1024
KV_SHARE = 2 / 3  # of what residents leave, before microbatches grow
# Estimates: the driver's context with code, libraries and captured graphs; what the allocator holds
# and cannot give, fixed and of temporaries; a chat template around one message of guidance.
CONTEXT_BYTES = 5 * GIB // 4
GAP_BYTES = GIB // 2
GAP_SHARE = 0.05
BRIDGE_TOKENS = 32
DECODE_SPLIT = 256  # keys of one partial sum of the decode kernel
# Of a local teacher's engine, which has its defaults: tokens of a step, and of a page.
TEACHER_TOKEN_BUDGET = 2048
TEACHER_PAGE_SIZE = 32


class Plan(NamedTuple):
    """What takes how much of a card; properties are in bytes."""

    asked: Config
    config: Config  # with what was decided in place of "auto"
    model: ModelConfig
    teacher: ModelConfig | None  # a local one
    card: Card
    is_training: bool

    @property
    def itemsize(self) -> int:
        return ITEMSIZES[self.config.student.dtype]

    @property
    def longest(self) -> tuple[int, int]:
        """Tokens of the longest rollout that settings allow: of its last context, and packed.

        Packed are the unseen ends of cut attempts as well; of contexts that the chat template
        writes anew (rollout.context) whole attempts, since what stands before them may have
        changed.
        """
        rollout = self.config.rollout
        positions = self.model.max_position_embeddings
        prompt = max(min(self.config.data.max_prompt_tokens, positions - rollout.max_new_tokens), 1)
        kept = min(rollout.attempt_limit, rollout.max_new_tokens)
        num_seams = rollout.max_attempts - 1
        seams = num_seams * (kept + rollout.guidance_limit + BRIDGE_TOKENS)
        context = min(prompt + seams + rollout.max_new_tokens, positions)
        unseen = rollout.max_new_tokens - (kept if rollout.context == "tokens" else 0)
        return context, context + num_seams * unseen

    @property
    def num_tokens(self) -> int:
        """Of the largest microbatch."""
        return max(int(self.config.train.token_budget), self.longest[1])

    @property
    def gradients(self) -> int:
        return 4 * sizes.num_parameters(self.model) * self.is_training

    @property
    def residents(self) -> dict[str, int]:
        """What is there from start to end, but for KV and gradients."""
        config = self.config
        num_parameters = sizes.num_parameters(self.model)
        # A captured round's tensors; the keys of a round are rounded up to a power of two.
        rows = config.engine.max_running
        num_splits = -(-2 * self.longest[0] // DECODE_SPLIT)
        partial = 4 * num_splits * self.model.num_heads * (self.model.head_dim + 2)
        pools = sizes.step_bytes(self.model, self.itemsize, rows) + rows * partial
        parts = {
            "weights": num_parameters * self.itemsize,
            "low halves of the masters": num_parameters
            * 2
            * (self.itemsize == 2)
            * self.is_training,
            "moments": num_parameters * 8 * self.is_training,
            "reference": num_parameters
            * self.itemsize
            * (config.loss.kl_coef > 0)
            * self.is_training,
            "context, graph pools (estimate)": CONTEXT_BYTES + pools,
        }
        local = config.teacher if isinstance(config.teacher, LocalTeacherConfig) else None
        if local and self.teacher and local.device in (None, config.run.device):
            itemsize = ITEMSIZES[local.dtype]
            parts["local teacher: weights"] = sizes.num_parameters(self.teacher) * itemsize
            parts["local teacher: KV"] = int(local.kv_cache_gib * GIB)
            parts["local teacher: a step (estimate)"] = sizes.step_bytes(
                self.teacher, itemsize, TEACHER_TOKEN_BUDGET
            )
        return {name: size for name, size in parts.items() if size}

    @property
    def temporaries(self) -> dict[str, int]:
        """What an update makes, or an engine's step, whichever is more."""
        config = self.config
        model = self.model
        step = sizes.step_bytes(model, self.itemsize, config.engine.token_budget)
        step += sizes.filtered_draw_bytes(model, config.engine.max_running)
        steps = {"rollouts: a step, draws with top-p": step}
        if not self.is_training:
            return steps
        num_tokens = self.num_tokens
        options = {"checkpointing": bool(config.train.checkpointing)}
        kept = num_tokens * sizes.activation_bytes(model, self.itemsize, **options)
        layer = num_tokens * sizes.backward_bytes(model, self.itemsize, **options)
        head = sizes.head_bytes(model, self.itemsize, num_tokens, int(GPU_WORKSPACE_MIB * 2**20))
        name = "LM head: workspace, dW, dx" if head > layer else "one layer's backward"
        updates = {
            f"update: activations, {num_tokens} tokens": kept,
            f"update: {name}": max(head, layer),
        }
        return updates if sum(updates.values()) >= step else steps

    @property
    def gaps(self) -> int:
        return GAP_BYTES + int(GAP_SHARE * sum(self.temporaries.values()))

    @property
    def room(self) -> int:
        """What is left to KV and gradients, if others hold nothing."""
        used = sum(self.residents.values()) + sum(self.temporaries.values()) + self.gaps
        return int(self.card.total_gib * GIB) - used

    @property
    def page_bytes(self) -> int:
        return self.config.engine.page_size * sizes.kv_bytes(self.model, self.itemsize)

    def kv_of(self, num_contexts: int) -> int:
        """KV of so many rollouts as long as they may be."""
        return num_contexts * -(-self.longest[0] // self.config.engine.page_size) * self.page_bytes

    @property
    def kv_pages(self) -> int:
        return int(float(self.config.engine.kv_cache_gib) * GIB) // self.page_bytes

    @property
    def holds_longest(self) -> bool:
        """Whether the KV cache holds the longest context."""
        return self.kv_pages * self.page_bytes >= self.kv_of(1)

    @property
    def shared(self) -> int:
        """KV and gradients, one tensor."""
        return max(self.kv_pages * self.page_bytes, self.gradients)

    @property
    def left(self) -> int:
        return self.room - self.shared - int(self.card.others_gib * GIB)

    @property
    def peak_bytes(self) -> int:
        """What torch.cuda.max_memory_allocated should say when a batch has ended."""
        residents = sum(self.residents.values()) - CONTEXT_BYTES
        return residents + self.shared + sum(self.temporaries.values())


def settle(
    config: Config, student_folder: Path, device: torch.device, *, is_training: bool
) -> tuple[Config, Plan | None]:
    """The config with what is "auto" decided for a device, and on a card the plan that did it.

    Raises:
        ValueError: the run does not fit into the card.
    """
    if device.type == "cpu":
        return config.settled(), None
    card = card_of(device, CONTEXT_BYTES / GIB)
    plan = make_plan(config, student_folder, card, is_training=is_training)
    return plan.config, plan


def make_plan(config: Config, student_folder: Path, card: Card, *, is_training: bool) -> Plan:
    """What a run takes of a card. Reads config.json of the models, nothing else.

    Raises:
        ValueError: the run does not fit, in one line with what would help.
    """
    teacher = None
    if isinstance(config.teacher, LocalTeacherConfig) and config.rollout.max_attempts > 1:
        teacher = read_model(Path(config.teacher.path))
        check_teacher(config.teacher, teacher)
    plan = Plan(config, config, read_model(student_folder), teacher, card, is_training)
    length = config.rollout.max_new_tokens
    positions = plan.model.max_position_embeddings
    rule = f"below the model's {positions} positions"
    check_rule("rollout", "rollout.max_new_tokens", length, length < positions, rule, "lower it")
    plan = decide(plan)
    if not fits(plan):
        raise ValueError(refusal(plan))
    return plan


def check_teacher(config: LocalTeacherConfig, teacher: ModelConfig) -> None:
    """The same as LocalTeacher says once it is made."""
    num_pages = int(config.kv_cache_gib * GIB) // (
        TEACHER_PAGE_SIZE * sizes.kv_bytes(teacher, ITEMSIZES[config.dtype])
    )
    num_tokens = min(num_pages * TEACHER_PAGE_SIZE, teacher.max_position_embeddings)
    if config.max_new_tokens >= num_tokens:
        raise ValueError(
            f"teacher.max_new_tokens must be < the teacher's context of {num_tokens} tokens, "
            f"got {config.max_new_tokens}; lower it or raise teacher.kv_cache_gib"
        )


def decide(plan: Plan) -> Plan:
    """The plan with what is "auto" chosen, whether it fits or not."""
    asked = plan.asked
    card = plan.card

    def settled(token_budget: int, checkpointing: bool, kv: int = 0) -> Plan:
        chosen = asked.settled(
            token_budget=token_budget,
            checkpointing=checkpointing,
            kv_cache_gib=kv / GIB,
        )
        return plan._replace(config=chosen)

    comfortable = max(plan.gradients, plan.kv_of(asked.rollout.group_size))
    most = max(plan.gradients, plan.kv_of(asked.engine.max_running))
    wanted = KV_SHARE * (card.total_gib * GIB - sum(plan.residents.values()))
    wanted = max(comfortable, min(most, wanted))
    if asked.engine.kv_cache_gib != "auto":
        comfortable = wanted = max(plan.gradients, int(asked.engine.kv_cache_gib * GIB))
    checkpointing = settled(1, False).room < comfortable
    # A microbatch may hold as much as the longest rollout, whatever the budget.
    packed = plan.longest[1]
    least = max(packed // BUDGET_STEP, 1) * BUDGET_STEP
    budgets = range(MAX_TOKEN_BUDGET, packed, -BUDGET_STEP)
    fitting = (budget for budget in budgets if settled(budget, checkpointing).room >= wanted)
    token_budget = next(fitting, least)
    room = settled(token_budget, checkpointing).room - int(card.others_gib * GIB)
    kv = min(max(room, plan.gradients), plan.kv_of(asked.engine.max_running))
    kv = max(kv, plan.kv_of(1)) // plan.page_bytes * plan.page_bytes
    return settled(token_budget, checkpointing, kv)


def read_model(folder: Path) -> ModelConfig:
    """The config of a model whose weights are not read."""
    path = folder / "config.json"
    return ModelConfig.from_hf(read_json(path), where=str(path))


def changed(plan: Plan, section: str, **values: Any) -> Plan:
    """The plan as it is asked for with other values in a section, with nothing chosen yet."""
    sections = {section: getattr(plan.asked, section).model_copy(update=values)}
    asked = plan.asked.model_copy(update=sections)
    return plan._replace(asked=asked, config=asked)


# What may help a run that does not fit, with numbers below which a run is not worth its time. Where
# less was asked for, more does not help and is not named.
LEVERS: dict[str, Callable[[Plan], Plan]] = {
    "use a free card": lambda plan: plan._replace(card=plan.card._replace(others_gib=0.0)),
    "put the teacher behind an endpoint": lambda plan: plan._replace(teacher=None),
    "set train.checkpointing true": lambda plan: changed(plan, "train", checkpointing=True),
    "lower train.token_budget": lambda plan: changed(plan, "train", token_budget=1),
    "lower data.max_prompt_tokens": lambda plan: changed(plan, "data", max_prompt_tokens=256),
    "lower rollout.max_new_tokens": lambda plan: changed(plan, "rollout", max_new_tokens=256),
    "lower rollout.guidance_limit": lambda plan: changed(plan, "rollout", guidance_limit=128),
    "lower engine.max_running": lambda plan: changed(plan, "engine", max_running=8),
    "set engine.kv_cache_gib auto": lambda plan: changed(plan, "engine", kv_cache_gib="auto"),
    "set loss.kl_coef 0": lambda plan: changed(plan, "loss", kl_coef=0.0),
    "set student.dtype bfloat16": lambda plan: changed(plan, "student", dtype="bfloat16"),
}


def refusal(plan: Plan) -> str:
    """Why the run does not fit, and what would help, in one line."""
    card = plan.card
    others = f", {card.others_gib:.1f} of them held by others (a card in use by others)" * (
        card.others_gib > 1
    )
    used_gib = card.total_gib - card.others_gib - plan.left / GIB
    reason = (
        f"the run must fit into the {card.total_gib:.1f} GiB of {card.name}{others}, got "
        f"{used_gib:.1f} GiB, {-plan.left / GIB:.1f} too many"
    )
    if not plan.holds_longest:
        reason = (
            f"engine.kv_cache_gib must be >= {plan.kv_of(1) / GIB:.3g}, the longest context of "
            f"{plan.longest[0]} tokens, got {plan.config.engine.kv_cache_gib:.3g}"
        )
    return (
        f"plan: {reason}; "
        f"{', '.join([*helpful_levers(plan), 'use a smaller model or a larger card'])}"
    )


def helpful_levers(plan: Plan) -> list[str]:
    """Those that make the run fit by themselves, or where none does, two of them together."""
    pulled = {lever: pull(plan) for lever, pull in LEVERS.items()}
    alone = [lever for lever, asked in pulled.items() if fits(decide(asked))]
    pairs = combinations(LEVERS, 2)
    together = (
        " and ".join(pair) for pair in pairs if fits(decide(LEVERS[pair[1]](pulled[pair[0]])))
    )
    return alone or list(together)


def fits(plan: Plan) -> bool:
    return plan.left >= 0 and plan.holds_longest
