"""Sampling the next token without a sort and without a generator's state.

A draw is the Gumbel-max trick: the token that maximises logit / temperature + noise is distributed
as the softmax. The noise is a pure hash of (seed, position, token id), so a request's tokens depend
neither on the batch it is in nor on the rank or the device that draws them.

top-k, top-p and min-p all keep the tokens whose logit is at least some pivot. Histograms say in
which bin of logits it lies, and bisection finds it among the tokens of that bin; bisection is as in
FlashInfer (Ye et al., 2025).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from sglang.kernels.gumbel import gumbel, gumbel_naive

# Kernel arguments whose alignment varies from step to step: it must not compile a kernel anew.
_KNOBS = ["temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "seed_ptr", "positions_ptr"]

_BINS = tl.constexpr(16)
"""Of a chunk's histogram. They are of width 1, from the highest logit down; the last is open."""


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
    run = sample_triton if logits.is_cuda else sample_naive
    return run(logits, temperature, top_k, top_p, min_p, seed, positions)


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """logits [n, V] -> the most likely token of each row, of equals the first, int32 [n]."""
    return (greedy_triton if logits.is_cuda else greedy_naive)(logits)


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


@triton.jit
def _argmax(score, ids):
    """(the highest score, the lowest id that has it)."""
    best = tl.max(score, 0)
    return best, tl.min(tl.where(score == best, ids, 0x7FFFFFFF), 0)


@triton.jit(do_not_specialize_on_alignment=_KNOBS)
def _scan_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    positions_ptr,
    best_ptr,  # float32 [n, CHUNKS]: highest score, or highest logit of a row with filters
    best_id_ptr,  # int32 [n, CHUNKS]
    bins_ptr,  # float32 [n, CHUNKS, 2, BINS]: of a row with filters, tokens in each bin, and
    # their exponentials relative to best
    stride,
    V,
    CHUNKS: tl.constexpr,
    GREEDY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(0)
    ids = chunk * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(logits_ptr + row * stride + ids, mask=ids < V, other=-float("inf"))
    score = score.to(tl.float32)
    at = row * CHUNKS + chunk
    if not GREEDY:
        temperature = tl.load(temperature_ptr + row)
        if temperature > 0:
            score = score / temperature
            filters = tl.load(top_k_ptr + row) > 0
            filters = filters | (tl.load(top_p_ptr + row) < 1) | (tl.load(min_p_ptr + row) > 0)
            if filters:
                likeliest = tl.maximum(tl.max(score, 0), -3.0e38)
                mass = tl.exp(score - likeliest)
                bin = tl.minimum(tl.floor(likeliest) - tl.floor(score), _BINS - 1)
                for b in range(_BINS):
                    here = (bin == b) & (ids < V)
                    bin_at = bins_ptr + at * 2 * _BINS + b
                    tl.store(bin_at, tl.sum(tl.where(here, 1.0, 0.0), 0))
                    tl.store(bin_at + _BINS, tl.sum(tl.where(here, mass, 0.0), 0))
            else:
                seed = tl.load(seed_ptr + row).to(tl.int64)
                score += gumbel(seed, tl.load(positions_ptr + row), ids)
    best, best_id = _argmax(score, ids)
    tl.store(best_ptr + at, best)
    tl.store(best_id_ptr + at, best_id)


@triton.jit
def _likely(logits, list_ptr, at, length, listed, V, temperature):
    """(ids, scaled logits) number `at` of the first `listed` tokens of a list, or of all tokens if
    listed is 0. Lanes past `length` have the logit -inf; other logits are finite."""
    ids = tl.load(list_ptr + at, mask=at < listed, other=0)
    ids = tl.where(at < listed, ids, at)
    scaled = tl.load(logits + ids, mask=at < length, other=-float("inf")).to(tl.float32)
    scaled = tl.maximum(scaled / temperature, -3.0e38)
    return ids, tl.where(at < length, scaled, -float("inf"))


