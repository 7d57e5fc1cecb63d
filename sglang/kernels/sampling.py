"""Sampling the next token without a sort and without a generator's state.

A draw is the Gumbel-max trick: the token that maximises logit / temperature + noise is distributed
as the softmax. The noise is a pure hash of (seed, position, token id), so a request's tokens depend
neither on the batch it is in nor on the rank or the device that draws them.
"""

from __future__ import annotations

import math

import torch

_C1, _C2, _C3 = 0x7FEB352D, 0x846CA68B, 0x9E3779B1
"""Multipliers of "lowbias32" (Chris Wellons, public domain), and 2^32 / golden ratio."""


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seed: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """logits [n, V], any float dtype -> token ids, int32 [n].

    temperature  float32 [n]; 0: the most likely token, of equals the first
    top_k        int32 [n]; only tokens as likely as the k-th most likely; 0: all
    top_p        float32 [n]; of those, only the fewest likeliest that together hold this share,
                 and tokens as likely as the last of them; 1: all
    min_p        float32 [n]; only tokens at least this likely relative to the likeliest; 0: all
    seed         int32 or int64 [n]
    positions    int32 [n], of the token to draw: one seed draws anew at each
    """
    return sample_naive(logits, temperature, top_k, top_p, min_p, seed, positions)


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """logits [n, V] -> the most likely token of each row, of equals the first, int32 [n]."""
    return greedy_naive(logits)


def greedy_naive(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1).int()


def sample_naive(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seed: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    out = greedy_naive(logits)
    knobs = zip(
        temperature.tolist(), top_k.tolist(), top_p.tolist(), min_p.tolist(),
        seed.tolist(), positions.tolist(), strict=True,
    )  # fmt: skip
    for i, (temp, k, p, relative, row_seed, position) in enumerate(knobs):
        if temp > 0:
            scaled = logits[i].float() / temp
            floor = floor_naive(scaled, k, p, relative)
            noise = gumbel_naive(row_seed, position, len(scaled), scaled.device)
            out[i] = noise.add_(scaled).masked_fill_(scaled < floor, -float("inf")).argmax()
    return out


def floor_naive(scaled: torch.Tensor, top_k: int, top_p: float, min_p: float) -> float:
    """The least of the scaled logits [V] that the three filters leave in."""
    floor = -float("inf")
    best = float(scaled.max())
    if 0 < top_k < len(scaled):
        floor = float(scaled.topk(top_k).values[-1])
    if top_p < 1:
        kept = scaled[scaled >= floor]
        target = float((kept - best).exp_().sum()) * top_p
        for count in (1024, len(kept)):  # Few tokens hold most of the mass: seldom sort them all.
            largest = kept.topk(min(count, len(kept))).values
            reached = (largest - best).exp_().cumsum_(0) >= target
            if reached[-1]:
                floor = float(largest[reached.int().argmax()])
                break
    if min_p > 0:
        floor = max(floor, best + math.log(min_p))
    return floor


def gumbel_naive(seed: int, position: int, count: int, device: torch.device) -> torch.Tensor:
    """The noise of tokens 0..count-1, float32 [count]."""
    key = _mix((seed & _U32) + _C3)
    key = _mix(key ^ (seed >> 32 & _U32))
    key = _mix(key ^ (position & _U32))
    x = torch.arange(count, dtype=torch.int32, device=device).mul_(_signed(_C3)).add_(_signed(key))
    x = _shift_xor(x, 16).mul_(_signed(_C1))
    x = _shift_xor(x, 15).add_(_signed(_mix(key + _C3))).mul_(_signed(_C2))
    uniform = (_shift_xor(x, 16) >> 9).bitwise_and_((1 << 23) - 1).float().add_(0.5).mul_(2.0**-23)
    return uniform.log_().neg_().log_().neg_()


_U32 = (1 << 32) - 1


def _mix(x: int) -> int:
    x &= _U32
    x = (x ^ x >> 16) * _C1 & _U32
    x = (x ^ x >> 15) * _C2 & _U32
    return x ^ x >> 16


def _signed(x: int) -> int:
    """The int32 with the bits of a uint32: torch has full arithmetic only for the former."""
    return x - (1 << 32) if x >> 31 else x


def _shift_xor(x: torch.Tensor, shift: int) -> torch.Tensor:
    """x ^ (x >> shift), where the shift fills with zeros though x is signed."""
    return x ^ (x >> shift).bitwise_and_((1 << 32 - shift) - 1)
