"""Everything between the QKV projection and attention, in one kernel and in place: per-head RMSNorm
of q and k (Qwen3), rotary position embedding (Su et al., 2021; half-split pairs), and the KV cache
write."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from sglang.kernels.launch import launch_next, pdl, wait_for_previous


def rope_and_write_kv(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    cos_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotate q and k where they are, write k and v into the cache too; return q [T, Hq, D] and k, v
    [T, Hkv, D], views of qkv.

    qkv        [T, (Hq + 2 Hkv) D] contiguous, the heads of q, then of k, then of v
    positions  int32 [T]
    slots      int32 [T], where each token's k and v go; -1 (a token of padding): nowhere
    cos_sin    float32 [max_positions, D], cos in the first half of a row and sin in the second;
               element i of a head turns with element i + D/2
    k_cache, v_cache  [S, Hkv, D]; of float8_e4m3fn, what is beyond its range is saturated
    q_norm, k_norm    [D] weights, both or neither: heads are RMS-normed before they turn
    """
    run = rope_and_write_kv_triton if qkv.is_cuda else rope_and_write_kv_naive
    run(
        qkv, positions, slots, cos_sin, k_cache, v_cache,
        num_q_heads, num_kv_heads, q_norm, k_norm, eps,
    )  # fmt: skip
    heads = qkv.unflatten(1, (num_q_heads + 2 * num_kv_heads, -1))
    q, k, v = heads.split((num_q_heads, num_kv_heads, num_kv_heads), 1)
    return q, k, v


