"""Holds the Gumbel noise of a draw: a hash of row key and token id, bit for bit ops/sample.py's.

Read gumbel -> _noise_bits -> _mix_32. There is no random state, so what a row draws does not depend
on the batch it is in.
"""

import triton
import triton.language as tl

# 2^32 over the golden ratio: spreads neighbouring token ids over all 32 bits.
_GOLDEN = tl.constexpr(0x9E3779B1)
_MIX_1 = tl.constexpr(0x7FEB352D)
_MIX_2 = tl.constexpr(0x846CA68B)
_INV_2_32 = tl.constexpr(2.0**-32)
# The largest fp32 below 1. The highest hashes round to 1 as fp32, whose -log(1 - v) is infinite.
_BELOW_1 = tl.constexpr(1 - 2.0**-24)


@triton.jit
def gumbel(row_keys, token_ids):
    """Returns the Gumbel noise of each row and token, [rows, tokens] fp32."""
    # + 0.5, so that v is never 0: the noise would be infinite.
    v = tl.minimum((_noise_bits(row_keys, token_ids).to(tl.float32) + 0.5) * _INV_2_32, _BELOW_1)
    return -tl.log(_minus_log1p(v))


@triton.jit
def _noise_bits(row_keys, token_ids):
    """Returns noise_bits of ops/sample.py, [rows, tokens] uint32."""
    low = row_keys.to(tl.uint32)
    high = (row_keys >> 32).to(tl.uint32)
    return _mix_32(
        _mix_32((token_ids.to(tl.uint32) * _GOLDEN)[None, :] ^ low[:, None]) ^ high[:, None]
    )


@triton.jit
def _mix_32(x):
    """Scrambles 32 bits, one to one: two tokens of a row never share their bits."""
    x = (x ^ (x >> 16)) * _MIX_1
    x = (x ^ (x >> 15)) * _MIX_2
    return x ^ (x >> 16)


@triton.jit
def _minus_log1p(v):
    """Returns -log(1 - v) for 2^-33 <= v < 1, within a few units in the last place."""
    # Triton has no log1p. 1 - v is rounded, so its log is that of another number, 1 - v_rounded;
    # -log(1 - v) / v hardly differs between the two. If 1 - v rounds to 1, the result is v.
    one_minus_v = 1.0 - v
    v_rounded = 1.0 - one_minus_v
    return tl.where(
        v_rounded == 0, v, -tl.log(one_minus_v) * (v / tl.where(v_rounded == 0, 1.0, v_rounded))
    )