@triton.jit
def _pivot(
    logits, list_ptr, length, listed, V, temperature, low, high, best, target,
    MASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest scaled logit x in low..high such that the tokens with at least x reach `target`:
    in number, or if MASS in exponentials relative to `best`. Those with at least `low` reach it."""
    # Both ends are logits after their first move.
    while low < high:
        middle = low + (high - low) * 0.5
        middle = tl.where(middle > low, middle, high)
        reached = 0.0
        above = high
        below = low
        for start in range(0, length, BLOCK):
            at = start + tl.arange(0, BLOCK)
            _, x = _likely(logits, list_ptr, at, length, listed, V, temperature)
            weight = tl.where(x >= middle, tl.exp(x - best) if MASS else 1.0, 0.0)
            reached += tl.sum(weight, 0)
            above = tl.minimum(above, tl.min(tl.where(x >= middle, x, high), 0))
            below = tl.maximum(below, tl.max(tl.where(x < middle, x, -float("inf")), 0))
        if reached >= target:
            low = above
            if not MASS:
                high = tl.where(reached == target, low, high)
        else:
            high = below
    return low


@triton.jit
def _floor(
    logits, list_ptr, best_ptr, bins_ptr, V, temperature, best, target,
    MASS: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_PADDED: tl.constexpr, CHUNK: tl.constexpr,
    LIST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(the largest scaled logit x such that the row's tokens with at least x reach `target`, in
    number or if MASS in exponentials relative to `best`; the latter of those tokens)."""
    chunk = tl.arange(0, CHUNKS_PADDED)
    in_row = chunk < CHUNKS
    bests = tl.load(best_ptr + chunk, mask=in_row, other=-float("inf"))
    bests = tl.maximum(bests, -3.0e38)
    b = tl.arange(0, _BINS)
    bin_at = bins_ptr + chunk[:, None] * 2 * _BINS + b[None, :]
    counts = tl.load(bin_at, mask=in_row[:, None], other=0.0)
    masses = tl.load(bin_at + _BINS, mask=in_row[:, None], other=0.0)
    masses *= tl.exp(bests - best)[:, None]
    wanted = masses if MASS else counts
    # Bins of all chunks by their distance from the row's first one.
    bin = (tl.floor(best) - tl.floor(bests))[:, None] + b[None, :]
    level = 0.0
    above = 0.0
    here = tl.sum(tl.sum(tl.where(bin == level, wanted, 0.0), 1), 0)
    while (above + here < target) & (level < _BINS - 1):
        above += here
        level += 1.0
        here = tl.sum(tl.sum(tl.where(bin == level, wanted, 0.0), 1), 0)
    mass_above = tl.sum(tl.sum(tl.where(bin < level, masses, 0.0), 1), 0)
    low = tl.floor(best) - level
    high = tl.minimum(low + 1.0, best)

    # List the tokens in that bin.
    count = 0
    if level < _BINS - 1:
        tl.debug_barrier()
        for i in range(CHUNKS):
            if tl.load(best_ptr + i) >= low:
                ids = i * CHUNK + tl.arange(0, CHUNK)
                x = tl.load(logits + ids, mask=ids < V, other=-float("inf")).to(tl.float32)
                x = x / temperature
                near = (tl.floor(x) == low).to(tl.int32)
                place = count + tl.cumsum(near, 0) - near
                tl.store(list_ptr + place, ids, mask=(near > 0) & (place < LIST))
                count += tl.sum(near, 0)
        tl.debug_barrier()
    else:
        low = -3.0e38
    fits = (count > 0) & (count <= LIST)  # if not, look at all tokens
    length = tl.where(fits, count, V)
    listed = tl.where(fits, count, 0)
    target -= tl.where(fits, above, 0.0)
    floor = _pivot(
        logits, list_ptr, length, listed, V, temperature, low, high, best, target, MASS, BLOCK
    )  # fmt: skip
    mass = tl.where(fits, mass_above, 0.0)
    if not MASS:
        for start in range(0, length, BLOCK):
            at = start + tl.arange(0, BLOCK)
            _, x = _likely(logits, list_ptr, at, length, listed, V, temperature)
            mass += tl.sum(tl.where(x >= floor, tl.exp(x - best), 0.0), 0)
    return floor, mass


@triton.jit(do_not_specialize_on_alignment=_KNOBS)
def _pick_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    positions_ptr,
    best_ptr,
    best_id_ptr,
    bins_ptr,
    list_ptr,  # int32 [n, LIST]: scratch
    out_ptr,
    stride,
    V,
    CHUNKS: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr,
    GREEDY: tl.constexpr,
    CHUNK: tl.constexpr,
    LIST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS_PADDED)
    in_row = chunk < CHUNKS
    bests = tl.load(best_ptr + row * CHUNKS + chunk, mask=in_row, other=-float("inf"))
    best_ids = tl.load(best_id_ptr + row * CHUNKS + chunk, mask=in_row, other=0x7FFFFFFF)
    highest, token = _argmax(bests, best_ids)
    if not GREEDY:
        temperature = tl.load(temperature_ptr + row)
        top_k = tl.load(top_k_ptr + row)
        top_k = tl.where(top_k < V, top_k, 0)
        top_p = tl.load(top_p_ptr + row)
        min_p = tl.load(min_p_ptr + row)
        # As _scan_kernel saw it: with a filter, what it left is the highest logit, not the draw.
        filters = (tl.load(top_k_ptr + row) > 0) | (top_p < 1) | (min_p > 0)
        if (temperature > 0) & filters:
            highest = tl.maximum(highest, -3.0e38)
            logits = logits_ptr + row * stride
            bests_at = best_ptr + row * CHUNKS
            bins = bins_ptr + row * CHUNKS * 2 * _BINS
            likely = list_ptr + row * LIST
            floor = -3.0e38
            if top_k > 0:
                floor, mass = _floor(
                    logits, likely, bests_at, bins, V, temperature, highest,
                    top_k.to(tl.float32), False, CHUNKS, CHUNKS_PADDED, CHUNK, LIST, BLOCK,
                )  # fmt: skip
            else:
                b = tl.arange(0, _BINS)
                masses_at = bins + chunk[:, None] * 2 * _BINS + _BINS + b[None, :]
                masses = tl.sum(tl.load(masses_at, mask=in_row[:, None], other=0.0), 1)
                mass = tl.sum(masses * tl.exp(tl.maximum(bests, -3.0e38) - highest), 0)
            if top_p < 1:
                target = tl.maximum(top_p * mass, 1.0e-30)
                p_floor, _ = _floor(
                    logits, likely, bests_at, bins, V, temperature, highest,
                    target, True, CHUNKS, CHUNKS_PADDED, CHUNK, LIST, BLOCK,
                )  # fmt: skip
                floor = tl.maximum(floor, p_floor)
            if min_p > 0:
                floor = tl.maximum(floor, highest + tl.log(min_p))

            seed = tl.load(seed_ptr + row).to(tl.int64)
            position = tl.load(positions_ptr + row)
            best = -float("inf")
            for i in range(CHUNKS):
                if tl.load(bests_at + i) >= floor:
                    ids = i * CHUNK + tl.arange(0, CHUNK)
                    x = tl.load(logits + ids, mask=ids < V, other=-float("inf")).to(tl.float32)
                    x = x / temperature
                    kept = (x >= floor) & (ids < V)
                    score = tl.where(kept, x + gumbel(seed, position, ids), -float("inf"))
                    chunk_best, chunk_token = _argmax(score, ids)
                    token = tl.where(chunk_best > best, chunk_token, token)
                    best = tl.maximum(chunk_best, best)
    # NaN logits give any token, but none outside of the vocabulary.
    tl.store(out_ptr + row, tl.minimum(token, V - 1))


