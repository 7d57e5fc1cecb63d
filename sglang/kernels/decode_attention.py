"""Attention of one new token a row over the row's cached tokens.

Flash-decoding (Dao et al., 2023): programs share a row's tokens out among themselves, each keeps an
online softmax over its split, and a second small kernel merges the splits. The query heads that
share a KV head are one tile, so K and V are read once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_table: torch.Tensor,
    rows: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """softmax(scale q K^T) V -> [n, Hq, D], in q's dtype.

    q           [n, Hq, D]
    k_cache, v_cache  [S, Hkv, D]; query head h reads KV head h // (Hq / Hkv)
    slot_table  int32 [R + 1, max_len]: row and token position -> slot of the cache
    rows        int32 [n]
    kv_lens     int32 [n], tokens of the row, the new one included; 0 (padding) gives zeros
    window      only the last `window` tokens are seen; 0: all
    """
    run = decode_attention_triton if q.is_cuda else decode_attention_naive
    return run(q, k_cache, v_cache, slot_table, rows, kv_lens, scale, window)


def decode_attention_naive(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_table: torch.Tensor,
    rows: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    out = torch.zeros_like(q)
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
    device: torch.device, num_rows: int, num_kv_heads: int, head_dim: int, max_len: int
) -> DecodeConfig:
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    # Enough programs to fill the device many times over, and no more: each empty one costs a bit.
    fill = triton.next_power_of_2(triton.cdiv(32 * sms, num_rows * num_kv_heads))
    most = triton.next_power_of_2(triton.cdiv(sms, 4))
    needed = triton.next_power_of_2(triton.cdiv(max_len, 256))
    return DecodeConfig(
        block_n=64 if head_dim <= 128 else 32,
        num_warps=4,
        num_stages=3,
        max_splits=min(most, max(fill, 8), needed),
    )


@triton.jit
def _split_size(seen, max_splits, split_tokens, BLOCK_N: tl.constexpr):
    """Tokens a split has, a multiple of BLOCK_N, for a row that sees this many."""
    return tl.maximum(tl.cdiv(seen, max_splits * BLOCK_N) * BLOCK_N, split_tokens)


# What varies from step to step, alignment included, must not compile a kernel anew.
@triton.jit(
    do_not_specialize=["max_splits", "split_tokens"],
    do_not_specialize_on_alignment=["rows_ptr", "lens_ptr"],
)
def _decode_kernel(
    q_ptr,  # [n, HQ, D]
    k_ptr,
    v_ptr,
    table_ptr,
    rows_ptr,
    lens_ptr,
    partial_ptr,  # float32 [n, HQ, max_splits, D], normalised within its split
    lse_ptr,  # float32 [n, HQ, max_splits], log2 of the split's sum of exponentials
    q_stride,
    k_stride,
    v_stride,
    table_stride,
    scale_log2,
    max_splits,
    split_tokens,
    WINDOW: tl.constexpr,
    HQ: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    HEAD_BLOCKS: tl.constexpr = (GROUP + BLOCK_H - 1) // BLOCK_H
    kv_head = tl.program_id(0) // HEAD_BLOCKS
    i = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    kv_len = tl.load(lens_ptr + i)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(kv_len - WINDOW, 0)
    size = _split_size(kv_len - first, max_splits, split_tokens, BLOCK_N)
    start = first + split * size
    end = tl.minimum(start + size, kv_len)
    if start >= end:
        return

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
        offset = slots.to(tl.int64)[:, None]
        k = tl.load(k_base + offset * k_stride, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_D]
        v = tl.load(v_base + offset * v_stride, mask=mask, other=0.0)
        ahead = at + BLOCK_N + n
        slots = tl.load(table + ahead, mask=ahead < end, other=0)
        scores = tl.dot(q, tl.trans(k)) * scale_log2
        scores = tl.where(seen[None, :], scores, -float("inf"))
        new_most = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp2(scores - new_most[:, None])
        shrink = tl.exp2(most - new_most)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v)
        most = new_most

    at_split = (i * HQ + head) * max_splits + split
    partial_at = partial_ptr + at_split[:, None] * D + d[None, :]
    tl.store(partial_at, acc / total[:, None], mask=q_mask)
    tl.store(lse_ptr + at_split, most + tl.log2(total), mask=in_group < GROUP)


@triton.jit(do_not_specialize=["split_tokens"], do_not_specialize_on_alignment=["lens_ptr"])
def _merge_kernel(
    partial_ptr,
    lse_ptr,
    lens_ptr,
    out_ptr,  # [n, HQ, D] contiguous
    split_tokens,
    WINDOW: tl.constexpr,
    HQ: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    at = tl.program_id(1).to(tl.int64) * HQ + tl.program_id(0)
    kv_len = tl.load(lens_ptr + tl.program_id(1))
    seen = kv_len
    if WINDOW > 0:
        seen = tl.minimum(kv_len, WINDOW)
    size = _split_size(seen, MAX_SPLITS, split_tokens, BLOCK_N)
    split = tl.arange(0, MAX_SPLITS)
    d = tl.arange(0, BLOCK_D)
    used = split * size < seen
    mask = used[:, None] & (d[None, :] < D)
    lse = tl.load(lse_ptr + at * MAX_SPLITS + split, mask=used, other=-1.0e30)
    tile = partial_ptr + (at * MAX_SPLITS + split[:, None]) * D + d[None, :]
    partial = tl.load(tile, mask=mask, other=0.0)
    weights = tl.where(used, tl.exp2(lse - tl.max(lse, 0)), 0.0)
    # A row of padding has no split at all, and gets zeros.
    total = tl.where(kv_len > 0, tl.sum(weights, 0), 1.0)
    out = tl.sum(weights[:, None] * partial, 0) / total
    tl.store(out_ptr + at * D + d, out.to(out_ptr.dtype.element_ty), mask=d < D)


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
) -> torch.Tensor:
    num_rows, num_q_heads, dim = q.shape
    num_kv_heads = k_cache.shape[1]
    if config is None:
        config = decode_config(q.device, num_rows, num_kv_heads, dim, slot_table.shape[1])
    group = num_q_heads // num_kv_heads
    out = torch.empty(num_rows, num_q_heads, dim, dtype=q.dtype, device=q.device)
    if num_rows == 0:
        return out
    f32 = {"dtype": torch.float32, "device": q.device}
    partial = torch.empty(num_rows, num_q_heads, config.max_splits, dim, **f32)
    lse = torch.empty(num_rows, num_q_heads, config.max_splits, **f32)
    cut = {
        "WINDOW": window,
        "HQ": num_q_heads,
        "D": dim,
        "BLOCK_D": triton.next_power_of_2(dim),
        "BLOCK_N": config.block_n,
    }
    # Heads first: programs side by side then read neighbouring parts of the same slots.
    _decode_kernel[(num_kv_heads * triton.cdiv(group, 16), num_rows, config.max_splits)](
        q, k_cache, v_cache, slot_table, rows, kv_lens, partial, lse,
        q.stride(0), k_cache.stride(0), v_cache.stride(0), slot_table.stride(0),
        scale * math.log2(math.e), config.max_splits, config.split_tokens,
        GROUP=group,
        BLOCK_H=16,  # the least that tensor cores take
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **cut,
    )  # fmt: skip
    _merge_kernel[(num_q_heads, num_rows)](
        partial, lse, kv_lens, out, config.split_tokens,
        MAX_SPLITS=config.max_splits, num_warps=4, **cut,
    )  # fmt: skip
    return out
