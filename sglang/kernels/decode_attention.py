"""Attention of one new token a row over the row's cached tokens.

Flash-decoding (Dao et al., 2023): programs share the rows' tokens out among themselves
(decode_shares.py), and each keeps an online softmax over its part of a row. The query heads that
share a KV head are one tile, so K and V are read once.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from sglang.kernels.decode_attention_sums import decode_sums_kernel
from sglang.kernels.decode_shares import (
    DecodeConfig,
    merge_parts,
    part_at,
    part_buffers,
    row_part,
    take_share,
)
from sglang.kernels.launch import (
    FLOAT32,
    launch_next,
    multiprocessors,
    padded_rows,
    pdl,
    wait_for_previous,
)


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
    kv_lens     int32 [n], tokens of the row, the new one included; 0: the row is left out, and its
                part of `out` stays as it was
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
    out = torch.zeros_like(q) if out is None else out
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


@cache
def decode_config(
    device: torch.device,
    num_rows: int,
    num_kv_heads: int,
    group: int,
    head_dim: int,
    dtype: torch.dtype,
) -> DecodeConfig:
    """The quickest on an H200. group: query heads of a KV head; dtype: the cache's."""
    sms = multiprocessors(device)
    heads = num_rows * num_kv_heads
    if head_dim > 128 or dtype.itemsize == 4:
        return DecodeConfig(32, 4, 2, 4 * sms)

    def staged(config: DecodeConfig) -> DecodeConfig:
        """Whole rows are quicker with three stages, shares with two."""
        shares, programs = config.cut(num_rows, num_kv_heads)
        return config if programs > shares else replace(config, num_stages=2)

    are_few = heads <= 4 * sms
    if dtype.itemsize == 1:
        if group == 1 and head_dim in (64, 128):
            return staged(DecodeConfig(16, 1, 3, 16 * sms, dots=False))
        if are_few:
            return DecodeConfig(64, 2, 3, 4 * sms)
        # Conversion, not memory, is what a program waits for: alone at the end it is no quicker.
        return DecodeConfig(32, 1, 3, 8 * sms, rounds=2)
    if are_few:
        return DecodeConfig(32, 2, 3, 4 * sms, min_tokens=32)
    # Programs so small that many fit on an SM: the begin of one hides behind the others.
    if num_kv_heads <= 8:
        return DecodeConfig(32, 1, 3, 6 * sms)
    return staged(DecodeConfig(32, 1, 3, 8 * sms))


# Two pairs of 8-bit floats -> the first and the second of each, as float16: three instructions,
# where Triton's own conversion of single ones takes ten.
_UNPAIR = tl.constexpr("""{
.reg .b32 sorted;
.reg .b16 first, second;
prmt.b32 sorted, $2, $2, 0x3120;
mov.b32 {first, second}, sorted;
cvt.rn.f16x2.e4m3x2 $0, first;
cvt.rn.f16x2.e4m3x2 $1, second;
}""")


