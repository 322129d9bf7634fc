"""From hidden states to sampled tokens: LM head and draw in one op, on the rows that need it.

The noise is keyed by (seed, batch, question, rollout, attempt, position, token id), so what is
drawn does not depend on when or beside whom.
"""

import torch
from torch import Tensor

from socpo_fast.device import upload
from socpo_fast.engine.sequence import Sequence
from socpo_fast.model.decoder import Decoder
from socpo_fast.ops import next_keys
from socpo_fast.ops._impl import pick_impl
from socpo_fast.ops.linear_sample import linear_sample_op


@torch.no_grad()
def launch_draw(student: Decoder, hidden_BD: Tensor, rows: list[tuple[int, Sequence]]) -> Tensor:
    """For each (row of hidden_BD, sequence): token_id, logprob in nats, kept_mass; [3, len(rows)]
    fp64.
    """
    device = hidden_BD.device
    sequences = [sequence for _, sequence in rows]
    indices = [(row, sequence.noise_key, sequence.num_sampled) for row, sequence in rows]
    rows_B, noise_B, position_B = upload(torch.tensor(indices).t().contiguous(), device)
    return draw(
        student,
        hidden_BD,
        next_keys(noise_B, position_B),
        settings_of(sequences, device),
        any(s.params.is_filtered for s in sequences),
        rows_B,
    )


def settings_of(sequences: list[Sequence], device: torch.device) -> Tensor:
    """[4, B] fp32: temperature, top_p, min_p, top_k. Above 2^24 no vocabulary is that large: top_k
    is off.
    """
    settings = [
        (p.temperature, p.top_p, p.min_p, p.top_k if p.top_k < 2**24 else 0)
        for p in (sequence.params for sequence in sequences)
    ]
    return upload(torch.tensor(settings, dtype=torch.float32).t().contiguous(), device)


def draw(
    student: Decoder,
    hidden_TD: Tensor,
    row_keys_B: Tensor,
    settings_4B: Tensor,
    is_filtered: bool,
    rows_B: Tensor | None = None,
) -> Tensor:
    """[3, B] fp64: token id, log-prob, kept mass."""
    temperature_B, top_p_B, min_p_B, top_k_B = settings_4B
    token_ids_B, logprobs_B, _, kept_mass_B = linear_sample_op(
        hidden_TD,
        student.lm_head.weight,
        row_keys_B,
        temperature_B,
        top_k_B.long(),
        top_p_B,
        min_p_B,
        rows_B,
        is_filtered,
        pick_impl("linear_sample", "auto", hidden_TD),
    )
    return torch.stack((token_ids_B.double(), logprobs_B.double(), kept_mass_B.double()))
