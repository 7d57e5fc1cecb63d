"""Sampling the next token without a sort and without a generator's state.

A draw is the Gumbel-max trick: the token that maximises logit / temperature + noise is distributed
as the softmax. The noise is a pure hash of (seed, position, token id), so a request's tokens depend
neither on the batch it is in nor on the rank or the device that draws them.

top-k, top-p and min-p all keep the tokens whose logit is at least some pivot. The pivot is found by
bisection over logits, as in FlashInfer (Ye et al., 2025), here over the few likely tokens alone.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

# Kernel arguments whose alignment varies from step to step: it must not compile a kernel anew.
_KNOBS = ["temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "seed_ptr", "positions_ptr"]

# Multipliers of "lowbias32" (Chris Wellons, public domain), and 2^32 / golden ratio.
_C1 = tl.constexpr(0x7FEB352D)
_C2 = tl.constexpr(0x846CA68B)
_C3 = tl.constexpr(0x9E3779B1)


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


def gumbel_naive(seed: int, position: int, count: int, device: torch.device) -> torch.Tensor:
    """The noise of tokens 0..count-1, float32 [count]."""
    c1, c2, c3 = _C1.value, _C2.value, _C3.value
    key = _mix((seed & _U32) + c3)
    key = _mix(key ^ (seed >> 32 & _U32))
    key = _mix(key ^ (position & _U32))
    x = torch.arange(count, dtype=torch.int32, device=device).mul_(_signed(c3)).add_(_signed(key))
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
def _mix_kernel(x):
    x = (x ^ (x >> 16)) * _C1
    x = (x ^ (x >> 15)) * _C2
    return x ^ (x >> 16)


@triton.jit
def _gumbel(seed, position, ids):
    """seed int64, position int32, ids [..] -> the noise of gumbel_naive."""
    key = _mix_kernel(seed.to(tl.uint32) + _C3)
    key = _mix_kernel(key ^ (seed >> 32).to(tl.uint32))
    key = _mix_kernel(key ^ position.to(tl.uint32))
    x = ids.to(tl.uint32) * _C3 + key
    x = (x ^ (x >> 16)) * _C1
    x = ((x ^ (x >> 15)) + _mix_kernel(key + _C3)) * _C2
    x = (x ^ (x >> 16)) >> 1
    uniform = tl.minimum((x.to(tl.int32).to(tl.float32) + 0.5) * (2.0**-31), 1 - 2.0**-24)
    # -log(1 - u), by its series near 0: these are the tokens that win, and 1 - u would round off
    # most of what tells them apart.
    series = uniform * (1.0 + uniform * (0.5 + uniform * (1.0 / 3.0)))
    return -tl.log(tl.where(uniform < 2.0**-7, series, -tl.log(1.0 - uniform)))


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
    mass_ptr,  # float32 [n, CHUNKS]: sum of exponentials relative to best, of a row with filters
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
                tl.store(mass_ptr + at, tl.sum(tl.exp(score - likeliest), 0))
            else:
                seed = tl.load(seed_ptr + row).to(tl.int64)
                score += _gumbel(seed, tl.load(positions_ptr + row), ids)
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
    logits, list_ptr, length, listed, V, temperature, lowest, highest, target,
    MASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest scaled logit x such that the tokens with at least x reach `target`: in number, or
    if MASS in exponentials relative to `highest`. Those with at least `lowest` do reach it."""
    low = lowest
    high = highest
    # The answer is one of the logits in low..high, and both ends are logits after their first move.
    while low < high:
        middle = low + (high - low) * 0.5
        middle = tl.where(middle > low, middle, high)
        reached = 0.0
        above = high
        below = low
        for start in range(0, length, BLOCK):
            at = start + tl.arange(0, BLOCK)
            _, x = _likely(logits, list_ptr, at, length, listed, V, temperature)
            weight = tl.where(x >= middle, tl.exp(x - highest) if MASS else 1.0, 0.0)
            reached += tl.sum(weight, 0)
            above = tl.minimum(above, tl.min(tl.where(x >= middle, x, highest), 0))
            below = tl.maximum(below, tl.max(tl.where(x < middle, x, -float("inf")), 0))
        if reached >= target:
            low = above
            if not MASS:
                high = tl.where(reached == target, low, high)
        else:
            high = below
    return low


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
    mass_ptr,
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
            masses = tl.load(mass_ptr + row * CHUNKS + chunk, mask=in_row, other=0.0)
            mass = tl.sum(masses * tl.exp(tl.maximum(bests, -3.0e38) - highest), 0)
            logits = logits_ptr + row * stride

            # List the tokens at least e^-12 as likely as the likeliest; as a rule there are few.
            likely = list_ptr + row * LIST
            count = 0
            listed_mass = 0.0
            for i in range(CHUNKS):
                if tl.load(best_ptr + row * CHUNKS + i) >= highest - 12.0:
                    ids = i * CHUNK + tl.arange(0, CHUNK)
                    x = tl.load(logits + ids, mask=ids < V, other=-float("inf")).to(tl.float32)
                    x = x / temperature
                    near = (x >= highest - 12.0).to(tl.int32)
                    place = count + tl.cumsum(near, 0) - near
                    tl.store(likely + place, ids, mask=(near > 0) & (place < LIST))
                    count += tl.sum(near, 0)
                    listed_mass += tl.sum(tl.where(near > 0, tl.exp(x - highest), 0.0), 0)
            tl.debug_barrier()
            # Do they hold all that the filters can leave in? If not, look at all tokens instead.
            if top_k > 0:
                suffice = count >= top_k
            elif top_p < 1:
                suffice = listed_mass >= top_p * mass
            else:
                suffice = min_p >= 1.0e-5  # > e^-12
            suffice = suffice & (count <= LIST)
            length = tl.where(suffice, count, V)
            listed = tl.where(suffice, count, 0)
            floor = tl.where(suffice, highest - 12.0, -3.0e38)

            if top_k > 0:
                floor = _pivot(
                    logits, likely, length, listed, V, temperature, floor, highest,
                    top_k.to(tl.float32), False, BLOCK,
                )  # fmt: skip
                mass = 0.0
                for start in range(0, length, BLOCK):
                    at = start + tl.arange(0, BLOCK)
                    _, x = _likely(logits, likely, at, length, listed, V, temperature)
                    mass += tl.sum(tl.where(x >= floor, tl.exp(x - highest), 0.0), 0)
            if top_p < 1:
                floor = _pivot(
                    logits, likely, length, listed, V, temperature, floor, highest,
                    tl.maximum(top_p * mass, 1.0e-30), True, BLOCK,
                )  # fmt: skip
            if min_p > 0:
                floor = tl.maximum(floor, highest + tl.log(min_p))

            seed = tl.load(seed_ptr + row).to(tl.int64)
            position = tl.load(positions_ptr + row)
            best = -float("inf")
            for start in range(0, length, BLOCK):
                at = start + tl.arange(0, BLOCK)
                ids, x = _likely(logits, likely, at, length, listed, V, temperature)
                score = tl.where(x >= floor, x + _gumbel(seed, position, ids), -float("inf"))
                block_best, block_token = _argmax(score, ids)
                token = tl.where(block_best > best, block_token, token)
                best = tl.maximum(block_best, best)
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
    mass = torch.empty_like(best)
    likely = None
    if not greedy:
        likely = torch.empty(num_rows, list_size, dtype=torch.int32, device=logits.device)
    _scan_kernel[(chunks, num_rows)](
        logits, *knobs, best, best_id, mass, logits.stride(0), vocab,
        CHUNKS=chunks, GREEDY=greedy, BLOCK=chunk, num_warps=8,
    )  # fmt: skip
    _pick_kernel[(num_rows,)](
        logits, *knobs, best, best_id, mass, likely, out, logits.stride(0), vocab,
        CHUNKS=chunks, CHUNKS_PADDED=triton.next_power_of_2(chunks), GREEDY=greedy, CHUNK=chunk,
        LIST=list_size, BLOCK=block, num_warps=1 if greedy else num_warps,
    )  # fmt: skip
    return out
