"""Draws tokens from hidden states: LM head and sampling in one op, on the rows that need it.

Read launch_draw, which an ordinary step calls, then draw, which the decode loop calls as well. The
noise is keyed by (seed, batch, question, rollout, attempt, position, token id). So a drawn token
depends neither on when it is drawn nor on the other rows of the batch.
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
    """Draws a token for each (row of hidden_BD, sequence); does not wait for the device.

    Returns:
        [3, len(rows)] fp64: token id, logprob in nats, kept mass. Rows of hidden_BD may repeat: all
        rollouts of a group draw their first token from the prompt's one row.
    """
    device = hidden_BD.device
    sequences = [sequence for _, sequence in rows]
    row_inputs = [(row, sequence.noise_key, sequence.num_sampled) for row, sequence in rows]
    rows_B, noise_B, position_B = upload(torch.tensor(row_inputs).t().contiguous(), device)
    return draw(
        student,
        hidden_BD,
        next_keys(noise_B, position_B),
        settings_of(sequences, device),
        any(s.params.is_filtered for s in sequences),
        rows_B,
    )


def settings_of(sequences: list[Sequence], device: torch.device) -> Tensor:
    """Returns [4, B] fp32: temperature, top_p, min_p, top_k of each sequence."""
    # fp32 holds integers exactly only up to 2^24. No vocabulary is that large, so a larger top_k
    # filters nothing and becomes 0, which is off.
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
    """Returns [3, B] fp64: token id, logprob, kept mass.

    Args:
        is_filtered: whether any draw has top-k, top-p or min-p. The host knows it; the op would
                     have to read settings_4B back from the device.
        rows_B:      the row of hidden_TD that each draw uses; None: draw b uses row b.
    """
    temperature_B, top_p_B, min_p_B, top_k_B = settings_4B
    # The registered op itself: linear_sample's checks would wait for the device as well.
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
    # One tensor, so that the host reads a step back once. fp64 holds token ids and fp32 exactly.
    return torch.stack((token_ids_B.double(), logprobs_B.double(), kept_mass_B.double()))
