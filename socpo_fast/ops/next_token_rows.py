"""From a padded batch, as Hugging Face models take and return it, to what the LM-head ops take."""

import torch
from torch import Tensor

from socpo_fast.ops._checks import FLOATS, INDEX, TensorChecker


def next_token_rows(hidden_BLD: Tensor, labels_BL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Flattens a batch so that position l predicts label l + 1, with -100 for rows without loss.

        hidden_BLD = model.model(input_ids, attention_mask).last_hidden_state
        hidden_TD, targets_N, rows_N = next_token_rows(hidden_BLD, labels)
        logprobs_N, _ = linear_logprob(
            hidden_TD, model.lm_head.weight, targets_N, rows_N=rows_N, temperature=1.0,
        )
        loss = -logprobs_N.nanmean()       # the model's own: cross entropy of the shifted labels

    Args:
        hidden_BLD: [B, L, D] fp32, fp64, bf16 or fp16. The last hidden states.
        labels_BL:  [B, L] int64, each in [0, V), or -100 (prompt, padding).

    Returns:
        hidden_TD [T = B L, D];  targets_N, rows_N [N = B (L - 1)] int64. The shapes do not depend
        on the labels; the ops leave rows of target -100 out.

    Raises:
        ValueError: a shape or dtype breaks the rules above.

    Gradient: hidden.
    """
    check = TensorChecker("next_token_rows")
    check("hidden_BLD", hidden_BLD, FLOATS)
    check("labels_BL", labels_BL, INDEX)
    rows_BL = torch.arange(labels_BL.numel(), device=labels_BL.device).view(labels_BL.shape)
    return hidden_BLD.flatten(0, 1), labels_BL[:, 1:].flatten(), rows_BL[:, :-1].flatten()
