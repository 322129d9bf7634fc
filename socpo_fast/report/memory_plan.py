"""Plans what fits into a card before anything is allocated. Read settle, make_plan, then Plan.

One tensor serves rollouts as KV pages and updates as fp32 gradients, since the two never run at the
same time. A run fits if

    residents + max(KV, gradients) + max(an update's, a rollout's temporaries) + gaps <= the card

    |<----------------------------- the card's memory ----------------------------->|
    | residents:  | KV of rollouts       | temporaries of  | allocator | other       |
    | weights,    | or                   | an update or of | gaps      | processes,  |
    | moments, .. | gradients of updates | an engine step  |           | free memory |
                  |<------ shared ------>|

The plan chooses what is left at "auto", in this order:

train.checkpointing   on only where it must be: the longest rollout is never split, and without it
                      its activations would leave a group of such rollouts no room for their KV.
train.token_budget    the largest that leaves KV and gradients two thirds of what residents leave. A
                      microbatch of 8,000 tokens keeps a card busy; beyond that, more KV helps more,
                      as more rollouts run at once.
engine.kv_cache_gib   what remains.

The first two depend on the kind of card and on settings, never on what other processes hold, so
that a run repeats on another day.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from socpo_fast.config import Config, LocalTeacherConfig
from socpo_fast.files import read_json
from socpo_fast.model import ModelConfig
from socpo_fast.model.hub import model_folder
from socpo_fast.model.weights import check_is_model
from socpo_fast.ops._checks import check_rule
from socpo_fast.ops._head import GPU_WORKSPACE_MIB
from socpo_fast.report import sizes
from socpo_fast.report.cards import GIB, Card, card_of

if TYPE_CHECKING:
    import torch

ITEMSIZES = {"float32": 4, "bfloat16": 2, "auto": 2}  # "auto" occurs for local teachers only
MAX_TOKEN_BUDGET = 32 * 1024
BUDGET_STEP = 1024
KV_SHARE = 2 / 3  # KV's part of what residents leave; microbatches grow only beyond that
# Estimates. CONTEXT_BYTES: the CUDA context with code, libraries and captured graphs. GAP_BYTES and
# GAP_SHARE: memory that the allocator holds but cannot hand out, a fixed part and a share of the
# temporaries. BRIDGE_TOKENS: the chat template around one message of guidance.
CONTEXT_BYTES = 5 * GIB // 4
GAP_BYTES = GIB // 2
GAP_SHARE = 0.05
BRIDGE_TOKENS = 32
DECODE_SPLIT = 256  # keys of one partial sum of the decode kernel
# A local teacher's engine runs with the engine's defaults: tokens of a step, tokens of a page.
TEACHER_TOKEN_BUDGET = 2048
TEACHER_PAGE_SIZE = 32


class Plan(NamedTuple):
    """The memory plan of a run; all sizes are in bytes."""

    asked: Config  # the user's settings, with "auto"
    config: Config  # the same with chosen values in place of "auto"
    model: ModelConfig
    teacher: ModelConfig | None  # a local teacher's
    card: Card
    is_training: bool  # False for `socpo eval`: no moments, no gradients

    @property
    def itemsize(self) -> int:
        """Returns the bytes of one of the student's weights."""
        return ITEMSIZES[self.config.student.dtype]

    @property
    def longest(self) -> tuple[int, int]:
        """Returns tokens of the longest rollout that settings allow: (its last context, packed).

        Training packs more tokens than the last context has. An attempt that was cut for the next
        one is trained to its end. Where the chat template writes the conversation anew
        (rollout.context is not "tokens"), the tokens in front of an attempt may differ from those
        it was sampled behind, so a whole attempt is counted twice: as sampled and as context.
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
        """Returns the tokens of the largest microbatch."""
        # A rollout is never split, so a longer one gets a microbatch of its own size.
        return max(int(self.config.train.token_budget), self.longest[1])

    @property
    def gradients(self) -> int:
        """Returns the bytes of the fp32 gradients; 0 without training."""
        return 4 * sizes.num_parameters(self.model) * self.is_training

    @property
    def residents(self) -> dict[str, int]:
        """Returns what is allocated from start to end, without KV and gradients."""
        config = self.config
        num_parameters = sizes.num_parameters(self.model)
        # CUDA graphs of decode rounds keep their tensors in pools. A graph is captured for a number
        # of keys rounded up to a power of two, hence up to twice the longest context.
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
        """Returns what an update allocates, or what an engine step does, whichever is more."""
        config = self.config
        model = self.model
        step_bytes = sizes.step_bytes(model, self.itemsize, config.engine.token_budget)
        step_bytes += sizes.filtered_draw_bytes(model, config.engine.max_running)
        rollouts = {"rollouts: a step, draws with top-p": step_bytes}
        if not self.is_training:
            return rollouts
        num_tokens = self.num_tokens
        options = {"checkpointing": bool(config.train.checkpointing)}
        activations = num_tokens * sizes.activation_bytes(model, self.itemsize, **options)
        layer = num_tokens * sizes.backward_bytes(model, self.itemsize, **options)
        lm_head = sizes.head_bytes(model, self.itemsize, num_tokens, int(GPU_WORKSPACE_MIB * 2**20))
        # The head's backward ends before that of the layers begins, so the larger of the two
        # counts, on top of the activations of all layers.
        name = "LM head: workspace, dW, dx" if lm_head > layer else "one layer's backward"
        updates = {
            f"update: activations, {num_tokens} tokens": activations,
            f"update: {name}": max(lm_head, layer),
        }
        return updates if sum(updates.values()) >= step_bytes else rollouts

    @property
    def gaps(self) -> int:
        """Returns an estimate of what the allocator loses to fragmentation."""
        return GAP_BYTES + int(GAP_SHARE * sum(self.temporaries.values()))

    @property
    def room(self) -> int:
        """Returns what remains for KV and gradients if other processes hold nothing."""
        used = sum(self.residents.values()) + sum(self.temporaries.values()) + self.gaps
        return int(self.card.total_gib * GIB) - used

    @property
    def page_bytes(self) -> int:
        """Returns the bytes of one KV page, over all layers."""
        return self.config.engine.page_size * sizes.kv_bytes(self.model, self.itemsize)

    def kv_of(self, num_contexts: int) -> int:
        """Returns the bytes of KV of num_contexts rollouts at their longest."""
        return num_contexts * -(-self.longest[0] // self.config.engine.page_size) * self.page_bytes

    @property
    def kv_pages(self) -> int:
        """Returns the number of pages of the KV cache."""
        return int(float(self.config.engine.kv_cache_gib) * GIB) // self.page_bytes

    @property
    def holds_longest(self) -> bool:
        """Whether the KV cache holds the longest context."""
        return self.kv_pages * self.page_bytes >= self.kv_of(1)

    @property
    def shared(self) -> int:
        """Returns the bytes of the one tensor that serves as KV and as gradients."""
        return max(self.kv_pages * self.page_bytes, self.gradients)

    @property
    def left(self) -> int:
        """Returns what remains of the card; negative if the run does not fit."""
        return self.room - self.shared - int(self.card.others_gib * GIB)

    @property
    def peak_bytes(self) -> int:
        """Returns what torch.cuda.max_memory_allocated should say when a batch has ended."""
        residents = sum(self.residents.values()) - CONTEXT_BYTES
        return residents + self.shared + sum(self.temporaries.values())


def settle(
    config: Config, student_folder: Path, device: torch.device, *, is_training: bool
) -> tuple[Config, Plan | None]:
    """Returns the config with "auto" replaced for this device, and on a GPU the plan behind it.

    Raises:
        ValueError: the run does not fit into the card.
    """
    if device.type == "cpu":
        return config.settled(), None
    card = card_of(device, CONTEXT_BYTES / GIB)
    plan = make_plan(config, student_folder, card, is_training=is_training)
    return plan.config, plan


def make_plan(config: Config, student_folder: Path, card: Card, *, is_training: bool) -> Plan:
    """Returns the memory plan of a run. Of the models it reads config.json only.

    Raises:
        ValueError: the run does not fit; the message says in one line what would help.
    """
    teacher = None
    if isinstance(config.teacher, LocalTeacherConfig) and config.rollout.max_attempts > 1:
        teacher = read_model(model_folder("teacher.path", config.teacher.path, weights=False))
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
    """Refuses a KV cache that is too small for the teacher, as LocalTeacher would, but earlier."""
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
    """Returns the plan with values chosen for "auto", whether it fits or not."""
    config = plan.asked
    card = plan.card

    def settled(token_budget: int, checkpointing: bool, kv: int = 0) -> Plan:
        chosen = config.settled(
            token_budget=token_budget,
            checkpointing=checkpointing,
            kv_cache_gib=kv / GIB,
        )
        return plan._replace(config=chosen)

    # Three sizes of the tensor shared by KV and gradients: the least before checkpointing is turned
    # on, the most that max_running rollouts can use, and what to aim at between the two.
    min_shared = max(plan.gradients, plan.kv_of(config.rollout.group_size))
    max_shared = max(plan.gradients, plan.kv_of(config.engine.max_running))
    target = KV_SHARE * (card.total_gib * GIB - sum(plan.residents.values()))
    target = max(min_shared, min(max_shared, target))
    if config.engine.kv_cache_gib != "auto":
        min_shared = target = max(plan.gradients, int(config.engine.kv_cache_gib * GIB))
    checkpointing = settled(1, False).room < min_shared
    # A microbatch holds the longest rollout whatever the budget is, so a smaller budget than that
    # would save nothing.
    packed = plan.longest[1]
    min_budget = max(packed // BUDGET_STEP, 1) * BUDGET_STEP
    budgets = range(MAX_TOKEN_BUDGET, packed, -BUDGET_STEP)
    fitting = (budget for budget in budgets if settled(budget, checkpointing).room >= target)
    token_budget = next(fitting, min_budget)
    room = settled(token_budget, checkpointing).room - int(card.others_gib * GIB)
    # The tensor must hold the gradients in any case, so KV may use as much.
    kv = min(max(room, plan.gradients), plan.kv_of(config.engine.max_running))
    kv = max(kv, plan.kv_of(1)) // plan.page_bytes * plan.page_bytes
    return settled(token_budget, checkpointing, kv)


def read_model(folder: Path) -> ModelConfig:
    """Reads a model's config.json; of the weights only their files' names are looked at."""
    # As load_student does, so that an adapter is called one here, too.
    check_is_model(folder)
    path = folder / "config.json"
    return ModelConfig.from_hf(read_json(path), where=str(path))


def changed(plan: Plan, section: str, **values: Any) -> Plan:
    """Returns the plan with other values in one section of its settings; nothing is chosen yet."""
    sections = {section: getattr(plan.asked, section).model_copy(update=values)}
    config = plan.asked.model_copy(update=sections)
    return plan._replace(asked=config, config=config)


# What may help a run that does not fit. Each lever is tried with the lowest value that still makes
# a useful run (256 new tokens, say). If the user's value is lower already, the lever does not make
# the run fit, so it is not named.
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
    """Returns one line that says why the run does not fit and what would help."""
    card = plan.card
    others_text = f", {card.others_gib:.1f} of them held by others (a card in use by others)" * (
        card.others_gib > 1
    )
    used_gib = card.total_gib - card.others_gib - plan.left / GIB
    reason = (
        f"the run must fit into the {card.total_gib:.1f} GiB of {card.name}{others_text}, got "
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
    """Returns the levers that each make the run fit; if there is none, pairs that do together."""
    pulled = {lever: pull(plan) for lever, pull in LEVERS.items()}
    sufficient = [lever for lever, pulled_plan in pulled.items() if fits(decide(pulled_plan))]
    pairs = combinations(LEVERS, 2)
    # A generator, as 55 pairs take time and are not needed where one lever suffices.
    sufficient_pairs = (
        " and ".join(pair) for pair in pairs if fits(decide(LEVERS[pair[1]](pulled[pair[0]])))
    )
    return sufficient or list(sufficient_pairs)


def fits(plan: Plan) -> bool:
    """Whether the run fits into the card and its longest rollout into the KV cache."""
    return plan.left >= 0 and plan.holds_longest
