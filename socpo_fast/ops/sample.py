"""Samples tokens with counter-based noise: a draw depends on its logits and its key only.

Read sample_ref for the mathematics, then noise_bits and row_keys. Departs from the textbook: there
is no random generator and no state. Gumbel noise is a hash of (row key, token id), so a rollout
replays bitwise by itself, in another batch, after preemption, and in a resumed run.

    (seed, batch, question, rollout, attempt, position)  --row_keys-->  64-bit key of one token
    (key, token id)  --noise_bits-->  32 bits  -->  uniform v  -->  Gumbel noise, added to a logit
"""

import torch
from torch import Tensor

from socpo_fast.ops._checks import FLOATS, INDEX, TensorChecker, check_rule
from socpo_fast.ops._impl import pick_impl
from socpo_fast.ops._register import define_op

_MASK_32 = 0xFFFFFFFF


def sample_ref(
    logits_BV: Tensor,
    row_keys_B: Tensor,
    temperature_B: Tensor,
    top_k_B: Tensor,
    top_p_B: Tensor,
    min_p_B: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `sample`, unchecked."""
    greedy_B1 = (temperature_B == 0)[:, None]
    z_BV = logits_BV.float() * torch.where(greedy_B1, 1.0, 1.0 / temperature_B[:, None])
    logprobs_BV = z_BV.double().log_softmax(-1)
    keep_BV = kept_tokens(logprobs_BV.exp(), top_k_B, top_p_B, min_p_B)
    # + 0.5 keeps v above 0. Large values round to 1 in fp32, so it is clamped below 1, to the
    # largest fp32 number there. Both ends would give infinite noise.
    v_BV = ((noise_bits(row_keys_B, logits_BV.shape[1]).float() + 0.5) * 2.0**-32).clamp(
        max=1 - 2.0**-24
    )
    gumbel_BV = torch.where(greedy_B1, 0.0, -torch.log(-torch.log1p(-v_BV)))
    token_ids_B = (z_BV + gumbel_BV).masked_fill(~keep_BV, -torch.inf).argmax(-1)
    logprobs_B = logprobs_BV.gather(-1, token_ids_B[:, None])[:, 0].float()
    kept_mass_B = (logprobs_BV.exp() * keep_BV).sum(-1).float()
    return token_ids_B, logprobs_B, kept_mass_B


def sample(
    logits_BV: Tensor,
    row_keys_B: Tensor,
    *,
    temperature_B: Tensor,
    top_k_B: Tensor,
    top_p_B: Tensor,
    min_p_B: Tensor,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws one token a row from softmax(logits / temperature) after top-k, top-p and min-p.

        z       = logits / temperature
        token   = argmax over kept i of z[i] - log(E[i])
        logprob = z[token] - logsumexp(z)
        E[i]    = -log1p(-v[i])                                       exponential noise
        v[i]    = (32 bits hashed from row key and i, + 0.5) / 2^32, clamped below 1

    Kept tokens: the top_k most likely ones (of equal ones the lower id); of those the smallest set
    of most likely ones whose share reaches top_p; of those the ones that are at least min_p times
    as likely as the most likely token.

    Args:
        logits_BV:     [B, V] floating point, V < 2^31. Read as fp32.
        row_keys_B:    [B] int64, one for each token to be drawn, from `row_keys`. Equal keys have
                       equal noise.
        temperature_B: [B] fp32, >= 0. 0 is greedy: takes the first of the largest logits; z is then
                       the logits themselves.
        top_k_B:       [B] int64, >= 0; 0 is off.
        top_p_B:       [B] fp32, in (0, 1]; 1 is off.
        min_p_B:       [B] fp32, in [0, 1); 0 is off.
        impl:          "auto", "ref" or "cpp".

    Returns:
        token_ids_B [B] int64;  logprobs_B [B] fp32, nats, under the temperature only, over the
        whole vocabulary; kept_mass_B [B] fp32, probability of the kept tokens, 1 if all filters
        are off. A row with NaN, +inf or no finite logit has log-prob NaN and an arbitrary token.

    Raises:
        ValueError: a shape, dtype or parameter breaks the rules above.

    Bitwise: same inputs, same bits; batch-invariant and thread-invariant. Implementations agree on
    the token unless the two best scores are within rounding of each other.
    Source: Gumbel-max (Gumbel 1954); counter-based noise as in Salmon et al. 2011.
    """
    check = TensorChecker("sample")
    check("logits_BV", logits_BV, FLOATS)
    check_draws(check, row_keys_B, temperature_B, top_k_B, top_p_B, min_p_B)
    return _sample(
        logits_BV,
        row_keys_B,
        temperature_B,
        top_k_B,
        top_p_B,
        min_p_B,
        pick_impl("sample", impl, logits_BV),
    )


def _kernel(
    logits_BV: Tensor,
    row_keys_B: Tensor,
    temperature_B: Tensor,
    top_k_B: Tensor,
    top_p_B: Tensor,
    min_p_B: Tensor,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    by_row = row_keys_B, temperature_B, top_k_B, top_p_B, min_p_B
    if impl == "ref":
        return sample_ref(logits_BV, *by_row)
    return torch.ops.socpo.sample(*(x.contiguous() for x in (logits_BV.float(), *by_row)))


_sample = define_op(
    "sample(Tensor logits, Tensor row_keys, Tensor temperature, Tensor top_k, Tensor top_p, "
    "Tensor min_p, str impl) -> (Tensor token_ids, Tensor logprobs, Tensor kept_mass)",
    _kernel,
    fake=lambda _logits, row_keys, temperature, *_: (
        row_keys.new_empty(row_keys.shape),
        temperature.new_empty(row_keys.shape),
        temperature.new_empty(row_keys.shape),
    ),
)


def kept_tokens(probs_BV: Tensor, top_k_B: Tensor, top_p_B: Tensor, min_p_B: Tensor) -> Tensor:
    """Returns [B, V] bool: the tokens that pass top-k, then top-p, then min-p."""
    # Sorting the vocabulary is slow, so it is skipped if all filters are off.
    if bool((top_k_B == 0).all() & (top_p_B == 1).all() & (min_p_B == 0).all()):
        return torch.ones_like(probs_BV, dtype=torch.bool)
    sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(probs_BV.shape[1], device=probs_BV.device)
    keep_BV = (top_k_B[:, None] == 0) | (rank_V < top_k_B[:, None])
    # top-p counts the share of what top-k kept. A token is kept if the mass before it is below
    # top_p: the token that reaches top_p is in.
    mass_BV = (sorted_BV * keep_BV).cumsum(-1)
    keep_BV &= (top_p_B[:, None] == 1) | (mass_BV - sorted_BV < top_p_B[:, None] * mass_BV[:, -1:])
    keep_BV &= sorted_BV >= min_p_B[:, None] * sorted_BV[:, :1]
    return torch.zeros_like(keep_BV).scatter(-1, order_BV, keep_BV)


def noise_bits(row_keys_B: Tensor, vocab_size: int) -> Tensor:
    """Returns [B, V] int64 in [0, 2^32), distinct within a row.

    The 32-bit mixer runs twice, once for each half of the key. It is a bijection, and so is the
    multiplication by an odd number; that is why no two tokens of a row have equal noise.
    """
    token_ids_V = torch.arange(vocab_size, device=row_keys_B.device)
    low_B1 = (row_keys_B & _MASK_32)[:, None]
    high_B1 = ((row_keys_B >> 32) & _MASK_32)[:, None]
    return _mix_32(_mix_32(((token_ids_V * 0x9E3779B1) & _MASK_32) ^ low_B1) ^ high_B1)


def row_key(*fields: int) -> int:
    """Returns the noise key of (seed, batch, question, rollout, attempt, position).

    Does the same as `row_keys` for a single row, without tensors. For fewer fields it returns the
    running state, to which `next_keys` adds one more field, for many rows at once.
    """
    state = 0
    for field in fields:
        x = (state + field + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        state = x ^ (x >> 31)
    return _signed(state)


def row_keys(fields: Tensor) -> Tensor:
    """Returns [B] int64 keys of [B, 6] (seed, batch, question, rollout, attempt, position).

    Each field is added to a running state, which SplitMix64's finaliser then scrambles (Steele et
    al. 2014).
    """
    state_B = torch.zeros_like(fields[:, 0])
    for field_B in fields.unbind(1):
        state_B = next_keys(state_B, field_B)
    return state_B


def next_keys(state_B: Tensor, field_B: Tensor) -> Tensor:
    """Adds one more field to each state; [B] int64."""
    return _mix_64(state_B + field_B + _signed(0x9E3779B97F4A7C15))


def _mix_32(x: Tensor) -> Tensor:
    """Applies a bijection to 32 bits held in int64 ("lowbias32", Wellons' hash-prospector)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK_32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK_32
    return x ^ (x >> 16)


def _mix_64(x: Tensor) -> Tensor:
    """Applies SplitMix64's finaliser.

    It is defined for unsigned numbers: int64 products wrap in the same way, and a mask makes the
    right shifts logical.
    """
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & (2**33 - 1))


def _signed(x: int) -> int:
    """Returns the int64 that has the bits of an unsigned 64-bit number."""
    return x - 2**64 if x >= 2**63 else x


def check_draws(
    check: TensorChecker,
    row_keys_B: Tensor,
    temperature_B: Tensor,
    top_k_B: Tensor,
    top_p_B: Tensor,
    min_p_B: Tensor,
) -> None:
    """Checks the settings of draws; `check` must know V, the vocabulary size, already."""
    check_rule(check.where, "V", check.sizes["V"], 0 < check.sizes["V"] < 2**31, "in [1, 2^31)")
    check.each(INDEX, row_keys_B=row_keys_B, top_k_B=top_k_B)
    check.each((torch.float32,), temperature_B=temperature_B, top_p_B=top_p_B, min_p_B=min_p_B)
    check.finite("temperature_B", temperature_B, at_least=0.0)
    check.index_range("top_k_B", top_k_B, 2**31)
    check.every("top_p_B", top_p_B, (top_p_B > 0) & (top_p_B <= 1), "in (0, 1]")
    check.every("min_p_B", min_p_B, (min_p_B >= 0) & (min_p_B < 1), "in [0, 1)")
