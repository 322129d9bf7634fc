"""From hidden states to sampled tokens: LM head on the rows that need one, then the counter-based sampler."""

from __future__ import annotations

import torch
from torch import Tensor

from socpo_fast.engine.runner import pad_rows
from socpo_fast.engine.sequence import Sequence
from socpo_fast.model.decoder import Decoder
from socpo_fast.ops import row_keys, sample


@torch.no_grad()
def sample_tokens(
    student: Decoder, hidden_BD: Tensor, rows: list[tuple[int, Sequence, int]]
) -> list[tuple[int, float, float]]:
    """Sample one token a row; each row is (row of hidden_BD, its sequence, rollout_idx). One host read for all.

    The noise is keyed by (seed, batch, question, rollout, attempt, position, token id), so what is drawn does not
    depend on when or beside whom. Returns (token_id, logprob in nats, kept_mass) in the order of `rows`.
    """
    device = hidden_BD.device
    needed = sorted({row for row, _, _ in rows})
    place = {row: i for i, row in enumerate(needed)}
    logits = student.lm_head(pad_rows(hidden_BD[torch.tensor(needed, device=device)]))
    logits_BV = logits[torch.tensor([place[row] for row, _, _ in rows], device=device)]
    fields = [(s.params.seed, *s.key, rollout, s.attempt_idx, s.num_sampled) for _, s, rollout in rows]
    knobs = [(s.params.temperature, s.params.top_p, s.params.min_p, s.params.top_k) for _, s, _ in rows]
    temperature_B, top_p_B, min_p_B, top_k_B = torch.tensor(knobs, dtype=torch.float32, device=device).unbind(1)
    token_ids, logprobs, kept_mass = sample(
        logits_BV,
        row_keys(torch.tensor(fields, dtype=torch.int64, device=device)),
        temperature_B=temperature_B.contiguous(),
        top_k_B=top_k_B.to(torch.int64),
        top_p_B=top_p_B.contiguous(),
        min_p_B=min_p_B.contiguous(),
    )
    values = torch.stack((token_ids.double(), logprobs.double(), kept_mass.double()), dim=1).tolist()
    return [(int(token_id), logprob, mass) for token_id, logprob, mass in values]
