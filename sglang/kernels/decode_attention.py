"""Attention of one new token a row over the row's cached tokens.

Flash-decoding (Dao et al., 2023), with the work in equal shares (decode_shares.py). A program keeps
an online softmax over what it has of a row; of a row that is in several parts, the one that ends
last merges them. The query heads that share a KV head are one tile, so K and V are read once.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from sglang.kernels.decode_shares import Shares, program_of, share_out, share_start, tiles_of
from sglang.kernels.kv_tiles import load_tile, prefetch_tile, store_new
from sglang.kernels.launch import FLOAT32, counters, launch_next, pdl, wait_for_previous
from sglang.kernels.rope import Rope, load_columns, load_turned, rope_and_write_kv_naive


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
    shares: Shares | None = None,
    rope: Rope | None = None,
) -> torch.Tensor:
    """softmax(scale q K^T) V -> [n, Hq, D], in q's dtype.

    q           [n, Hq, D]; with `rope` [n, Hq + 2 Hkv, D], the heads of q, k and v as projected:
                q and k are turned, and k and v put into the caches, at the row's last slot
    k_cache, v_cache  [S, Hkv, D], of q's dtype or float8_e4m3fn; query head h reads KV
                head h // (Hq / Hkv)
    slot_table  int32 [R + 1, max_len]: row and token position -> slot of the cache
    rows        int32 [n]
    kv_lens     int32 [n], tokens of the row, the new one included; 0: the row is left out, and its
                part of `out` stays as it was
    window      only the last `window` tokens are seen; 0: all
    out         [n, Hq, D] contiguous, where the result goes
    shares      of these lengths and this window: all layers of a step can have the same
    """
    where = (q, k_cache, v_cache, slot_table, rows, kv_lens, scale, window, out)
    if q.is_cuda:
        return decode_attention_triton(*where, shares, rope)
    return decode_attention_naive(*where, rope)


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
    rope: Rope | None = None,
) -> torch.Tensor:
    if rope is not None:
        q = _rope_naive(q, k_cache, v_cache, slot_table, rows, kv_lens, rope)
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


def _rope_naive(
    qkv: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_table: torch.Tensor,
    rows: torch.Tensor,
    kv_lens: torch.Tensor,
    rope: Rope,
) -> torch.Tensor:
    """The turned q."""
    kv_heads = k_cache.shape[1]
    heads = qkv.shape[1] - 2 * kv_heads
    positions = (kv_lens - 1).clamp(min=0)
    slots = torch.where(kv_lens > 0, slot_table[rows, positions], -1)
    turned = qkv.flatten(1).clone()
    rope_and_write_kv_naive(
        turned, positions, slots, rope.cos_sin, k_cache, v_cache, heads, kv_heads,
        rope.q_norm, rope.k_norm, rope.eps,
    )  # fmt: skip
    return turned.view_as(qkv)[:, :heads]


@triton.jit
def _merge(
    partial_ptr,
    lse_ptr,
    out_ptr,  # of the row
    group_start,
    h,  # the first of the heads, in the group
    first_owner,
    last_owner,
    first_part,
    programs,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEADS: tl.constexpr,
    MERGED: tl.constexpr,
):
    """The parts of a row, which are the first ones of their programs, but for the row's first."""
    column = tl.arange(0, HEADS * BLOCK_D)
    head, d = h + column // BLOCK_D, column % BLOCK_D
    mask = (head < GROUP) & (d < D)
    at_head = group_start + head
    most = tl.full([HEADS * BLOCK_D], -1.0e30, tl.float32)
    total = tl.zeros([HEADS * BLOCK_D], tl.float32)
    merged = tl.zeros([HEADS * BLOCK_D], tl.float32)
    for at in tl.range(first_owner, last_owner + 1, MERGED):
        owner = at + tl.arange(0, MERGED)
        part = tl.where(owner == first_owner, first_part, 2 * owner)
        at_part = at_head[None, :] * 2 * programs + part[:, None]
        used = (owner <= last_owner)[:, None] & mask[None, :]
        # Past the L1, which other SMs' stores do not reach.
        lse = tl.load(lse_ptr + at_part, mask=used, other=-1.0e30, cache_modifier=".cg")
        parts_at = partial_ptr + at_part.to(tl.int64) * D + d[None, :]
        parts = tl.load(parts_at, mask=used, other=0.0, cache_modifier=".cg")
        new_most = tl.maximum(most, tl.max(lse, 0))
        weight = tl.exp2(lse - new_most[None, :])
        shrink = tl.exp2(most - new_most)
        merged = merged * shrink + tl.sum(weight * parts, 0)
        total = total * shrink + tl.sum(weight, 0)
        most = new_most
    tl.store(out_ptr + at_head * D + d, (merged / total).to(out_ptr.dtype.element_ty), mask=mask)


