"""Causal attention of a row's new tokens over its cached prefix and themselves.

FlashAttention-2 (Dao, 2023). The prefix' K and V are gathered through the slot table. Those of the
new tokens lie in a row, as the QKV projection left them: the copy engine (TMA) loads their tiles,
with no pointers to compute, and an 8-bit cache has not rounded them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from sglang.kernels.launch import (
    FLOAT32,
    counters,
    launch_next,
    padded_rows,
    pdl,
    wait_for_previous,
)

try:
    from sglang.kernels import extend_attention_hopper as hopper
except ImportError:  # Triton without Gluon, or with an older one
    hopper = None

_HIDDEN = tl.constexpr(-(2.0**100))
"""The score of a key that a query does not see. Finite, not -inf: a window may hide all of a tile
from a query, and -inf less -inf is NaN. What such a tile adds is scaled away by the first tile that
is seen. A power of two: times the scale it is exact, so that less itself it is zero."""


def extend_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_table: torch.Tensor,
    rows: torch.Tensor,
    q_starts: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    window: int,
    max_q_len: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scale q K^T + causal mask) V -> [T, Hq, D], in q's dtype.

    q           [T, Hq, D], the new tokens of m rows, one row after the other
    k, v        [T, Hkv, D], theirs; a token's heads are contiguous, in q as well
    k_cache, v_cache  [S, Hkv, D], of q's dtype or float8_e4m3fn: of the tokens before them
    slot_table  int32 [R + 1, max_len]: row and token position -> slot of the cache
    rows        int32 [m]
    q_starts    int32 [m + 1], where in q each row begins; the last one is where the last row ends
    kv_lens     int32 [m], cached and new tokens of the row: its last query is the last of them; 0:
                the row is left out, and its part of `out` stays as it was
    window      a token sees only itself and the window - 1 before it; 0: all before it
    max_q_len   an upper bound of the rows' new tokens, known on the host
    out         [T, Hq, D] contiguous, where the result goes
    """
    run = extend_attention_triton if q.is_cuda else extend_attention_naive
    if hopper is not None and hopper.usable(q, k_cache, window, max_q_len):
        run = hopper.extend_attention_hopper
    return run(
        q, k, v, k_cache, v_cache, slot_table, rows, q_starts, kv_lens, scale, window, max_q_len,
        out=out,
    )  # fmt: skip


def extend_attention_naive(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_table: torch.Tensor,
    rows: torch.Tensor,
    q_starts: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    window: int,
    max_q_len: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    out = torch.zeros_like(q) if out is None else out
    group = q.shape[1] // k.shape[1]
    starts = q_starts.tolist()
    for i, (row, kv_len) in enumerate(zip(rows.tolist(), kv_lens.tolist(), strict=True)):
        new = slice(starts[i], starts[i + 1])
        q_len = new.stop - new.start
        if q_len == 0 or kv_len == 0:
            continue
        slots = slot_table[row, : kv_len - q_len]
        keys = torch.cat((k_cache[slots].to(k.dtype), k[new])).float()  # [L, Hkv, D]
        values = torch.cat((v_cache[slots].to(v.dtype), v[new])).float()
        keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))  # [L, Hq, D]
        query_at = torch.arange(kv_len - q_len, kv_len, device=q.device)[:, None]
        key_at = torch.arange(kv_len, device=q.device)[None, :]
        hidden = key_at > query_at
        if window:
            hidden |= key_at <= query_at - window
        scores = torch.einsum("qhd,lhd->hql", q[new].float(), keys) * scale
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[new] = torch.einsum("hql,lhd->qhd", weights, values)
    return out


@dataclass(frozen=True)
class ExtendConfig:
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    pack: bool
    """Whether the query heads that share a KV head also share a tile, [tokens x heads, D]: with
    few new tokens it fills the tile, and they then read the same K and V once."""
    max_splits: int = 1
    """Programs that may share a tile's keys out among themselves, for few tokens over many keys."""
    split_tokens: int = 512
    """A tile gets another split for each of these keys, until it has max_splits."""


