"""Attention of one new token a row over the row's cached tokens.

Flash-decoding (Dao et al., 2023): programs share the rows' tokens out among themselves (in equal
shares, as stream-K does for products: Osama et al., 2023), each keeps an online softmax over its
part of a row, and the one that ends last merges the parts. The query heads that share a KV head are
one tile, so K and V are read once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from sglang.kernels.launch import (
    FLOAT32,
    counters,
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


MAX_PARTS = 16
"""Of a row."""


@dataclass(frozen=True)
class DecodeConfig:
    """How the work is cut. The launch grid follows from the shapes alone, so it fits a CUDA graph;
    what each program does is decided on the device."""

    block_n: int
    num_warps: int
    num_stages: int
    programs: int
    """As many as the GPU holds at once, or less: of all KV heads together."""
    min_tokens: int = 64
    """A program's share at least."""
    rounds: int = 8
    """Of programs that take a row each, at most."""

    def cut(self, num_rows: int, heads: int) -> tuple[int, int]:
        """(shares of the work, programs) for each of so many blocks of heads: a program for each
        share, or, if there are more rows and not too many, for each row."""
        shares = min(num_rows * MAX_PARTS, max(self.programs // heads, 1))
        # Those that find no work take time too.
        return shares, num_rows if shares < num_rows <= self.rounds * shares else shares


@cache
def decode_config(
    device: torch.device, num_rows: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> DecodeConfig:
    """The quickest on an H200. dtype: the cache's."""
    sms = multiprocessors(device)
    heads = num_rows * num_kv_heads
    if head_dim > 128 or dtype.itemsize == 4:
        return DecodeConfig(32, 4, 2, 4 * sms)
    are_few = heads <= 4 * sms
    if dtype.itemsize == 1:
        if are_few:
            return DecodeConfig(64, 2, 3, 4 * sms)
        # Conversion, not memory, is what a program waits for: alone at the end it is no quicker.
        return DecodeConfig(32, 1, 3, 8 * sms, rounds=2)
    if are_few:
        return DecodeConfig(32, 2, 3, 4 * sms, min_tokens=32)
    # Programs so small that many fit on an SM: the begin of one hides behind the others.
    if num_kv_heads <= 8:
        return DecodeConfig(32, 1, 3, 6 * sms)
    # Whole rows are quicker with three stages, shares with two.
    config = DecodeConfig(32, 1, 3, 8 * sms)
    shares, programs = config.cut(num_rows, num_kv_heads)
    return config if programs > shares else replace(config, num_stages=2)


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
    partial_ptr,  # float32 [programs, 2, HQ, D], normalised within its part
    lse_ptr,  # float32 [programs, 2, HQ], log2 of the part's sum of exponentials
    ended_ptr,  # int32 [n, head blocks], parts that have ended
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
    """The tiles of all rows, end to end, are cut into equal shares, one for each program: so all
    end at about the same time, whatever the rows' lengths. A share may begin and end within a row;
    of a row's parts, the one that ends last merges all. But if there are as many programs as rows,
    these are not short, and none is much longer than a share, a program takes a row: SMs are not
    equally quick, and those that are take more rows.

    A head's elements are in two parts, a and b, that are multiplied apart. Of a 16-bit cache that
    is its first half and the rest. An 8-bit cache is read as pairs, of which a is the first: so the
    tiles are of 16-bit elements, which load into the layout of the tensor cores as they are.
    """
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

    program = tl.program_id(1)
    r = tl.arange(0, ROWS_PADDED)
    seen_lens = tl.load(lens_ptr + r, mask=r < num_rows, other=0)
    if WINDOW > 0:
        seen_lens = tl.minimum(seen_lens, WINDOW)
    tiles = tl.cdiv(seen_lens, BLOCK_N)
    total_tiles = tl.sum(tiles, 0)
    longest = tl.max(tiles, 0)
    share = tl.maximum(tl.cdiv(total_tiles, num_shares), tl.cdiv(longest, MAX_PARTS - 1))
    share = tl.maximum(share, MIN_TILES)
    first_tile = program * share
    end_tile = tl.minimum(first_tile + share, total_tiles)
    are_even = (4 * longest <= 5 * share) & (total_tiles >= 8 * num_rows)
    whole_rows = are_even & (tl.num_programs(1) >= num_rows)
    if whole_rows:
        first_tile = tl.sum(tl.where(r < program, tiles, 0), 0)
        end_tile = tl.sum(tl.where(r <= program, tiles, 0), 0)
    ends = tl.cumsum(tiles, 0)
    first_row = tl.sum((ends <= first_tile).to(tl.int32), 0)
    last_row = tl.sum((ends < end_tile).to(tl.int32), 0)
    before = tl.sum(tl.where(r < first_row, tiles, 0), 0)  # tiles of the rows before
    for i in tl.range(first_row, last_row + 1):
        kv_len = tl.load(lens_ptr + i)
        first = 0
        if WINDOW > 0:
            first = tl.maximum(kv_len - WINDOW, 0)
        row_tiles = tl.cdiv(kv_len - first, BLOCK_N)
        start = first + tl.maximum(first_tile - before, 0) * BLOCK_N
        end = tl.minimum(first + (end_tile - before) * BLOCK_N, kv_len)
        first_program = before // share
        parts = (before + row_tiles - 1) // share - first_program + 1
        parts = tl.where(row_tiles > 0, tl.where(whole_rows, 1, parts), 0)
        before += row_tiles
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
            # A program's first part, or, if the row begins here, its last.
            at_part = (2 * program + (program == first_program).to(tl.int32)) * HQ + head
            partial_at = partial_ptr + at_part[:, None] * D
            tl.store(partial_at + a[None, :], acc_a, mask=in_a)
            tl.store(partial_at + b[None, :], acc_b, mask=in_b)
            tl.store(lse_ptr + at_part, most + tl.log2(total), mask=in_group < GROUP)
            tl.debug_barrier()  # the stores of all threads come before the count
            ended_at = ended_ptr + i * tl.num_programs(0) + tl.program_id(0)
            if tl.atomic_add(ended_at, 1, sem="acq_rel") == parts - 1:
                tl.store(ended_at, 0)
                d = tl.arange(0, BLOCK_D)
                s = tl.arange(0, MAX_PARTS)
                used = s < parts
                at_parts = (2 * (first_program + s) + (s == 0).to(tl.int32)) * HQ
                for h in range(first_head, tl.minimum(first_head + BLOCK_H, GROUP)):
                    at_head = kv_head * GROUP + h
                    # Past the L1, which other SMs' stores do not reach.
                    lse_at = lse_ptr + at_parts + at_head
                    lse = tl.load(lse_at, mask=used, other=-1.0e30, cache_modifier=".cg")
                    tile = partial_ptr + (at_parts + at_head)[:, None] * D + d[None, :]
                    tile_mask = used[:, None] & (d[None, :] < D)
                    part = tl.load(tile, mask=tile_mask, other=0.0, cache_modifier=".cg")
                    weight = tl.exp2(lse - tl.max(lse, 0))
                    out = tl.sum(weight[:, None] * part, 0) / tl.sum(weight, 0)
                    out_at = out_ptr + (at_row * HQ + at_head) * D + d
                    tl.store(out_at, out.to(dtype), mask=d < D)


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
        config = decode_config(q.device, num_rows, num_kv_heads, dim, k_cache.dtype)
    group = num_q_heads // num_kv_heads
    if out is None:
        out = torch.empty(num_rows, num_q_heads, dim, dtype=q.dtype, device=q.device)
    if num_rows == 0:
        return out
    heads = num_kv_heads * triton.cdiv(group, 16)
    shares, programs = config.cut(num_rows, heads)
    f32 = {"dtype": torch.float32, "device": q.device}
    partial = torch.empty(programs, 2, num_q_heads, dim, **f32)
    lse = torch.empty(programs, 2, num_q_heads, **f32)
    ended = counters(q.device, num_rows * heads)
    pairs = k_cache.dtype.itemsize == 1
    if pairs:
        k_cache, v_cache = k_cache.view(torch.int16), v_cache.view(torch.int16)
    # Heads first: programs side by side then read neighbouring parts of the same slots.
    _decode_kernel[(heads, programs)](
        q, k_cache, v_cache, slot_table, rows, kv_lens, partial, lse, ended, out,
        q.stride(0), k_cache.stride(0), slot_table.stride(0),
        scale * math.log2(math.e), num_rows, shares,
        WINDOW=window,
        HQ=num_q_heads,
        GROUP=group,
        D=dim,
        BLOCK_H=16,  # the least that tensor cores take
        BLOCK_D=triton.next_power_of_2(dim),
        BLOCK_N=config.block_n,
        MIN_TILES=triton.cdiv(config.min_tokens, config.block_n),
        MAX_PARTS=MAX_PARTS,
        ROWS_PADDED=padded_rows(num_rows, 16, 256, 1024),
        PAIRS=pairs,
        ASM=not isinstance(_decode_kernel, InterpretedFunction),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **pdl(q.device),
    )  # fmt: skip
    return out
