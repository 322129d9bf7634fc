"""One step of the engine as tensors: what the runner packs, and the decode loop keeps up to date."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Step:
    """Where one step's tokens are and what they see; all tensors on the device."""

    token_ids_T: Tensor  # [T] int64
    positions_T: Tensor  # [T] int64
    slots_T: Tensor  # [T] int64, page * page_size + place in it
    block_table_BM: Tensor  # int32
    seq_lens_B: Tensor  # int32, this step's tokens included
    cu_seqlens_q: Tensor  # [B + 1] int32
    max_seqlen_q: int
    max_seqlen_k: int
