"""From hidden states to sampled tokens: LM head and draw in one op, on the rows that need it."""

from __future__ import annotations

import torch
from torch import Tensor

from socpo_fast.engine.sequence import Sequence
from socpo_fast.model.decoder import Decoder
from socpo_fast.ops import next_keys
from socpo_fast.ops.linear_sample import linear_sample_unchecked


@torch.no_grad()
def sample_tokens(
    student: Decoder, hidden_BD: Tensor, rows: list[tuple[int, Sequence]]
) -> list[tuple[int, float, float]]:
    """Sample one token for each (row of hidden_BD, sequence). One host read for all.

    The noise is keyed by (seed, batch, question, rollout, attempt, position, token id), so what is drawn does not
    depend on when or beside whom. Returns (token_id, logprob in nats, kept_mass) in the order of `rows`.
    """
    device = hidden_BD.device
    indices = [(row, sequence.noise_key, sequence.num_sampled, sequence.params.top_k) for row, sequence in rows]
    rows_B, noise_B, position_B, top_k_B = torch.tensor(indices, device=device).unbind(1)
    params = [sequence.params for _, sequence in rows]
    knobs = torch.tensor([(p.temperature, p.top_p, p.min_p) for p in params], dtype=torch.float32, device=device)
    temperature_B, top_p_B, min_p_B = knobs.t().contiguous()
    token_ids, logprobs, _, kept_mass = linear_sample_unchecked(
        hidden_BD,
        student.lm_head.weight,
        next_keys(noise_B, position_B),
        temperature_B=temperature_B,
        top_k_B=top_k_B.contiguous(),
        top_p_B=top_p_B,
        min_p_B=min_p_B,
        rows_B=rows_B.contiguous(),
    )
    values = torch.stack((token_ids.double(), logprobs.double(), kept_mass.double()), dim=1).tolist()
    return [(int(token_id), logprob, mass) for token_id, logprob, mass in values]
