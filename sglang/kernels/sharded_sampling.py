"""Sampling from logits that are spread over ranks, each of which has some of the vocabulary.

Both the most likely token and the Gumbel-max draw are the token of the highest score, and of scores
a rank needs to tell the others no more than its highest. Score and token make up one number, so
that the largest of the ranks' numbers names the token, the first of equals too. The noise hashes a
token's id in the whole vocabulary: the draw is the one of `sample`, whoever makes it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang.kernels.gumbel import gumbel, gumbel_naive

_NO_TOKEN = 0x7FFFFFFF


def best_keys(
    logits: torch.Tensor,
    first: int,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Each row's best of this rank's tokens, int64 [n], to be maximised over ranks.

    logits        [n, V], any float dtype, of the tokens first..first+V-1
    temperature, seed, positions    as for `sample`, which has filters besides
    """
    run = best_keys_triton if logits.is_cuda else best_keys_naive
    return run(logits, first, temperature, seed, positions)


def tokens_of(keys: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """int64 [n] -> int32 [n]. NaN logits give any token, but none outside of the vocabulary."""
    return (_NO_TOKEN - (keys & 0xFFFFFFFF)).clamp_(max=vocab_size - 1).int()


def best_keys_naive(
    logits: torch.Tensor,
    first: int,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    scores = logits.to(torch.float32, copy=True)
    knobs = zip(temperature.tolist(), seed.tolist(), positions.tolist(), strict=True)
    for row, (temp, row_seed, position) in zip(scores, knobs, strict=True):
        if temp > 0:
            noise = gumbel_naive(row_seed, position, len(row), row.device, first)
            row.copy_(noise.add_(row / temp))
    if scores.shape[1] == 0:  # the last of many ranks
        return torch.full((len(scores),), torch.iinfo(torch.int64).min, device=scores.device)
    best, token = scores.max(-1)
    bits = (best + 0.0).view(torch.int32)  # -0 is 0
    # The order of floats is that of their bits as int32, but that negative ones run backwards.
    ordered = (bits ^ (bits >> 31 & 0x7FFFFFFF)).long()
    return ordered << 32 | (_NO_TOKEN - first - token)


@triton.jit(
    do_not_specialize=["first"],
    do_not_specialize_on_alignment=["temperature_ptr", "seed_ptr", "positions_ptr"],
)
def _best_keys_kernel(
    logits_ptr,
    temperature_ptr,
    seed_ptr,
    positions_ptr,
    out_ptr,  # int64 [n], of which the kernel makes maxima
    stride,
    first,
    V,
    NO_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(logits_ptr + row * stride + at, mask=at < V, other=-float("inf"))
    score = score.to(tl.float32)
    ids = first + at
    temperature = tl.load(temperature_ptr + row)
    if temperature > 0:
        seed = tl.load(seed_ptr + row).to(tl.int64)
        score = score / temperature + gumbel(seed, tl.load(positions_ptr + row), ids)
    best = tl.max(score, 0)
    token = tl.min(tl.where(score == best, ids, NO_TOKEN), 0)
    bits = (best + 0.0).to(tl.int32, bitcast=True)  # -0 is 0
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    tl.atomic_max(out_ptr + row, (ordered << 32) | (NO_TOKEN - token), sem="relaxed")


def best_keys_triton(
    logits: torch.Tensor,
    first: int,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    positions: torch.Tensor,
    block: int = 4096,
    num_warps: int = 8,
) -> torch.Tensor:
    num_rows, num_tokens = logits.shape
    lowest = torch.iinfo(torch.int64).min
    out = torch.full((num_rows,), lowest, dtype=torch.int64, device=logits.device)
    if logits.numel():
        _best_keys_kernel[(triton.cdiv(num_tokens, block), num_rows)](
            logits, temperature, seed, positions, out, logits.stride(0), first, num_tokens,
            NO_TOKEN=_NO_TOKEN, BLOCK=block, num_warps=num_warps,
        )  # fmt: skip
    return out
