"""Noise for the Gumbel-max trick as a pure hash of (seed, position, token id)."""

from __future__ import annotations

import math
import os

import torch
import triton
import triton.language as tl

# Multipliers of "lowbias32" (Chris Wellons, public domain), and 2^32 / golden ratio.
_C1 = tl.constexpr(0x7FEB352D)
_C2 = tl.constexpr(0x846CA68B)
_C3 = tl.constexpr(0x9E3779B1)
_LN2 = tl.constexpr(math.log(2))
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


def gumbel_naive(
    seed: int, position: int, count: int, device: torch.device, first: int = 0
) -> torch.Tensor:
    """The noise of tokens first..first+count-1, float32 [count]."""
    c1, c2, c3 = _C1.value, _C2.value, _C3.value
    key = _mix((seed & _U32) + c3)
    key = _mix(key ^ (seed >> 32 & _U32))
    key = _mix(key ^ (position & _U32))
    x = torch.arange(first, first + count, dtype=torch.int32, device=device)
    x = x.mul_(_signed(c3)).add_(_signed(key))
    x = _shift_xor(x, 16).mul_(_signed(c1))
    x = _shift_xor(x, 15).add_(_signed(_mix(key + c3))).mul_(_signed(c2))
    x = _shift_xor(x, 16).bitwise_right_shift_(1).bitwise_and_(0x7FFFFFFF)
    uniform = x.float().add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


_U32 = (1 << 32) - 1


def _mix(x: int) -> int:
    """A bijective hash of a uint32."""
    x &= _U32
    x = (x ^ x >> 16) * _C1.value & _U32
    x = (x ^ x >> 15) * _C2.value & _U32
    return x ^ x >> 16


def _signed(x: int) -> int:
    """The int32 with the bits of a uint32: torch has full arithmetic only for the former."""
    return x - (1 << 32) if x >> 31 else x


def _shift_xor(x: torch.Tensor, shift: int) -> torch.Tensor:
    """x ^ (x >> shift), where the shift fills with zeros though x is signed."""
    return x ^ (x >> shift).bitwise_and_((1 << 32 - shift) - 1)


@triton.jit
def _mix_triton(x):
    x = (x ^ (x >> 16)) * _C1
    x = (x ^ (x >> 15)) * _C2
    return x ^ (x >> 16)


@triton.jit
def _log(x):
    """To within 1e-6 or so, by one instruction: tl.log takes twenty."""
    if _INTERPRETED:
        log2 = tl.log2(x)
    else:
        log2 = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return log2 * _LN2


@triton.jit
def gumbel(seed, position, ids):
    """seed int64, position int32, ids [..] -> the noise of gumbel_naive."""
    key = _mix_triton(seed.to(tl.uint32) + _C3)
    key = _mix_triton(key ^ (seed >> 32).to(tl.uint32))
    key = _mix_triton(key ^ position.to(tl.uint32))
    x = ids.to(tl.uint32) * _C3 + key
    x = (x ^ (x >> 16)) * _C1
    x = ((x ^ (x >> 15)) + _mix_triton(key + _C3)) * _C2
    x = (x ^ (x >> 16)) >> 1
    uniform = tl.minimum((x.to(tl.int32).to(tl.float32) + 0.5) * (2.0**-31), 1 - 2.0**-24)
    # -log(1 - u), by its series near 0: these are the tokens that win, and 1 - u would round off
    # most of what tells them apart.
    series = uniform * (1.0 + uniform * (0.5 + uniform * (1.0 / 3.0)))
    return -_log(tl.where(uniform < 2.0**-7, series, -_log(1.0 - uniform)))
