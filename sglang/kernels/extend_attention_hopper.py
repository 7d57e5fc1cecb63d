"""FlashAttention-3 (Shah et al., 2024), in Gluon: extend attention where Hopper has much to do.

A program has three groups of four warps: one loads, two multiply, each with half of a tile of 128
queries. While a group's weights meet their values, and the other group has its own products, the
tensor cores form its next scores: what a softmax takes is hidden behind them.

K and V come through rings (hopper.py). The queries, and what is to be done with them, have a ring
too: short rows have few keys, and the next tile should be there when the last one is done.

The queries of a tile meet the keys around their own first, the only ones with a causal mask; then
the prefix from its end, where a tile may be partly empty; then the new tokens before their own.
"""

from __future__ import annotations

import math

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sglang.kernels.hopper import (
    load_tile,
    multiprocessors,
    ring_of,
    stage,
    tiles_of,
)
from sglang.kernels.launch import counters, padded_rows

# In Triton 3.9 it is `async_load`.
load_rows = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

BLOCK = gl.constexpr(128)
"""Query rows of a tile, and keys of one."""
STAGES = gl.constexpr(2)
FIELDS = gl.constexpr(5)
"""Of a tile of queries: head, row's start in q, its new tokens, tile's first of them (-1: there are
no more tiles), and the prefix' length."""


def usable(q: torch.Tensor, k_cache: torch.Tensor, window: int, max_q_len: int) -> bool:
    """Whether the kernel can take these, and is likely to be the quicker one: it is where an SM has
    some tiles. A tile is begun slowly, and its keys are never shared out among programs."""
    num_tokens, num_q_heads, dim = q.shape
    processors = multiprocessors(q.device)
    return (
        processors > 0
        and q.dtype in (torch.float16, torch.bfloat16)
        and k_cache.dtype == q.dtype
        and dim in (64, 128)
        and window == 0
        and max_q_len >= 512
        and num_tokens * num_q_heads >= 2.5 * processors * BLOCK.value
    )


@gluon.jit
def _put(items, lap, fields):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    for i in gl.static_range(FIELDS):
        items.index(lap % STAGES * FIELDS + i).store(gl.full([1], fields[i], gl.int32, layout))


