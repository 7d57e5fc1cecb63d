"""Attention of one new token a row over the row's cached tokens.

Flash-decoding (Dao et al., 2023): programs share a row's tokens out among themselves, each keeps an
online softmax over its split, and the one that ends last merges the splits. The query heads that
share a KV head are one tile, so K and V are read once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from sglang.kernels.launch import counters, launch_next, pdl, wait_for_previous


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_table: torch.Tensor,
    rows: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    window: int = 0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scale q K^T) V -> [n, Hq, D], in q's dtype.

    q           [n, Hq, D]
    k_cache, v_cache  [S, Hkv, D], of q's dtype or float8_e4m3fn; query head h reads KV
                head h // (Hq / Hkv)
    slot_table  int32 [R + 1, max_len]: row and token position -> slot of the cache
    rows        int32 [n]
    kv_lens     int32 [n], tokens of the row, the new one included; 0 (padding) gives zeros
    window      only the last `window` tokens are seen; 0: all
    out         [n, Hq, D] contiguous, where the result goes
    """
    run = decode_attention_triton if q.is_cuda else decode_attention_naive
    return run(q, k_cache, v_cache, slot_table, rows, kv_lens, scale, window, out=out)


def decode_attention_naive(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_table: torch.Tensor,
    rows: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    window: int = 0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    out = torch.zeros_like(q) if out is None else out.zero_()
    group = q.shape[1] // k_cache.shape[1]
    for i, (row, kv_len) in enumerate(zip(rows.tolist(), kv_lens.tolist(), strict=True)):
        if kv_len == 0:
            continue
        slots = slot_table[row, max(kv_len - window, 0) if window else 0 : kv_len]
        k = k_cache[slots].float().repeat_interleave(group, 1)  # [L, Hq, D]
        v = v_cache[slots].float().repeat_interleave(group, 1)
        weights = torch.einsum("hd,lhd->hl", q[i].float(), k).mul(scale).softmax(-1)
        out[i] = torch.einsum("hl,lhd->hd", weights, v)
    return out


@dataclass(frozen=True)
class DecodeConfig:
    """How the work is cut. The launch grid follows from the shapes alone, so it fits a CUDA graph;
    how many splits a row has is decided on the device."""

    block_n: int
    num_warps: int
    num_stages: int
    max_splits: int
    split_tokens: int = 256
    """A row gets another split for each of these, until it has max_splits: then they grow."""


@cache
def decode_config(
    device: torch.device,
    num_rows: int,
    num_kv_heads: int,
    head_dim: int,
    max_len: int,
    dtype: torch.dtype,
) -> DecodeConfig:
    """dtype: the cache's."""
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    block_n, num_stages = (128, 2) if head_dim <= 128 else (32, 2)
    if dtype.itemsize == 1:  # half the bytes a tile, so twice the tiles under way
        block_n, num_stages = block_n // 2, 4
    # About two programs an SM; with many rows, further splits only for those that are very long.
    fill = max(2 * sms // (num_rows * num_kv_heads), 1)
    split_tokens = 128 if fill >= 16 else 256 if fill >= 4 else 1024
    splits = max(1 << fill.bit_length() - 1, 4)
    return DecodeConfig(
        block_n,
        num_warps=4,
        num_stages=num_stages,
        max_splits=min(splits, triton.next_power_of_2(triton.cdiv(max_len, split_tokens))),
        split_tokens=split_tokens,
    )


# What varies from step to step, alignment included, must not compile a kernel anew.
@triton.jit(
    do_not_specialize=["split_tokens"],
    do_not_specialize_on_alignment=["rows_ptr", "lens_ptr"],
)
def _decode_kernel(
    q_ptr,  # [n, HQ, D]
    k_ptr,
    v_ptr,
    table_ptr,
    rows_ptr,
    lens_ptr,
    partial_ptr,  # float32 [n, HQ, MAX_SPLITS, D], normalised within its split
    lse_ptr,  # float32 [n, HQ, MAX_SPLITS], log2 of the split's sum of exponentials
    ended_ptr,  # int32 [n, head blocks], splits that have ended
    out_ptr,  # [n, HQ, D] contiguous
    q_stride,
    kv_stride,  # of a slot, in both caches
    table_stride,
    scale_log2,
    split_tokens,
    WINDOW: tl.constexpr,
    HQ: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_next(PDL)
    wait_for_previous(PDL)
    HEAD_BLOCKS: tl.constexpr = (GROUP + BLOCK_H - 1) // BLOCK_H
    kv_head = tl.program_id(0) // HEAD_BLOCKS
    i = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    kv_len = tl.load(lens_ptr + i)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(kv_len - WINDOW, 0)
    # Tokens of a split, a multiple of BLOCK_N.
    size = tl.maximum(tl.cdiv(kv_len - first, MAX_SPLITS * BLOCK_N) * BLOCK_N, split_tokens)
    splits = tl.maximum(tl.cdiv(kv_len - first, size), 1)
    if split >= splits:
        return
    start = first + split * size
    end = tl.minimum(start + size, kv_len)

    in_group = (tl.program_id(0) % HEAD_BLOCKS) * BLOCK_H + tl.arange(0, BLOCK_H)
    head = kv_head * GROUP + in_group
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    q_mask = (in_group[:, None] < GROUP) & (d[None, :] < D)
    q = tl.load(q_ptr + i * q_stride + head[:, None] * D + d[None, :], mask=q_mask, other=0.0)
    table = table_ptr + tl.load(rows_ptr + i).to(tl.int64) * table_stride
    k_base = k_ptr + kv_head * D + d[None, :]
    v_base = v_ptr + kv_head * D + d[None, :]

    most = tl.full([BLOCK_H], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    # The index tile is loaded one turn ahead: a gather through an index of its own turn would keep
    # a single tile in flight whatever num_stages says.
    slots = tl.load(table + start + n, mask=start + n < end, other=0)
    for at in tl.range(start, end, BLOCK_N):
        seen = at + n < end
        mask = seen[:, None] & (d[None, :] < D)
        offset = (slots.to(tl.int64) * kv_stride)[:, None]
        k = tl.load(k_base + offset, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_D]
        v = tl.load(v_base + offset, mask=mask, other=0.0)
        ahead = at + BLOCK_N + n
        slots = tl.load(table + ahead, mask=ahead < end, other=0)
        scores = tl.dot(q, tl.trans(k.to(q.dtype))) * scale_log2
        scores = tl.where(seen[None, :], scores, -float("inf"))
        new_most = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp2(scores - new_most[:, None])
        shrink = tl.exp2(most - new_most)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(q.dtype), v.to(q.dtype))
        most = new_most

    # A row of padding has no token at all, and gets zeros.
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    dtype = out_ptr.dtype.element_ty
    if splits == 1:
        out_at = out_ptr + (i * HQ + head)[:, None] * D + d[None, :]
        tl.store(out_at, acc.to(dtype), mask=q_mask)
        return

    at_split = (i * HQ + head) * MAX_SPLITS + split
    tl.store(partial_ptr + at_split[:, None] * D + d[None, :], acc, mask=q_mask)
    tl.store(lse_ptr + at_split, most + tl.log2(total), mask=in_group < GROUP)
    tl.debug_barrier()  # the stores of all threads come before the count
    ended_at = ended_ptr + i * tl.num_programs(0) + tl.program_id(0)
    if tl.atomic_add(ended_at, 1, sem="acq_rel") < splits - 1:
        return
    tl.store(ended_at, 0)

    s = tl.arange(0, MAX_SPLITS)
    used = s < splits
    first_head = (tl.program_id(0) % HEAD_BLOCKS) * BLOCK_H
    for h in range(first_head, tl.minimum(first_head + BLOCK_H, GROUP)):
        at_head = i * HQ + kv_head * GROUP + h
        # Past the L1, which other SMs' stores do not reach.
        lse_at = lse_ptr + at_head * MAX_SPLITS + s
        lse = tl.load(lse_at, mask=used, other=-1.0e30, cache_modifier=".cg")
        tile = partial_ptr + (at_head * MAX_SPLITS + s[:, None]) * D + d[None, :]
        partial_mask = used[:, None] & (d[None, :] < D)
        partial = tl.load(tile, mask=partial_mask, other=0.0, cache_modifier=".cg")
        share = tl.exp2(lse - tl.max(lse, 0))
        out = tl.sum(share[:, None] * partial, 0) / tl.sum(share, 0)
        tl.store(out_ptr + at_head * D + d, out.to(dtype), mask=d < D)


def decode_attention_triton(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_table: torch.Tensor,
    rows: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    window: int = 0,
    config: DecodeConfig | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    num_rows, num_q_heads, dim = q.shape
    num_kv_heads = k_cache.shape[1]
    if config is None:
        max_len = slot_table.shape[1]
        config = decode_config(q.device, num_rows, num_kv_heads, dim, max_len, k_cache.dtype)
    group = num_q_heads // num_kv_heads
    if out is None:
        out = torch.empty(num_rows, num_q_heads, dim, dtype=q.dtype, device=q.device)
    if num_rows == 0:
        return out
    heads = num_kv_heads * triton.cdiv(group, 16)
    f32 = {"dtype": torch.float32, "device": q.device}
    partial = torch.empty(num_rows, num_q_heads, config.max_splits, dim, **f32)
    lse = torch.empty(num_rows, num_q_heads, config.max_splits, **f32)
    ended = counters(q.device, num_rows * heads)
    # Heads first: programs side by side then read neighbouring parts of the same slots.
    _decode_kernel[(heads, num_rows, config.max_splits)](
        q, k_cache, v_cache, slot_table, rows, kv_lens, partial, lse, ended, out,
        q.stride(0), k_cache.stride(0), slot_table.stride(0),
        scale * math.log2(math.e), config.split_tokens,
        WINDOW=window,
        HQ=num_q_heads,
        GROUP=group,
        D=dim,
        BLOCK_H=16,  # the least that tensor cores take
        BLOCK_D=triton.next_power_of_2(dim),
        BLOCK_N=config.block_n,
        MAX_SPLITS=config.max_splits,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **pdl(q.device),
    )  # fmt: skip
    return out