def rope_and_write_kv_naive(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    cos_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> None:
    T = qkv.shape[0]
    D = qkv.shape[1] // (num_q_heads + 2 * num_kv_heads)
    rotated = num_q_heads + num_kv_heads
    heads = qkv.view(T, -1, D)  # [T, Hq + 2 Hkv, D]
    x = heads[:, :rotated]
    if q_norm is not None and k_norm is not None:
        q, k = x[:, :num_q_heads], x[:, num_q_heads:]
        x = torch.cat((F.rms_norm(q, (D,), q_norm, eps), F.rms_norm(k, (D,), k_norm, eps)), 1)
    first, second = x.chunk(2, -1)  # [T, Hq + Hkv, D/2]
    cos, sin = cos_sin.index_select(0, positions).unsqueeze(1).chunk(2, -1)  # [T, 1, D/2]
    heads[:, :rotated] = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    k, v = heads[:, num_q_heads:rotated], heads[:, rotated:]
    if T and int(slots.min()) < 0:
        written = slots >= 0
        slots, k, v = slots[written], k[written], v[written]
    k_cache[slots] = _to_cache_naive(k, k_cache.dtype)
    v_cache[slots] = _to_cache_naive(v, v_cache.dtype)


def _to_cache_naive(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.clamp(-448, 448).to(dtype) if dtype == torch.float8_e4m3fn else x.to(dtype)


@triton.jit
def _to_cache(x, dtype: tl.constexpr):
    if dtype == tl.float8e4nv:
        x = tl.minimum(tl.maximum(x.to(tl.float32), -448.0), 448.0)
    return x.to(dtype)


# The alignment of what varies from step to step must not compile a kernel anew.
@triton.jit(do_not_specialize_on_alignment=["positions_ptr", "slots_ptr"])
def _rope_kernel(
    qkv_ptr,
    positions_ptr,
    slots_ptr,
    cos_sin_ptr,
    k_cache_ptr,
    v_cache_ptr,
    q_norm_ptr,
    k_norm_ptr,
    qkv_stride,
    k_stride,  # of a slot
    v_stride,
    eps,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_next(PDL)
    wait_for_previous(PDL)
    # A program has one token and BLOCK_H of its heads, be they of q, k or v.
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    pair = tl.arange(0, BLOCK_HALF)  # elements pair and pair + D/2 turn together
    HALF: tl.constexpr = D // 2
    in_half = pair < HALF
    mask = (head[:, None] < HQ + 2 * HKV) & in_half[None, :]
    at = token * qkv_stride + head[:, None] * D + pair[None, :]
    first_raw = tl.load(qkv_ptr + at, mask=mask, other=0.0)
    second_raw = tl.load(qkv_ptr + at + HALF, mask=mask, other=0.0)
    position = tl.load(positions_ptr + token).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    cos = tl.load(cos_sin_ptr + position * D + pair, mask=in_half, other=0.0)[None, :]
    sin = tl.load(cos_sin_ptr + position * D + HALF + pair, mask=in_half, other=0.0)[None, :]

    first, second = first_raw.to(tl.float32), second_raw.to(tl.float32)
    is_q = (head < HQ)[:, None]
    if NORM:
        rms = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / D + eps)[:, None]
        q_first = tl.load(q_norm_ptr + pair, mask=in_half, other=0.0)[None, :]
        q_second = tl.load(q_norm_ptr + HALF + pair, mask=in_half, other=0.0).to(tl.float32)[
            None, :
        ]
        k_first = tl.load(k_norm_ptr + pair, mask=in_half, other=0.0)[None, :]
        k_second = tl.load(k_norm_ptr + HALF + pair, mask=in_half, other=0.0).to(tl.float32)[
            None, :
        ]
        first *= rms * tl.where(is_q, q_first, k_first).to(tl.float32)
        second *= rms * tl.where(is_q, q_second, k_second).to(tl.float32)
    out_first = (first * cos - second * sin).to(first_raw.dtype)
    out_second = (second * cos + first * sin).to(first_raw.dtype)

    turns = mask & (head[:, None] < HQ + HKV)
    tl.store(qkv_ptr + at, out_first, mask=turns)
    tl.store(qkv_ptr + at + HALF, out_second, mask=turns)
    if slot >= 0:
        cache_dtype: tl.constexpr = k_cache_ptr.dtype.element_ty
        is_k = mask & (head[:, None] >= HQ) & (head[:, None] < HQ + HKV)
        k_at = k_cache_ptr + slot * k_stride + (head[:, None] - HQ) * D + pair[None, :]
        tl.store(k_at, _to_cache(out_first, cache_dtype), mask=is_k)
        tl.store(k_at + HALF, _to_cache(out_second, cache_dtype), mask=is_k)
        is_v = mask & (head[:, None] >= HQ + HKV)
        v_at = v_cache_ptr + slot * v_stride + (head[:, None] - HQ - HKV) * D + pair[None, :]
        tl.store(v_at, _to_cache(first_raw, cache_dtype), mask=is_v)
        tl.store(v_at + HALF, _to_cache(second_raw, cache_dtype), mask=is_v)


def rope_and_write_kv_triton(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    cos_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    block_h: int | None = None,
    num_warps: int | None = None,
) -> None:
    num_tokens = qkv.shape[0]
    num_heads = num_q_heads + 2 * num_kv_heads
    dim = qkv.shape[1] // num_heads
    if num_tokens == 0:
        return
    block_half = triton.next_power_of_2(dim // 2)
    if block_h is None:
        # Few tokens: more programs, so that one token's heads spread over the SMs.
        block_h = min(4 if num_tokens < 64 else 16, triton.next_power_of_2(num_heads))
    _rope_kernel[(num_tokens, triton.cdiv(num_heads, block_h))](
        qkv, positions, slots, cos_sin, k_cache, v_cache, q_norm, k_norm,
        qkv.stride(0), k_cache.stride(0), v_cache.stride(0), eps,
        HQ=num_q_heads,
        HKV=num_kv_heads,
        D=dim,
        NORM=q_norm is not None,
        BLOCK_H=block_h,
        BLOCK_HALF=block_half,
        num_warps=num_warps or min(max(block_h * block_half // 256, 1), 8),
        **pdl(qkv.device),
    )  # fmt: skip
