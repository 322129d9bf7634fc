"""The noise of a draw, a hash of row key and token id: bit for bit that of ops/sample.py."""

import triton
import triton.language as tl

_GOLDEN = tl.constexpr(0x9E3779B1)
_MIX_1 = tl.constexpr(0x7FEB352D)
_MIX_2 = tl.constexpr(0x846CA68B)
_INV_2_32 = tl.constexpr(2.0**-32)
_BELOW_1 = tl.constexpr(1 - 2.0**-24)


@triton.jit
def gumbel(row_keys, token_ids):
    """Gumbel noise of each row and token, [rows, tokens] fp32."""
    v = tl.minimum((_noise_bits(row_keys, token_ids).to(tl.float32) + 0.5) * _INV_2_32, _BELOW_1)
    return -tl.log(_minus_log1p(v))


@triton.jit
def _noise_bits(row_keys, token_ids):
    """noise_bits of ops/sample.py, [rows, tokens] uint32."""
    low = row_keys.to(tl.uint32)
    high = (row_keys >> 32).to(tl.uint32)
    return _mix_32(
        _mix_32((token_ids.to(tl.uint32) * _GOLDEN)[None, :] ^ low[:, None]) ^ high[:, None]
    )


@triton.jit
def _mix_32(x):
    x = (x ^ (x >> 16)) * _MIX_1
    x = (x ^ (x >> 15)) * _MIX_2
    return x ^ (x >> 16)


@triton.jit
def _minus_log1p(v):
    """-log(1 - v) for 2^-33 <= v < 1, within a few units in the last place: the rounding of 1 - v
    is made up for.
    """
    rest = 1.0 - v
    lost = 1.0 - rest
    return tl.where(lost == 0, v, -tl.log(rest) * (v / tl.where(lost == 0, 1.0, lost)))