@gluon.jit
def _get(items, lap, i: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.max(items.index(lap % STAGES * FIELDS + i).load(layout), 0)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _copy(ring, turn, source, row, column):
    """New tokens: a tile of a tensor, by the copy engine, which arrives at `ready` itself."""
    tile, ready, free, parity = stage(ring, turn)
    mbarrier.wait(free, parity ^ 1)
    mbarrier.expect(ready, source.block_type.nbytes)
    load_tile(source, [row, column], ready, tile)


@gluon.jit
def _gather(tile, base, offsets, layout: gl.constexpr):
    """Rows from anywhere: they have come when `wait_group` says so."""
    d = gl.arange(0, tile.shape[1], layout=gl.SliceLayout(0, layout))
    load_rows(tile, base + offsets[:, None] + d[None, :])
    async_copy.commit_group()


@gluon.jit
def _gathered(pending: gl.constexpr, keys, values, turn):
    """All but the newest `pending` gathers are in shared memory, where tensor cores see them."""
    async_copy.wait_group(pending)
    fence_async_shared()
    mbarrier.arrive(stage(keys, turn)[1])
    mbarrier.arrive(stage(values, turn)[1])


@gluon.jit
def _load(
    q_ptr, new_k, new_v, k_ptr, v_ptr, table_ptr, rows_ptr, q_starts_ptr, lens_ptr, next_ptr,
    q_stride, kv_stride, table_stride, num_rows, items, queries, keys, values,
    HEADS: gl.constexpr, GROUP: gl.constexpr, PACK: gl.constexpr, ROWS_PADDED: gl.constexpr,
):  # fmt: skip
    """Take one tile of one head (or PACK heads) after the other, and load what it needs."""
    TOKENS: gl.constexpr = BLOCK // PACK
    D: gl.constexpr = keys.tiles.shape[2]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    n = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, LAYOUT))
    r = gl.arange(0, ROWS_PADDED, layout=gl.BlockedLayout([1], [32], [4], [0]))
    starts = gl.load(q_starts_ptr + r, mask=r < num_rows, other=0)
    ends = gl.load(q_starts_ptr + r + 1, mask=r < num_rows, other=0)
    lens = gl.load(lens_ptr + r, mask=r < num_rows, other=0)
    tiles = gl.where(lens > 0, (ends - starts + TOKENS - 1) // TOKENS, 0)
    num_tiles = gl.sum(tiles, 0)
    end_tile = gl.associative_scan(tiles, 0, _add)
    turn = 0
    lap = 0
    taken = gl.atomic_add(next_ptr, 1)
    while taken < num_tiles * HEADS:
        # A row's last tokens see the most keys: begin with them, the short work fills the gaps.
        tile = num_tiles - 1 - taken // HEADS
        head = taken % HEADS
        row = gl.sum((end_tile <= tile).to(gl.int32), 0)
        first = (tile - gl.max(gl.where(end_tile <= tile, end_tile, 0), 0)) * TOKENS
        q_start = gl.load(q_starts_ptr + row)
        q_len = gl.load(q_starts_ptr + row + 1) - q_start
        prefix = gl.load(lens_ptr + row) - q_len
        table = table_ptr + gl.load(rows_ptr + row).to(gl.int64) * table_stride
        column = head * PACK // GROUP * D
        own = first // BLOCK
        _copy(keys, turn, new_k, q_start + own * BLOCK, column)
        _copy(values, turn, new_v, q_start + own * BLOCK, column)
        turn += 1
        q, ready, free, parity = stage(queries, lap)
        mbarrier.wait(free, parity ^ 1)
        _put(items, lap, (head, q_start, q_len, first, prefix))
        token = q_start + gl.minimum(first + n // PACK, q_len - 1)
        _gather(q, q_ptr, token.to(gl.int64) * q_stride + (head * PACK + n % PACK) * D, LAYOUT)
        async_copy.wait_group(0)
        fence_async_shared()
        mbarrier.arrive(ready)
        lap += 1
        old = gl.cdiv(prefix, BLOCK)
        for i in range(old):
            key = (old - 1 - i) * BLOCK + n
            slots = gl.load(table + gl.minimum(key, prefix - 1))
            slot_at = slots.to(gl.int64) * kv_stride + column
            k, _, free, parity = stage(keys, turn)
            mbarrier.wait(free, parity ^ 1)
            _gather(k, k_ptr, slot_at, LAYOUT)
            if i > 0:  # one turn late, so that the next gather has begun
                _gathered(1, keys, values, turn - 1)
            v, _, free, parity = stage(values, turn)
            mbarrier.wait(free, parity ^ 1)
            _gather(v, v_ptr, slot_at, LAYOUT)
            turn += 1
        if old > 0:
            _gathered(0, keys, values, turn - 1)
        for i in range(own):
            _copy(keys, turn, new_k, q_start + i * BLOCK, column)
            _copy(values, turn, new_v, q_start + i * BLOCK, column)
            turn += 1
        taken = gl.atomic_add(next_ptr, 1)
    # Every program has asked once in vain: the last one to ask leaves the counter as it was.
    if taken == num_tiles * HEADS + gl.num_programs(0) - 1:
        gl.store(next_ptr, 0)
    _, ready, free, parity = stage(queries, lap)
    mbarrier.wait(free, parity ^ 1)
    _put(items, lap, (0, 0, 0, -1, 0))
    mbarrier.arrive(ready)


@gluon.jit
def _softmax(scores, most, total, scale_log2, layout: gl.constexpr, dtype: gl.constexpr):
    """Weights of a tile, relative to the highest score so far; what came before is to shrink."""
    new_most = gl.maximum(most, gl.max(scores, 1))
    weights = gl.exp2(scores * scale_log2 - (new_most * scale_log2)[:, None])
    shrink = gl.exp2((most - new_most) * scale_log2)
    total = total * shrink + gl.sum(weights, 1)
    return gl.convert_layout(weights.to(dtype), layout), new_most, total, shrink


@gluon.jit
def _step(acc, weights, most, total, turn, q, keys, values, scale_log2, num_keys):
    """The scores of the next tile, while the weights of the last meet their values.

    num_keys    how many of the next tile there are; None: all
    """
    S: gl.constexpr = most.type.layout.parent
    W: gl.constexpr = weights.type.layout
    k, k_ready, k_free, k_parity = stage(keys, turn + 1)
    v, v_ready, v_free, v_parity = stage(values, turn)
    zeros = gl.zeros([BLOCK // 2, BLOCK], gl.float32, S)
    mbarrier.wait(k_ready, k_parity)
    scores = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_ready, v_parity)
    product = warpgroup_mma(weights, v, acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    mbarrier.arrive(k_free)
    if num_keys is not None:
        n = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, S))
        scores = gl.where((n < num_keys)[None, :], scores, float("-inf"))
    next_weights, most, total, shrink = _softmax(scores, most, total, scale_log2, W, weights.dtype)
    acc, weights = warpgroup_mma_wait(0, deps=(product, weights))
    mbarrier.arrive(v_free)
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))[:, None]
    return acc, next_weights, most, total


