"""Lists the metrics and what each one means (METRICS). report/tracker.py writes the rows."""

import re
from typing import Literal

METRICS: dict[str, str] = {
    "success/unassisted": "share of rollouts whose first attempt, made alone, is correct: the "
    "headline",
    "success/assisted": "share of rollouts correct in any attempt, guided ones included; never "
    "the headline",
    "success/pass_at_4": "chance that one of 4 first attempts is correct, unbiased (pass_at_16 "
    "for 16, ..)",
    "reward/mean": "mean reward of an attempt, after decay",
    "reward/std": "standard deviation of these rewards over the attempts of the batch",
    "reward/groups_without_signal": "share of questions whose attempts all have the same reward, "
    "after decay, so that none stands out from its group",
    "decay/f_1": "factor on the reward of second attempts, the first ones' mean reward (f_2 for "
    "third ones, ..)",
    "guidance/rate": "share of rollouts in which the student was shown guidance",
    "guidance/rescue_rate": "share of guided rollouts that end correct",
    "guidance/leak_rate": "share of what the teacher said that states the answer, whether it was "
    "shown or not",
    "guidance/failed": "rollouts that ended because the teacher failed, count (_timeout, _cut, "
    "..: for that reason)",
    "guidance/leaked": "rollouts that ended because the guidance leaked and teacher.on_leak is "
    "drop, count",
    "guidance/overflow": "rollouts that ended because the next context would exceed the model's "
    "length, count",
    "rollout/attempt_tokens": "mean length of an attempt, tokens",
    "rollout/attempt_tokens_min": "length of the shortest attempt, tokens",
    "rollout/attempt_tokens_max": "length of the longest attempt, tokens",
    "rollout/truncated": "share of attempts that hit the length limit",
    "policy/loss": "clipped policy loss of the update",
    "policy/entropy": "mean entropy of the next token at temperature, nats",
    "policy/ratio_mean": "mean of exp(logprob - old logprob)",
    "policy/approx_kl": "KL from the policy of the old log-probs to the student, estimated on "
    "their tokens (k3: mean of ratio - 1 - log ratio), nats",
    "policy/clip_fraction": "share of loss tokens whose ratio was clipped",
    "policy/grad_norm": "norm of the gradient before clipping",
    "policy/lr": "learning rate of the update",
    "policy/bad_updates": "updates skipped so far because loss or gradient was not finite, count",
    "policy/sampler_mismatch_nats": "largest |trainer's - sampler's| log-prob of a sampled token, "
    "nats",
    "policy/sampler_mismatch_mean_nats": "mean of |trainer's - sampler's| log-prob of the sampled "
    "tokens, nats",
    "perf/rollout_tok_s": "sampled tokens a second of rollout, tok/s",
    "perf/tokens_total": "tokens sampled in training rollouts since the run began, count",
    "perf/train_tok_s": "tokens forwarded a second of update, tok/s",
    "perf/prefill_tokens": "prompt, bridge and recomputed tokens the engine read, count",
    "perf/decode_tokens": "tokens sampled in decode rounds (an attempt's first one comes with its "
    "prefill), count",
    "perf/preemptions": "sequences that gave up their pages and were recomputed, count",
    "perf/tokens_forwarded": "tokens that passed the layers in the update, count",
    "perf/unique_tokens": "nodes of the rollout trees of the update (prompt once a group), idle "
    "ones too, tokens",
    "perf/peak_memory_gib": "most memory of tensors on the card since the run started, GiB",
    "perf/microbatches": "forward-backward passes of the update, count",
    "perf/idle_rollouts": "rollouts of the update whose advantages are all 0, so that they pass "
    "no layer, count",
    "time/rollout_s": "rollout, guidance included, s",
    "time/teacher_wait_s": "mean wait of a guided rollout for its teacher, s",
    "time/update_s": "all updates of the batch, s",
    "time/total_s": "all of it, s",
}
Kind = Literal["batch", "update", "eval"]
# Metrics that exist with other numbers (pass_at_16, f_2), as ends of a confidence interval, and per
# data source. METRICS holds one entry for each family.
_FAMILY = re.compile(
    r"(success/(?:unassisted|assisted|pass_at_[0-9]+)|decay/f_[0-9]+)(_low|_high)?(/[\w./-]+)?",
    re.ASCII,
)


def meaning_of(name: str) -> str | None:
    """Returns the meaning of a metric, None if unknown; families are resolved to their entry."""
    name = re.sub("^guidance/failed_[a-z0-9_]+$", "guidance/failed", name)
    if name in METRICS or (match := _FAMILY.fullmatch(name)) is None:
        return METRICS.get(name)
    base_name, suffix, source = match.groups()
    base_name = (
        re.sub(r"pass_at_[0-9]+", "pass_at_4", base_name)
        if "pass_at" in base_name
        else re.sub("_[0-9]+", "_1", base_name)
    )
    suffix_meanings = {
        "_low": "lower end of the 95 % interval: ",
        "_high": "upper end of the 95 % interval: ",
        None: "",
    }
    return (
        suffix_meanings[suffix]
        + METRICS[base_name]
        + (f"; questions of {source[1:]} only" if source else "")
    )