def extend_config(
    num_tokens: int, max_q_len: int, group: int, head_dim: int, dtype: torch.dtype
) -> ExtendConfig:
    pack = group > 1
    rows = max_q_len * group if pack else max_q_len
    # Many tokens fill the GPU without, and their partial results would be large.
    splits = 8 if num_tokens <= 128 else 4 if num_tokens <= 512 else 1
    if rows <= 32:
        return ExtendConfig(16 if rows <= 16 else 32, 64, 4, 3, pack, splits)
    if dtype.itemsize == 4:
        return ExtendConfig(32 if head_dim > 128 else 64, 32, 4, 2, pack, splits)
    if head_dim > 128:
        return ExtendConfig(128, 64, 8, 2, pack, splits)
    return ExtendConfig(64, 64, 4, 2 if max_q_len < 512 else 3, pack, splits)


@triton.jit
def _attend(
    acc, most, total, q, query_at, start, end, seen_by_all, tiles, column, first_row,
    table, k_base, v_base, kv_stride, scale_log2,
    NEW: tl.constexpr,
    WINDOW: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One online softmax over the keys start..end-1, all of the prefix or all new. `most` is of
    unscaled scores: scale and subtraction are then one multiply-add.

    seen_by_all  every query sees the keys before this one
    tiles        descriptors of the new tokens' K and V, whose row of key i is i + first_row
    column       where in their rows the KV head begins
    """
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    seen_by_all = tl.minimum(seen_by_all, end)
    if not NEW:
        # The index tile is loaded one turn ahead: a gather through an index of its own turn would
        # keep a single tile in flight whatever num_stages says. Past the end it repeats the last.
        last = tl.maximum(end - 1, 0)
        slots = tl.load(table + tl.minimum(start + n, last))
    for at in tl.range(start, end, BLOCK_N):
        if NEW:
            k = tiles[0].load([first_row + at, column])  # [BLOCK_N, BLOCK_D]
            v = tiles[1].load([first_row + at, column])
        else:
            offset = (slots.to(tl.int64) * kv_stride)[:, None]
            if D == BLOCK_D:
                k = tl.load(k_base + offset)
                v = tl.load(v_base + offset)
            else:
                k = tl.load(k_base + offset, mask=d[None, :] < D, other=0.0)
                v = tl.load(v_base + offset, mask=d[None, :] < D, other=0.0)
            slots = tl.load(table + tl.minimum(at + BLOCK_N + n, last))
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=FLOAT32)
        if at + BLOCK_N > seen_by_all:
            distance = query_at[:, None] - (at + n)[None, :]
            visible = (distance >= 0) & (at + n < end)[None, :]
            if WINDOW > 0:
                visible = visible & (distance < WINDOW)
            scores = tl.where(visible, scores, _HIDDEN)
        new_most = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp2(scores * scale_log2 - (new_most * scale_log2)[:, None])
        shrink = tl.exp2((most - new_most) * scale_log2)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc, input_precision=FLOAT32)
        most = new_most
    return acc, most, total


# What varies from step to step, alignment included, must not compile a kernel anew.
@triton.jit(
    do_not_specialize=["num_rows", "split_tokens"],
    do_not_specialize_on_alignment=["rows_ptr", "q_starts_ptr", "lens_ptr"],
)
def _extend_kernel(
    q_ptr,
    new_k,  # descriptors of [T, HKV D], tiles of [BLOCK_N, BLOCK_D]
    new_v,
    k_ptr,
    v_ptr,
    table_ptr,
    rows_ptr,
    q_starts_ptr,
    lens_ptr,
    out_ptr,  # [T, HQ, D] contiguous
    partial_ptr,  # float32 [T, HQ, MAX_SPLITS, D], normalised within its split
    lse_ptr,  # float32 [T, HQ, MAX_SPLITS], log2 of the split's sum of exponentials
    ended_ptr,  # int32 [tiles, heads], splits that have ended
    q_stride,
    kv_stride,  # of a slot, in both caches
    table_stride,
    scale_log2,
    num_rows,
    split_tokens,
    WINDOW: tl.constexpr,
    HQ: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,  # query heads of a tile: GROUP or 1
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS_PADDED: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Tiles are numbered through the rows: row r's begin at q_starts[r] // TOKENS + r, which leaves
    each at least as many numbers as it needs. A program takes every num_programs-th number: the
    grid must do for the worst split of tokens into rows, and programs without work cost time."""
    launch_next(PDL)
    wait_for_previous(PDL)
    TOKENS: tl.constexpr = BLOCK_M // PACK
    r = tl.arange(0, ROWS_PADDED)
    starts = tl.load(q_starts_ptr + r, mask=r < num_rows, other=0)
    first_tile = tl.where(r < num_rows, starts // TOKENS + r, 0x7FFFFFFF)
    num_tokens = tl.load(q_starts_ptr + num_rows)
    # The last rows may be padding, with no tokens.
    tiles = num_tokens // TOKENS + tl.sum(((starts < num_tokens) & (r < num_rows)).to(tl.int32))

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    head = tl.program_id(0) * PACK + m % PACK
    kv_head = tl.program_id(0) * PACK // GROUP
    k_base = k_ptr + kv_head * D + d[None, :]
    v_base = v_ptr + kv_head * D + d[None, :]
    for i in tl.range(tl.program_id(1), tiles, tl.num_programs(1)):
        # A row's last tokens see the most keys: begin with them, the short work fills the gaps.
        tile = tiles - 1 - i
        row = tl.sum((first_tile <= tile).to(tl.int32)) - 1
        q_start = tl.load(q_starts_ptr + row)
        q_len = tl.load(q_starts_ptr + row + 1) - q_start
        first = (tile - q_start // TOKENS - row) * TOKENS
        kv_len = tl.load(lens_ptr + row)
        if (first < q_len) & (kv_len > 0):
            token = first + m // PACK
            in_tile = (m < TOKENS * PACK) & (token < q_len)
            q_mask = in_tile[:, None] & (d[None, :] < D)
            q_row = (q_start + token).to(tl.int64)[:, None]
            q_at = q_ptr + q_row * q_stride + head[:, None] * D + d[None, :]
            q = tl.load(q_at, mask=q_mask, other=0.0)
            prefix = kv_len - q_len
            query_at = prefix + token
            table = table_ptr + tl.load(rows_ptr + row).to(tl.int64) * table_stride

            end = tl.minimum(prefix + first + TOKENS, kv_len)
            start = 0
            if WINDOW > 0:
                start = tl.maximum(prefix + first - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
            splits = 1
            split = 0
            if MAX_SPLITS > 1:
                split = tl.program_id(2)
                size = tl.cdiv(end - start, MAX_SPLITS * BLOCK_N) * BLOCK_N
                size = tl.maximum(size, split_tokens)
                splits = tl.maximum(tl.cdiv(end - start, size), 1)
                start += split * size
                end = tl.minimum(start + size, end)
            if split < splits:
                most = tl.full([BLOCK_M], _HIDDEN, tl.float32)
                total = tl.zeros([BLOCK_M], tl.float32)
                acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
                tiles_of_new = (new_k, new_v)
                seen_by_all = prefix + first + 1 if WINDOW == 0 else 0
                # The new tokens come first: behind the loop over the prefix, ptxas would wait for
                # every single matrix instruction.
                for OLD in tl.static_range(2):
                    acc, most, total = _attend(
                        acc, most, total, q, query_at,
                        start if OLD else tl.maximum(prefix, start),
                        tl.minimum(prefix, end) if OLD else end,
                        seen_by_all, tiles_of_new, kv_head * D, q_start - prefix,
                        table, k_base, v_base, kv_stride, scale_log2,
                        not OLD, WINDOW, D, BLOCK_D, BLOCK_N,
                    )  # fmt: skip
                acc = acc / total[:, None]
                at = q_row * HQ + head[:, None]  # [BLOCK_M, 1]
                out_at = out_ptr + at * D + d[None, :]
                dtype = out_ptr.dtype.element_ty
                if splits == 1:
                    tl.store(out_at, acc.to(dtype), mask=q_mask)
                elif MAX_SPLITS > 1:
                    lse = (most * scale_log2 + tl.log2(total))[:, None]
                    at_split = at * MAX_SPLITS + split
                    tl.store(partial_ptr + at_split * D + d[None, :], acc, mask=q_mask)
                    tl.store(lse_ptr + at_split, lse, mask=in_tile[:, None])
                    tl.debug_barrier()  # the stores of all threads come before the count
                    ended_at = ended_ptr + tile * tl.num_programs(0) + tl.program_id(0)
                    if tl.atomic_add(ended_at, 1, sem="acq_rel") == splits - 1:
                        tl.store(ended_at, 0)
                        highest = tl.full([BLOCK_M, 1], -float("inf"), tl.float32)
                        shares = tl.zeros([BLOCK_M, 1], tl.float32)
                        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
                        for s in range(splits):
                            at_split = at * MAX_SPLITS + s
                            lse_at = lse_ptr + at_split
                            part_at = partial_ptr + at_split * D + d[None, :]
                            # Past the L1, which other SMs' stores do not reach.
                            lse = tl.load(
                                lse_at, mask=in_tile[:, None], other=0.0, cache_modifier=".cg"
                            )
                            part = tl.load(part_at, mask=q_mask, other=0.0, cache_modifier=".cg")
                            new_highest = tl.maximum(highest, lse)
                            shrink = tl.exp2(highest - new_highest)
                            share = tl.exp2(lse - new_highest)
                            acc = acc * shrink + part * share
                            shares = shares * shrink + share
                            highest = new_highest
                        tl.store(out_at, (acc / shares).to(dtype), mask=q_mask)


def extend_attention_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_table: torch.Tensor,
    rows: torch.Tensor,
    q_starts: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    window: int,
    max_q_len: int,
    config: ExtendConfig | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    num_tokens, num_q_heads, dim = q.shape
    num_rows = len(rows)
    num_kv_heads = k.shape[1]
    group = num_q_heads // num_kv_heads
    if config is None:
        config = extend_config(num_tokens, max_q_len, group, dim, q.dtype)
    if out is None:
        out = torch.empty(num_tokens, num_q_heads, dim, dtype=q.dtype, device=q.device)
    if num_tokens == 0:
        return out
    pack = group if config.pack and group <= config.block_m else 1
    heads, tokens = num_q_heads // pack, config.block_m // pack
    # A program for each tile, unless there are very many short rows.
    tiles = num_tokens // tokens + num_rows
    splits, partial, lse, ended = config.max_splits, None, None, None
    programs = min(num_tokens, tiles, num_tokens // tokens + triton.cdiv(512, heads * splits))
    if splits > 1:
        partial = torch.empty(num_tokens, num_q_heads, splits, dim, device=q.device)
        lse = torch.empty(num_tokens, num_q_heads, splits, device=q.device)
        ended = counters(q.device, tiles * heads)
    block_d = triton.next_power_of_2(dim)

    def tiles_of(x: torch.Tensor) -> TensorDescriptor:
        shape, strides = [num_tokens, num_kv_heads * dim], [x.stride(0), 1]
        return TensorDescriptor(x, shape, strides, [config.block_n, block_d])

    # Heads first: those of one group then read the same K and V at about the same time.
    _extend_kernel[(heads, programs, splits)](
        q, tiles_of(k), tiles_of(v), k_cache, v_cache, slot_table, rows, q_starts, kv_lens,
        out, partial, lse, ended,
        q.stride(0), k_cache.stride(0), slot_table.stride(0),
        scale * math.log2(math.e), num_rows, config.split_tokens,
        WINDOW=window,
        HQ=num_q_heads,
        GROUP=group,
        PACK=pack,
        D=dim,
        BLOCK_D=block_d,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        ROWS_PADDED=padded_rows(num_rows, 1024),
        MAX_SPLITS=splits,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **pdl(q.device),
    )  # fmt: skip
    return out
