"""Public ops, each in its own file: checks, then the choice of an implementation, with the reference right above."""

from socpo_fast.ops._impl import available_impls
from socpo_fast.ops.decay_advantage import compute_advantages, decay_factors, decay_rewards
from socpo_fast.ops.linear_logprob import linear_logprob
from socpo_fast.ops.linear_policy_loss import linear_policy_loss
from socpo_fast.ops.packed_attention import Segment, packed_attention
from socpo_fast.ops.paged_attention import paged_attention, paged_attention_unchecked
from socpo_fast.ops.policy_loss import PolicyLoss, policy_loss
from socpo_fast.ops.sample import row_key, row_keys, sample

__all__ = [
    "PolicyLoss",
    "Segment",
    "available_impls",
    "compute_advantages",
    "decay_factors",
    "decay_rewards",
    "linear_logprob",
    "linear_policy_loss",
    "packed_attention",
    "paged_attention",
    "paged_attention_unchecked",
    "policy_loss",
    "row_key",
    "row_keys",
    "sample",
]
