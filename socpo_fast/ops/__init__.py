"""Collects the public ops, one file each.

A file holds X_ref, the formula in plain torch, which is the specification; then X, which checks
its arguments (_checks.py), picks an implementation (_impl.py) and calls the op that is registered
with PyTorch (_register.py). Where to start: for training linear_logprob -> policy_loss ->
linear_policy_loss, for the engine rotary_write -> paged_attention -> linear_sample.
"""

from socpo_fast.ops._impl import available_impls
from socpo_fast.ops.adamw import adamw
from socpo_fast.ops.compute_advantages import compute_advantages
from socpo_fast.ops.credit_options import CreditOptions
from socpo_fast.ops.decay_advantage import Credit, credit_attempts, decay_rewards
from socpo_fast.ops.linear import linear
from socpo_fast.ops.linear_logprob import linear_logprob, next_token_rows
from socpo_fast.ops.linear_policy_loss import linear_policy_loss
from socpo_fast.ops.linear_sample import linear_sample
from socpo_fast.ops.paged_attention import paged_attention
from socpo_fast.ops.policy_loss import PolicyLoss, PolicyLossOptions, policy_loss
from socpo_fast.ops.rms_norm import rms_norm
from socpo_fast.ops.rotary import rotary, rotary_qkv
from socpo_fast.ops.rotary_write import rotary_write
from socpo_fast.ops.sample import next_keys, row_key, row_keys, sample
from socpo_fast.ops.swiglu import swiglu
from socpo_fast.ops.tree_attention import TreeMask, tree_attention, visible_until_of_sequences

__all__ = [
    "Credit",
    "CreditOptions",
    "PolicyLoss",
    "PolicyLossOptions",
    "TreeMask",
    "adamw",
    "available_impls",
    "compute_advantages",
    "credit_attempts",
    "decay_rewards",
    "linear",
    "linear_logprob",
    "linear_policy_loss",
    "linear_sample",
    "next_keys",
    "next_token_rows",
    "paged_attention",
    "policy_loss",
    "rms_norm",
    "rotary",
    "rotary_qkv",
    "rotary_write",
    "row_key",
    "row_keys",
    "sample",
    "swiglu",
    "tree_attention",
    "visible_until_of_sequences",
]