# What varies from step to step, alignment included, must not compile a kernel anew.
@triton.jit(do_not_specialize_on_alignment=["rows_ptr", "lens_ptr"])
def _decode_kernel(
    q_ptr,  # [n, HQ, D], or [n, HQ + 2 HKV, D] if ROPE
    k_ptr,
    v_ptr,
    cos_sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    table_ptr,
    rows_ptr,
    lens_ptr,
    work_ptr,  # Shares.work
    partial_ptr,  # float32 [HQ, programs, 2, D], normalised within its part of a row
    lse_ptr,  # float32 [HQ, programs, 2], log2 of the part's sum of exponentials
    ended_ptr,  # int32 [n, head blocks], parts that have ended
    out_ptr,  # [n, HQ, D] contiguous
    q_stride,
    kv_stride,  # of a slot, in both caches
    table_stride,
    scale_log2,
    eps,
    WINDOW: tl.constexpr,
    HQ: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MERGED: tl.constexpr,
    MERGED_HEADS: tl.constexpr,
    EARLY_TILES: tl.constexpr,
    ROPE: tl.constexpr,
    NORM: tl.constexpr,
    PAIRS: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """A row is whole, or it is the last of one program, all of the next ones and the first of
    another. So a program has at most two parts of rows: its first row's and its last row's. With
    ROPE, the program that has a row's last token puts that into the cache.
    A head's elements are in the parts a and b of kv_tiles.py.
    """
    HEAD_BLOCKS: tl.constexpr = (GROUP + BLOCK_H - 1) // BLOCK_H
    HALVES: tl.constexpr = not PAIRS and D == BLOCK_D
    kv_head = tl.program_id(0) // HEAD_BLOCKS
    first_head = (tl.program_id(0) % HEAD_BLOCKS) * BLOCK_H
    program, programs = tl.program_id(1), tl.num_programs(1)
    in_group = first_head + tl.arange(0, BLOCK_H)
    head = kv_head * GROUP + in_group
    half = tl.arange(0, BLOCK_D // 2)
    a = 2 * half if PAIRS else half
    b = a + 1 if PAIRS else half + BLOCK_D // 2
    in_heads = in_group[:, None] < GROUP
    in_a, in_b = in_heads & (a[None, :] < D), in_heads & (b[None, :] < D)
    n = tl.arange(0, BLOCK_N)
    k_base = k_ptr + kv_head * (D // 2 if PAIRS else D)
    v_base = v_ptr + kv_head * (D // 2 if PAIRS else D)
    dtype = out_ptr.dtype.element_ty
    tile_dtype: tl.constexpr = tl.float16 if PAIRS else dtype

    work_at = work_ptr + 8 * program
    first_row, tile, last_row = tl.load(work_at), tl.load(work_at + 1), tl.load(work_at + 2)
    share_end, total_tiles = tl.load(work_at + 4), tl.load(work_at + 5)
    left = share_end - tl.load(work_at + 3)
    programs = tl.minimum(programs, total_tiles)  # the others have nothing to do
    kv_len = tl.load(lens_ptr + first_row, mask=first_row <= last_row, other=0)
    row = tl.load(rows_ptr + first_row, mask=first_row <= last_row, other=0)
    one_head = tl.zeros([1, 1], tl.int32)
    # Only the new tokens depend on the kernels before.
    if PDL:
        table = table_ptr + row.to(tl.int64) * table_stride
        start = tile * BLOCK_N
        if WINDOW > 0:
            start += tl.maximum(kv_len - WINDOW, 0)
        for at in tl.range(start, start + tl.minimum(left, EARLY_TILES) * BLOCK_N, BLOCK_N):
            slots = tl.load(table + at + n, mask=at + n < kv_len, other=0)
            prefetch_tile(k_base, slots, kv_stride, D, PAIRS)
            prefetch_tile(v_base, slots, kv_stride, D, PAIRS)
    launch_next(PDL)
    wait_for_previous(PDL)
    for i in tl.range(first_row, last_row + 1):
        next_len = tl.load(lens_ptr + i + 1, mask=i < last_row, other=0)
        next_row = tl.load(rows_ptr + i + 1, mask=i < last_row, other=0)
        tiles = tiles_of(kv_len, BLOCK_N, WINDOW)
        last_tile = tl.minimum(tiles, tile + left)
        if tiles > 0:
            first = 0
            if WINDOW > 0:
                first = tl.maximum(kv_len - WINDOW, 0)
            start = first + tile * BLOCK_N
            end = tl.minimum(first + last_tile * BLOCK_N, kv_len)
            at_row = tl.full([], i, tl.int64)
            table = table_ptr + row.to(tl.int64) * table_stride
            q_at = q_ptr + at_row * q_stride + head[:, None] * D
            if ROPE:
                # The row's new token is in no tile: it is added at the end, and put into the cache.
                is_new = end == kv_len
                end -= is_new.to(tl.int32)
                cos_sin = cos_sin_ptr + (kv_len - 1).to(tl.int64) * D
                q_a, q_b = load_turned(
                    q_at, in_heads, a, b, cos_sin, q_norm_ptr, eps, D, NORM, HALVES
                )
                q_a, q_b = q_a.to(dtype).to(tile_dtype), q_b.to(dtype).to(tile_dtype)
            else:
                q_a = tl.load(q_at + a[None, :], mask=in_a, other=0.0).to(tile_dtype)
                q_b = tl.load(q_at + b[None, :], mask=in_b, other=0.0).to(tile_dtype)

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
                k_a, k_b = load_tile(k_base, offset, seen, half, a, b, D, PAIRS, ASM)
                v_a, v_b = load_tile(v_base, offset, seen, half, a, b, D, PAIRS, ASM)
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

            if ROPE:  # noqa: SIM102
                if is_new:
                    new_at = q_ptr + at_row * q_stride + (HQ + kv_head) * D + one_head
                    new_slot = tl.load(table + kv_len - 1).to(tl.int64) * kv_stride + one_head
                    k_a, k_b = load_turned(
                        new_at, one_head == 0, a, b, cos_sin, k_norm_ptr, eps, D, NORM, HALVES
                    )
                    v_a, v_b = load_columns(new_at + HQ // GROUP * D, one_head == 0, a, b, D)
                    k_a, k_b = store_new(
                        k_base + new_slot, k_a.to(dtype), k_b.to(dtype), a, b, half, D, PAIRS
                    )
                    v_a, v_b = store_new(v_base + new_slot, v_a, v_b, a, b, half, D, PAIRS)
                    score = tl.sum(q_a.to(tl.float32) * k_a, 1) + tl.sum(
                        q_b.to(tl.float32) * k_b, 1
                    )
                    score *= scale_log2
                    new_most = tl.maximum(most, score)
                    weight, shrink = tl.exp2(score - new_most), tl.exp2(most - new_most)
                    total = total * shrink + weight
                    acc_a = acc_a * shrink[:, None] + weight[:, None] * v_a
                    acc_b = acc_b * shrink[:, None] + weight[:, None] * v_b
                    most = new_most
            acc_a = acc_a / total[:, None]
            acc_b = acc_b / total[:, None]
            if last_tile - tile == tiles:
                out_at = out_ptr + (at_row * HQ + head)[:, None] * D
                tl.store(out_at + a[None, :], acc_a.to(dtype), mask=in_a)
                tl.store(out_at + b[None, :], acc_b.to(dtype), mask=in_b)
            else:
                part = 2 * program + tl.where(i == first_row, 0, 1)
                at_part = head * 2 * programs + part
                partial_at = partial_ptr + at_part[:, None].to(tl.int64) * D
                tl.store(partial_at + a[None, :], acc_a, mask=in_a)
                tl.store(partial_at + b[None, :], acc_b, mask=in_b)
                tl.store(lse_ptr + at_part, most + tl.log2(total), mask=in_group < GROUP)
                # Whose parts the row has.
                row_start = share_end - left - tile
                first_owner = program_of(row_start, total_tiles, programs)
                last_owner = program_of(row_start + tiles - 1, total_tiles, programs)
                tl.debug_barrier()  # the stores of all threads come before the count
                ended_at = ended_ptr + i * tl.num_programs(0) + tl.program_id(0)
                if tl.atomic_add(ended_at, 1, sem="acq_rel") == last_owner - first_owner:
                    tl.store(ended_at, 0)
                    # The first owner may have another row before it.
                    begins = share_start(first_owner, total_tiles, programs) == row_start
                    first_part = 2 * first_owner + tl.where(begins, 0, 1)
                    for h in range(
                        first_head, tl.minimum(first_head + BLOCK_H, GROUP), MERGED_HEADS
                    ):
                        _merge(
                            partial_ptr, lse_ptr, out_ptr + at_row * HQ * D, kv_head * GROUP, h,
                            first_owner, last_owner, first_part, programs,
                            GROUP, D, BLOCK_D, MERGED_HEADS, MERGED,
                        )  # fmt: skip
        left -= last_tile - tile
        tile, kv_len, row = 0, next_len, next_row


def decode_attention_triton(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_table: torch.Tensor,
    rows: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    window: int = 0,
    out: torch.Tensor | None = None,
    shares: Shares | None = None,
    rope: Rope | None = None,
) -> torch.Tensor:
    num_rows, num_q_heads, dim = q.shape
    num_kv_heads = k_cache.shape[1]
    if rope is not None:
        num_q_heads -= 2 * num_kv_heads
    if out is None:
        out = torch.empty(num_rows, num_q_heads, dim, dtype=q.dtype, device=q.device)
    if num_rows == 0:
        return out
    early = pdl(q.device)
    if shares is None:
        shares = share_out(kv_lens, num_q_heads, num_kv_heads, dim, k_cache.dtype, window)
        early = {"PDL": False}
    group, config = num_q_heads // num_kv_heads, shares.config
    heads = num_kv_heads * triton.cdiv(group, 16)
    f32 = {"dtype": torch.float32, "device": q.device}
    partial = torch.empty(num_q_heads, shares.programs, 2, dim, **f32)
    lse = torch.empty(num_q_heads, shares.programs, 2, **f32)
    ended = counters(q.device, num_rows * heads)
    pairs = k_cache.dtype.itemsize == 1
    if pairs:
        k_cache, v_cache = k_cache.view(torch.int16), v_cache.view(torch.int16)
    # Heads first: programs side by side then read neighbouring parts of the same slots.
    _decode_kernel[(heads, shares.programs)](
        q, k_cache, v_cache,
        rope and rope.cos_sin, rope and rope.q_norm, rope and rope.k_norm,
        slot_table, rows, kv_lens, shares.work, partial, lse, ended, out,
        q.stride(0), k_cache.stride(0), slot_table.stride(0), scale * math.log2(math.e),
        rope.eps if rope else 0.0,
        WINDOW=window,
        HQ=num_q_heads,
        GROUP=group,
        D=dim,
        BLOCK_H=16,  # the least that tensor cores take
        BLOCK_D=triton.next_power_of_2(dim),
        BLOCK_N=config.block_n,
        MERGED=4 * config.num_warps,  # as much as registers hold
        MERGED_HEADS=min(group, config.num_warps, 2),
        EARLY_TILES=config.early_tiles,
        ROPE=rope is not None,
        NORM=rope is not None and rope.q_norm is not None,
        PAIRS=pairs,
        ASM=not isinstance(_decode_kernel, InterpretedFunction),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **early,
    )  # fmt: skip
    return out