@gluon.jit
def _multiply(
    half: gl.constexpr, out_ptr, scale_log2, items, queries, keys, values,
    HEADS: gl.constexpr, PACK: gl.constexpr,
):  # fmt: skip
    """The attention of half of the rows of each tile that `_load` hands over."""
    ROWS: gl.constexpr = BLOCK // 2
    D: gl.constexpr = keys.tiles.shape[2]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])  # of scores
    A: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])  # of acc
    W: gl.constexpr = gl.DotOperandLayout(0, A, 2)  # of weights
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    turn = 0
    lap = 0
    mbarrier.wait(queries.ready.index(0), 0)
    first = _get(items, 0, 3)
    while first >= 0:
        head, q_start, q_len = _get(items, lap, 0), _get(items, lap, 1), _get(items, lap, 2)
        prefix = _get(items, lap, 4)
        own = first // BLOCK
        tile, _, q_free, _ = stage(queries, lap)
        q = tile.slice(half * ROWS, ROWS, 0)
        k, ready, free, parity = stage(keys, turn)
        zeros = gl.zeros([ROWS, BLOCK], gl.float32, S)
        mbarrier.wait(ready, parity)
        scores = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        mbarrier.arrive(free)
        token = first + (half * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))) // PACK
        key = own * BLOCK + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, S))
        scores = gl.where(token[:, None] >= key[None, :], scores, float("-inf"))
        most = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S))
        total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, S))
        acc = gl.zeros([ROWS, D], gl.float32, A)
        weights, most, total, _ = _softmax(scores, most, total, scale_log2, W, dtype)
        if prefix % BLOCK > 0:
            acc, weights, most, total = _step(
                acc, weights, most, total, turn, q, keys, values, scale_log2, prefix % BLOCK
            )
            turn += 1
        for _ in range(prefix // BLOCK + own):
            acc, weights, most, total = _step(
                acc, weights, most, total, turn, q, keys, values, scale_log2, None
            )
            turn += 1
        mbarrier.arrive(q_free)
        v, ready, free, parity = stage(values, turn)
        mbarrier.wait(ready, parity)
        product = warpgroup_mma(weights, v, acc, is_async=True)
        acc, weights = warpgroup_mma_wait(0, deps=(product, weights))
        mbarrier.arrive(free)
        turn += 1
        acc = acc / gl.convert_layout(total, gl.SliceLayout(1, A))[:, None]
        m = half * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, A))
        d = gl.arange(0, D, layout=gl.SliceLayout(0, A))
        token = first + m // PACK
        at = (((q_start + token).to(gl.int64) * HEADS + head) * PACK + m % PACK) * D
        mask = (token < q_len)[:, None]
        gl.store(out_ptr + at[:, None] + d[None, :], acc.to(dtype), mask=mask)
        lap += 1
        _, ready, _, parity = stage(queries, lap)
        mbarrier.wait(ready, parity)
        first = _get(items, lap, 3)


# What varies from step to step, alignment included, must not compile a kernel anew.
@gluon.jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=["rows_ptr", "q_starts_ptr", "lens_ptr"],
)
def _extend_kernel(
    q_ptr,
    new_k,  # descriptors of [T, HKV D], tiles of [BLOCK, D]
    new_v,
    k_ptr,
    v_ptr,
    table_ptr,
    rows_ptr,
    q_starts_ptr,
    lens_ptr,
    out_ptr,  # [T, HQ, D] contiguous
    next_ptr,  # int32 [1], tiles taken; zero before and after
    q_stride,
    kv_stride,  # of a slot, in both caches
    table_stride,
    scale_log2,
    num_rows,
    D: gl.constexpr,
    HEADS: gl.constexpr,  # HQ / PACK
    GROUP: gl.constexpr,
    PACK: gl.constexpr,  # query heads of a tile
    ROWS_PADDED: gl.constexpr,
):
    gdc_launch_dependents()
    gdc_wait()
    queries = ring_of(new_k, STAGES, 1, 2)
    keys = ring_of(new_k, STAGES, 1, 2)
    values = ring_of(new_v, STAGES, 1, 2)
    row: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    items = gl.allocate_shared_memory(gl.int32, [STAGES * FIELDS, 1], row)
    fence_async_shared()  # the barriers are there before anyone waits
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_multiply, (FIRST, out_ptr, scale_log2, items, queries, keys, values, HEADS, PACK)),
            (_multiply, (SECOND, out_ptr, scale_log2, items, queries, keys, values, HEADS, PACK)),
            (_load, (
                q_ptr, new_k, new_v, k_ptr, v_ptr, table_ptr, rows_ptr, q_starts_ptr, lens_ptr,
                next_ptr, q_stride, kv_stride, table_stride, num_rows, items, queries, keys, values,
                HEADS, GROUP, PACK, ROWS_PADDED,
            )),
        ],
        [4, 4],
        [216, 72],  # registers of a thread
    )  # fmt: skip


def extend_attention_hopper(
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
    """`extend_attention` of arguments that are `usable`."""
    (_, num_q_heads, dim), num_kv_heads = q.shape, k.shape[1]
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    group = num_q_heads // num_kv_heads
    pack = math.gcd(group, 2)  # heads that share a tile read their keys once
    new_k, new_v = (tiles_of(x.flatten(1), [BLOCK.value, dim]) for x in (k, v))
    _extend_kernel[(multiprocessors(q.device),)](
        q, new_k, new_v, k_cache, v_cache, slot_table, rows, q_starts, kv_lens,
        out, counters(q.device, 1),
        q.stride(0), k_cache.stride(0), slot_table.stride(0),
        scale * math.log2(math.e), len(rows),
        D=dim,
        HEADS=num_q_heads // pack,
        GROUP=group,
        PACK=pack,
        ROWS_PADDED=padded_rows(len(rows), 1024),
        num_warps=4,
        launch_pdl=True,
    )  # fmt: skip
    return out
