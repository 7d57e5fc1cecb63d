"""Tiles of the KV cache, of 16-bit or of 8-bit floats.

A head's elements are in two parts, a and b, that are multiplied apart. Of a 16-bit cache that is
its first half and the rest. An 8-bit cache is read as pairs (PAIRS), of which a is the first: so
tiles are of 16-bit elements, which load into the layout of the tensor cores as they are, and a pair
takes two instructions to be two float16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang.kernels.rope import to_cache

# Two pairs of 8-bit floats -> the first and the second of each, as float16.
_UNPAIR = tl.constexpr("""{
.reg .b16 low, high;
.reg .b32 p, q;
mov.b32 {low, high}, $2;
cvt.rn.f16x2.e4m3x2 p, low;
cvt.rn.f16x2.e4m3x2 q, high;
prmt.b32 $0, p, q, 0x5410;
prmt.b32 $1, p, q, 0x7632;
}""")


@triton.jit
def load_tile(
    base, offset, seen, half, a, b, D: tl.constexpr, PAIRS: tl.constexpr, ASM: tl.constexpr
):
    """(columns a, columns b) of a tile of K or V, [BLOCK_N, BLOCK_D / 2] each. PAIRS: the cache has
    8-bit floats, and its elements are two of them: a is the even columns, b the odd ones."""
    if PAIRS:
        mask = seen[:, None] & (half[None, :] < D // 2)
        both = tl.load(base + offset + half[None, :], mask=mask, other=0)
        if ASM:
            even, odd = tl.inline_asm_elementwise(
                _UNPAIR, "=r,=r,r", [both], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
            )
            return even, odd
        even = (both & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
        odd = ((both >> 8) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
        return even, odd
    else:
        mask_a = seen[:, None] & (a[None, :] < D)
        mask_b = seen[:, None] & (b[None, :] < D)
        return (
            tl.load(base + offset + a[None, :], mask=mask_a, other=0.0),
            tl.load(base + offset + b[None, :], mask=mask_b, other=0.0),
        )


@triton.jit
def store_new(at, x_a, x_b, a, b, half, D: tl.constexpr, PAIRS: tl.constexpr):
    """A token's K or V goes into the cache -> what is there, in the parts of load_tile."""
    if PAIRS:
        x_a, x_b = to_cache(x_a, tl.float8e4nv), to_cache(x_b, tl.float8e4nv)
        even, odd = x_a.to(tl.uint8, bitcast=True), x_b.to(tl.uint8, bitcast=True)
        both = even.to(tl.int16) | (odd.to(tl.int16) << 8)
        tl.store(at + half[None, :], both, mask=(half < D // 2)[None, :])
    else:
        tl.store(at + a[None, :], x_a, mask=(a < D)[None, :])
        tl.store(at + b[None, :], x_b, mask=(b < D)[None, :])
    return x_a.to(tl.float32), x_b.to(tl.float32)