def sample_triton(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seed: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    return _launch(logits, (temperature, top_k, top_p, min_p, seed, positions))


def greedy_triton(logits: torch.Tensor) -> torch.Tensor:
    return _launch(logits, (None,) * 6)


def _launch(
    logits: torch.Tensor,
    knobs: tuple[torch.Tensor | None, ...],
    chunk: int = 4096,
    list_size: int = 16384,
    block: int = 4096,
    num_warps: int = 16,
) -> torch.Tensor:
    num_rows, vocab = logits.shape
    greedy = knobs[0] is None
    out = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    if num_rows == 0:
        return out
    chunks = triton.cdiv(vocab, chunk)
    best = torch.empty(num_rows, chunks, dtype=torch.float32, device=logits.device)
    best_id = torch.empty_like(best, dtype=torch.int32)
    bins = likely = None
    if not greedy:
        bins = torch.empty(num_rows, chunks, 2, _BINS.value, device=logits.device)
        likely = torch.empty(num_rows, list_size, dtype=torch.int32, device=logits.device)
    _scan_kernel[(chunks, num_rows)](
        logits, *knobs, best, best_id, bins, logits.stride(0), vocab,
        CHUNKS=chunks, GREEDY=greedy, BLOCK=chunk, num_warps=4,
    )  # fmt: skip
    _pick_kernel[(num_rows,)](
        logits, *knobs, best, best_id, bins, likely, out, logits.stride(0), vocab,
        CHUNKS=chunks, CHUNKS_PADDED=triton.next_power_of_2(chunks), GREEDY=greedy, CHUNK=chunk,
        LIST=list_size, BLOCK=block, num_warps=1 if greedy else num_warps,
    )  # fmt: skip
    return out
