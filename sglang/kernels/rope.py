"""Everything between the QKV projection and attention, in one kernel and in place: per-head RMSNorm
of q and k (Qwen3), rotary position embedding (Su et al., 2021; half-split pairs), and the KV cache
write."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from sglang.kernels import cpu
from sglang.kernels.launch import launch_next, pdl, wait_for_previous
from sglang.kernels.row_scale import RowScale, load_scale, scale_arguments, scale_inputs


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
    scale: RowScale | None = None,
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
    scale      what qkv is still to be multiplied by, before all this
    """
    where = (qkv, positions, slots, cos_sin, k_cache, v_cache, num_q_heads, num_kv_heads)
    is_float32 = qkv.dtype == k_cache.dtype == torch.float32
    if is_float32 and q_norm is scale is None and cpu.takes(cos_sin, 2 * cpu.LANES):
        cpu.rope_and_write_kv(*where)
    else:
        run = rope_and_write_kv_triton if qkv.is_cuda else rope_and_write_kv_naive
        run(*where, q_norm, k_norm, eps, scale)
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
    scale: RowScale | None = None,
) -> None:
    T = qkv.shape[0]
    if scale is not None:
        qkv.copy_(scale.times(qkv))
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


@triton.jit
def _turned(
    first, second, cos, sin, first_weight, second_weight, scale, eps,
    D: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Halves of heads, [heads, D/2] each."""
    dtype: tl.constexpr = first.dtype
    x, y = first.to(tl.float32) * scale, second.to(tl.float32) * scale
    if NORM:
        rms = tl.rsqrt((tl.sum(x * x, 1) + tl.sum(y * y, 1)) / D + eps)[:, None]
        x *= rms * first_weight.to(tl.float32)[None, :]
        y *= rms * second_weight.to(tl.float32)[None, :]
    return (x * cos - y * sin).to(dtype), (y * cos + x * sin).to(dtype)


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
    scale_ptr,
    scale_stride,
    scale_eps,
    qkv_stride,
    k_stride,  # of a slot
    v_stride,
    eps,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    NORM: tl.constexpr,
    K: tl.constexpr,  # of `load_scale`, or 0
    BLOCK_KV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_next(PDL)
    HALF: tl.constexpr = D // 2
    pair = tl.arange(0, BLOCK_HALF)  # elements pair and pair + D/2 turn together
    in_half = pair < HALF
    if NORM:
        qw_first = tl.load(q_norm_ptr + pair, mask=in_half, other=0.0)
        qw_second = tl.load(q_norm_ptr + HALF + pair, mask=in_half, other=0.0)
        kw_first = tl.load(k_norm_ptr + pair, mask=in_half, other=0.0)
        kw_second = tl.load(k_norm_ptr + HALF + pair, mask=in_half, other=0.0)
    else:
        qw_first, qw_second, kw_first, kw_second = 1.0, 1.0, 1.0, 1.0
    wait_for_previous(PDL)  # weights are never written

    # A program has one token, BLOCK_KV heads of k and of v, and the heads of q that go with them.
    # The last token comes first: of many, the L2 still has those. In the end it has the first, and
    # attention begins with them; so nothing of the cache is to be kept.
    PARTS: tl.constexpr = (HKV + BLOCK_KV - 1) // BLOCK_KV
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    token = (program // PARTS).to(tl.int64)
    part = program % PARTS
    position = tl.load(positions_ptr + token).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)

    OF_Q: tl.constexpr = BLOCK_KV * (HQ // HKV)
    q_row = tl.arange(0, BLOCK_Q)
    q_head = part * OF_Q + q_row
    q_mask = ((q_row < OF_Q) & (q_head < HQ))[:, None] & in_half[None, :]
    q_at = qkv_ptr + token * qkv_stride + q_head[:, None] * D + pair[None, :]
    q_first = tl.load(q_at, mask=q_mask, other=0.0)
    q_second = tl.load(q_at + HALF, mask=q_mask, other=0.0)

    kv_head = part * BLOCK_KV + tl.arange(0, BLOCK_KV)
    k_mask = (kv_head < HKV)[:, None] & in_half[None, :]
    in_heads = kv_head[:, None] * D + pair[None, :]
    k_at = qkv_ptr + token * qkv_stride + HQ * D + in_heads
    k_first = tl.load(k_at, mask=k_mask, other=0.0)
    k_second = tl.load(k_at + HALF, mask=k_mask, other=0.0)

    column = tl.arange(0, 2 * BLOCK_HALF)
    v_mask = (kv_head < HKV)[:, None] & (column < D)[None, :]
    v_in_heads = kv_head[:, None] * D + column[None, :]
    v_at = qkv_ptr + token * qkv_stride + (HQ + HKV) * D + v_in_heads
    v = tl.load(v_at, mask=v_mask, other=0.0)

    cos = tl.load(cos_sin_ptr + position * D + pair, mask=in_half, other=0.0)[None, :]
    sin = tl.load(cos_sin_ptr + position * D + HALF + pair, mask=in_half, other=0.0)[None, :]
    scale = 1.0
    if K:
        scale = load_scale(scale_ptr, token, scale_stride, scale_eps, K)
        v = (v.to(tl.float32) * scale).to(v.dtype)
        tl.store(v_at, v, mask=v_mask)
    q_first, q_second = _turned(
        q_first, q_second, cos, sin, qw_first, qw_second, scale, eps, D, NORM
    )  # fmt: skip
    tl.store(q_at, q_first, mask=q_mask)
    tl.store(q_at + HALF, q_second, mask=q_mask)
    k_first, k_second = _turned(
        k_first, k_second, cos, sin, kw_first, kw_second, scale, eps, D, NORM
    )  # fmt: skip
    tl.store(k_at, k_first, mask=k_mask)
    tl.store(k_at + HALF, k_second, mask=k_mask)
    if slot >= 0:
        cache_dtype: tl.constexpr = k_cache_ptr.dtype.element_ty
        to_k = k_cache_ptr + slot * k_stride + in_heads
        tl.store(to_k, _to_cache(k_first, cache_dtype), mask=k_mask, cache_modifier=".cs")
        tl.store(to_k + HALF, _to_cache(k_second, cache_dtype), mask=k_mask, cache_modifier=".cs")
        to_v = v_cache_ptr + slot * v_stride + v_in_heads
        tl.store(to_v, _to_cache(v, cache_dtype), mask=v_mask, cache_modifier=".cs")


def _heads_of_program(num_tokens: int, group: int, num_kv_heads: int, dim: int) -> int:
    """Of k, in one warp. Few tokens: one, so that a token's heads spread over the SMs. Else some
    2,000 elements, so that few loads of cosines and weights are beside those of heads."""
    most = 1 if num_tokens < 64 else max(2048 // ((group + 2) * dim), 1)
    return min(1 << most.bit_length() - 1, triton.next_power_of_2(num_kv_heads))


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
    scale: RowScale | None = None,
    block_kv: int | None = None,
    num_warps: int = 1,
) -> None:
    num_tokens = qkv.shape[0]
    dim = qkv.shape[1] // (num_q_heads + 2 * num_kv_heads)
    if num_tokens == 0:
        return
    group = num_q_heads // num_kv_heads
    block_kv = block_kv or _heads_of_program(num_tokens, group, num_kv_heads, dim)
    _rope_kernel[(num_tokens * triton.cdiv(num_kv_heads, block_kv),)](
        qkv, positions, slots, cos_sin, k_cache, v_cache, q_norm, k_norm,
        *scale_arguments(scale), qkv.stride(0), k_cache.stride(0), v_cache.stride(0), eps,
        HQ=num_q_heads,
        HKV=num_kv_heads,
        D=dim,
        NORM=q_norm is not None,
        BLOCK_KV=block_kv,
        K=scale_inputs(scale),
        BLOCK_Q=triton.next_power_of_2(block_kv * group),
        BLOCK_HALF=triton.next_power_of_2(dim // 2),
        num_warps=num_warps,
        **pdl(qkv.device),
    )  # fmt: skip