@triton.jit
def _load_tile(
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


# What varies from step to step, alignment included, must not compile a kernel anew.
@triton.jit(
    do_not_specialize=["num_rows", "num_shares"],
    do_not_specialize_on_alignment=["rows_ptr", "lens_ptr"],
)
def _decode_kernel(
    q_ptr,  # [n, HQ, D]
    k_ptr,
    v_ptr,
    table_ptr,
    rows_ptr,
    lens_ptr,
    partial_ptr,  # as `part_buffers` says
    lse_ptr,
    ended_ptr,
    out_ptr,  # [n, HQ, D] contiguous
    q_stride,
    kv_stride,  # of a slot, in both caches
    table_stride,
    scale_log2,
    num_rows,
    num_shares,
    WINDOW: tl.constexpr,
    HQ: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_TILES: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    ROWS_PADDED: tl.constexpr,
    PAIRS: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """A head's elements are in two parts, a and b, multiplied apart. Of a 16-bit cache that is its
    first half and the rest. An 8-bit cache is read as pairs, of which a is the first: so the tiles
    are of 16-bit elements, which load into the layout of the tensor cores as they are."""
    launch_next(PDL)
    wait_for_previous(PDL)
    HEAD_BLOCKS: tl.constexpr = (GROUP + BLOCK_H - 1) // BLOCK_H
    kv_head = tl.program_id(0) // HEAD_BLOCKS
    first_head = (tl.program_id(0) % HEAD_BLOCKS) * BLOCK_H
    in_group = first_head + tl.arange(0, BLOCK_H)
    head = kv_head * GROUP + in_group
    half = tl.arange(0, BLOCK_D // 2)
    a = 2 * half if PAIRS else half
    b = a + 1 if PAIRS else half + BLOCK_D // 2
    in_a = (in_group[:, None] < GROUP) & (a[None, :] < D)
    in_b = (in_group[:, None] < GROUP) & (b[None, :] < D)
    n = tl.arange(0, BLOCK_N)
    k_base = k_ptr + kv_head * (D // 2 if PAIRS else D)
    v_base = v_ptr + kv_head * (D // 2 if PAIRS else D)
    dtype = out_ptr.dtype.element_ty
    tile_dtype: tl.constexpr = tl.float16 if PAIRS else dtype

    share = take_share(
        lens_ptr, num_rows, num_shares,
        WINDOW, BLOCK_N, MIN_TILES, MAX_PARTS, ROWS_PADDED, BRANCH=PAIRS,
    )  # fmt: skip
    before = share.before
    for i in tl.range(share.first_row, share.last_row + 1):
        kv_len = tl.load(lens_ptr + i)
        start, end, tiles, parts, first_program = row_part(share, kv_len, before, WINDOW, BLOCK_N)
        before += tiles
        at_row = tl.full([], i, tl.int64)
        q_at = q_ptr + at_row * q_stride + head[:, None] * D
        q_a = tl.load(q_at + a[None, :], mask=in_a, other=0.0).to(tile_dtype)
        q_b = tl.load(q_at + b[None, :], mask=in_b, other=0.0).to(tile_dtype)
        table = table_ptr + tl.load(rows_ptr + i).to(tl.int64) * table_stride

        most = tl.full([BLOCK_H], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_H], tl.float32)
        acc_a = tl.zeros([BLOCK_H, BLOCK_D // 2], tl.float32)
        acc_b = acc_a
        # The index tile is loaded one turn ahead: a gather through an index of its own turn
        # would keep a single tile in flight whatever num_stages says.
        slots = tl.load(table + start + n, mask=start + n < end, other=0)
        for at in tl.range(start, end, BLOCK_N):
            seen = at + n < end
            offset = (slots.to(tl.int64) * kv_stride)[:, None]
            k_a, k_b = _load_tile(k_base, offset, seen, half, a, b, D, PAIRS, ASM)
            v_a, v_b = _load_tile(v_base, offset, seen, half, a, b, D, PAIRS, ASM)
            ahead = at + BLOCK_N + n
            slots = tl.load(table + ahead, mask=ahead < end, other=0)
            scores = tl.dot(q_a, tl.trans(k_a), input_precision=FLOAT32)
            scores = tl.dot(q_b, tl.trans(k_b), scores, input_precision=FLOAT32) * scale_log2
            scores = tl.where(seen[None, :], scores, -float("inf"))
            new_most = tl.maximum(most, tl.max(scores, 1))
            weights = tl.exp2(scores - new_most[:, None])
            shrink = tl.exp2(most - new_most)
            total = total * shrink + tl.sum(weights, 1)
            acc_a *= shrink[:, None]
            acc_b *= shrink[:, None]
            weights = weights.to(tile_dtype)
            acc_a = tl.dot(weights, v_a, acc_a, input_precision=FLOAT32)
            acc_b = tl.dot(weights, v_b, acc_b, input_precision=FLOAT32)
            most = new_most

        total = tl.maximum(total, 1.0e-30)  # of a split without tokens, 0
        acc_a = acc_a / total[:, None]
        acc_b = acc_b / total[:, None]
        at_heads = at_row * HQ + head
        if parts == 1:
            out_at = out_ptr + at_heads[:, None] * D
            tl.store(out_at + a[None, :], acc_a.to(dtype), mask=in_a)
            tl.store(out_at + b[None, :], acc_b.to(dtype), mask=in_b)
        elif parts > 1:
            at_part = part_at(first_program) * HQ + head
            partial_at = partial_ptr + at_part[:, None] * D
            tl.store(partial_at + a[None, :], acc_a, mask=in_a)
            tl.store(partial_at + b[None, :], acc_b, mask=in_b)
            tl.store(lse_ptr + at_part, most + tl.log2(total), mask=in_group < GROUP)
            end_head = tl.minimum(first_head + BLOCK_H, GROUP)
            merge_parts(
                at_row, kv_head * GROUP, first_head, end_head, parts, first_program,
                partial_ptr, lse_ptr, ended_ptr, out_ptr, HQ, D, BLOCK_D, MAX_PARTS,
            )  # fmt: skip


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
    group = num_q_heads // num_kv_heads
    if config is None:
        config = decode_config(q.device, num_rows, num_kv_heads, group, dim, k_cache.dtype)
    if out is None:
        out = torch.empty(num_rows, num_q_heads, dim, dtype=q.dtype, device=q.device)
    if num_rows == 0:
        return out
    heads = num_kv_heads * triton.cdiv(group, 16)
    shares, programs = config.cut(num_rows, heads)
    parts = part_buffers(q, programs, heads)
    is_8_bit = k_cache.dtype.itemsize == 1
    if is_8_bit:
        words = torch.int16 if config.dots else torch.int32
        k_cache, v_cache = k_cache.view(words), v_cache.view(words)
    if config.dots:
        kernel = _decode_kernel
        only_its = {
            "GROUP": group,
            "BLOCK_H": 16,  # the least that tensor cores take
            "BLOCK_D": triton.next_power_of_2(dim),
            "PAIRS": is_8_bit,
        }
    else:
        kernel, only_its = decode_sums_kernel, {"STAGES": config.num_stages}
    # Heads first: programs side by side then read neighbouring parts of the same slots.
    kernel[(heads, programs)](
        q, k_cache, v_cache, slot_table, rows, kv_lens, *parts, out,
        q.stride(0), k_cache.stride(0), slot_table.stride(0),
        scale * math.log2(math.e), num_rows, shares,
        WINDOW=window,
        HQ=num_q_heads,
        D=dim,
        BLOCK_N=config.block_n,
        MIN_TILES=triton.cdiv(config.min_tokens, config.block_n),
        MAX_PARTS=config.max_parts,
        ROWS_PADDED=padded_rows(num_rows, 16, 256, 1024),
        ASM=not isinstance(kernel, InterpretedFunction),
        **only_its,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **pdl(q.device),
    )  # fmt: skip
    return out
