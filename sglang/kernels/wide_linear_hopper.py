"""x W^T and silu(x Wg^T) * (x Wu^T), of many tokens and 16-bit weights, in Gluon on Hopper.

A program has two groups of four warps that multiply, each half of a tile's tokens with 256 rows of
the weights (with SwiGLU, gate's and up's of the same 128 outputs: one matrix instruction has both,
so a thread holds an output's two sums), and a warp that loads, through a ring (hopper.py). Programs
are persistent, and the loading warp runs ahead of the tiles.

Storing is not free, nor is SiLU: an output takes two instructions of a unit that does 16 a cycle,
so an SM needs 2000 cycles for a tile whose products take 16,000 (K = 1024). At a tile's end a group
therefore only rounds its sums, two into one register, and begins with the next tile; what is left
is done chunk by chunk behind that tile's first products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sglang.kernels.hopper import (
    PairRing,
    inside,
    load_tile,
    multiprocessors,
    pair_stage,
    ring_barriers,
    room_for,
    store_tile,
    tile_at,
    tiles_of,
)

BLOCK_M = gl.constexpr(128)
"""Tokens of a tile."""
ROWS = gl.constexpr(64)
"""Tokens of a group."""
HALF = gl.constexpr(128)
"""Rows of weights, of two that are side by side in a tile: gate's and up's, or all of the outputs
there."""
STEP = gl.constexpr(64)
"""Inputs of a stage."""
STAGES = gl.constexpr(4)
CHUNKS = gl.constexpr(4)
"""Of a half: it is finished and stored in as many parts, one by one."""
CHUNK = gl.constexpr(32)
"""Outputs of one."""


class Plan(NamedTuple):
    num_tokens: gl.tensor
    outputs: gl.tensor
    steps: gl.tensor
    tiles: gl.tensor


@gluon.jit
def _tile(tile, plan, GATED: gl.constexpr):
    """First token and first output. Where tiles overlap, outputs are computed twice, and come out
    the same."""
    BLOCK_N: gl.constexpr = HALF if GATED else 2 * HALF
    m, n = tile_at(tile, plan.num_tokens, plan.outputs, BLOCK_M, BLOCK_N)
    return inside(m, plan.num_tokens, BLOCK_M), inside(n, plan.outputs, BLOCK_N)


@gluon.jit
def _load(x, w, ring, plan, GATED: gl.constexpr):
    turn = 0
    for tile in range(gl.program_id(0), plan.tiles, gl.num_programs(0)):
        m, n = _tile(tile, plan, GATED)
        other_n = n + (plan.outputs if GATED else HALF)
        for step in range(plan.steps):
            inputs, weights, ready, free, parity = pair_stage(ring, turn)
            mbarrier.wait(free, parity ^ 1)
            mbarrier.expect(ready, x.block_type.nbytes + 2 * w.block_type.nbytes)
            load_tile(w, [n, step * STEP], ready, weights.slice(0, HALF, 0))
            load_tile(w, [other_n, step * STEP], ready, weights.slice(HALF, HALF, 0))
            load_tile(x, [m, step * STEP], ready, inputs)
            turn += 1


@gluon.jit
def _multiply_stage(half: gl.constexpr, acc, ring, turn, use_acc: gl.constexpr = True):
    inputs, weights, ready, _, parity = pair_stage(ring, turn)
    inputs = inputs.slice(half * ROWS, ROWS, 0)
    mbarrier.wait(ready, parity)
    return warpgroup_mma(inputs, weights.permute((1, 0)), acc, use_acc=use_acc, is_async=True)


@gluon.jit
def _pack(acc, dtype: gl.constexpr):
    """Sums [ROWS, 2 HALF] -> int32 [ROWS, HALF], rounded: the first half's in the low bits."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    first, second = acc.reshape([ROWS, 2, HALF]).permute((0, 2, 1)).split()
    KIND: gl.constexpr = "f16x2" if dtype == gl.float16 else "bf16x2"
    packed = gl.inline_asm_elementwise(
        "cvt.rn." + KIND + ".f32 $0, $1, $2;",
        "=r,f,f",
        [second, first],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )
    return gl.convert_layout(packed, LAYOUT, assert_trivial=True)


@gluon.jit
def _chunk(packed, i: gl.constexpr, count: gl.constexpr):
    """Columns i of `count` parts: registers are named, not moved."""
    if count == 1:
        return packed
    else:
        SIZE: gl.constexpr = packed.shape[1] // 2
        LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 16])
        halves = packed.reshape([ROWS, 2, SIZE]).permute((0, 2, 1)).split()
        half = gl.convert_layout(halves[i // (count // 2)], LAYOUT, assert_trivial=True)
        return _chunk(half, i % (count // 2), count // 2)


@gluon.jit
def _finish(half: gl.constexpr, i: gl.constexpr, packed, out, staging, m, n, GATED: gl.constexpr):
    """A tile's i-th store, on its way: of a chunk as `silu_and_mul` computes it, or of either half
    in turn."""
    chunk: gl.constexpr = i if GATED else i // 2
    pairs = _chunk(packed, chunk, CHUNKS)
    first = (pairs & 0xFFFF).to(gl.int16).to(out.dtype, bitcast=True)
    second = (pairs >> 16).to(gl.int16).to(out.dtype, bitcast=True)
    column: gl.constexpr = chunk * CHUNK + (0 if GATED or i % 2 == 0 else HALF)
    if GATED:
        gate = first.to(gl.float32)
        outputs = (gate / (1.0 + gl.exp(-gate)) * second.to(gl.float32)).to(out.dtype)
    else:
        outputs = first if i % 2 == 0 else second
    tile = staging.index(half * CHUNKS + i % CHUNKS)
    tma.store_wait(CHUNKS - 1)  # the store before the last three was from here: it has been read
    tile.store(outputs)
    fence_async_shared()
    store_tile(out, [m + half * ROWS, n + column], tile)


@gluon.jit
def _multiply(half: gl.constexpr, out, ring, staging, plan, GATED: gl.constexpr):
    """Half of the tokens of each tile."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * HALF, 16])
    PACKED: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    STORES: gl.constexpr = CHUNKS if GATED else 2 * CHUNKS
    packed = gl.zeros([ROWS, HALF], gl.int32, PACKED)
    old_m = plan.num_tokens  # beyond the end: nothing is stored
    old_n = 0
    turn = 0
    for tile in range(gl.program_id(0), plan.tiles, gl.num_programs(0)):
        m, n = _tile(tile, plan, GATED)  # here its divisions are hidden behind products
        acc = gl.zeros([ROWS, 2 * HALF], gl.float32, ACC)
        for i in gl.static_range(STORES):
            acc = _multiply_stage(half, acc, ring, turn, i > 0)
            _finish(half, i, packed, out, staging, old_m, old_n, GATED)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            if i > 0:
                mbarrier.arrive(pair_stage(ring, turn - 1)[3])
            turn += 1
        for _ in range(STORES, plan.steps):
            acc = _multiply_stage(half, acc, ring, turn)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(pair_stage(ring, turn - 1)[3])
            turn += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(pair_stage(ring, turn - 1)[3])
        packed = _pack(acc, out.dtype)
        old_m = m
        old_n = n
    for i in gl.static_range(STORES):
        _finish(half, i, packed, out, staging, old_m, old_n, GATED)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_tokens", "outputs", "steps", "tiles"])
def _wide_kernel(
    x,  # descriptors: of [T, K], tiles of [BLOCK_M, STEP]
    w,  # [N, K], or [2 N, K] if gated, tiles of [HALF, STEP]
    out,  # [T, N], tiles of [ROWS, CHUNK]
    num_tokens,
    outputs,
    steps,
    tiles,
    GATED: gl.constexpr,
):
    gdc_launch_dependents()
    gdc_wait()
    weights = gl.allocate_shared_memory(x.dtype, [STAGES, 2 * HALF, STEP], w.layout)
    ready, free = ring_barriers(STAGES, 1, 2)
    ring = PairRing(room_for(x, STAGES), weights, ready, free)
    staging = room_for(out, 2 * CHUNKS)
    fence_async_shared()  # the barriers are there before anyone waits
    plan = Plan(num_tokens, outputs, steps, tiles)
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_multiply, (FIRST, out, ring, staging, plan, GATED)),
            (_multiply, (SECOND, out, ring, staging, plan, GATED)),
            (_load, (x, w, ring, plan, GATED)),
        ],
        [4, 1],
        [240, 24],  # registers of a thread
    )


LEAST_TOKENS, LEAST_GATED_TOKENS = 1024, 2048
"""With fewer, tiles of this size do not fill a GPU evenly, and cuBLAS is quicker."""
FULL = 0.93
"""Of the programs' rounds of tiles: as much must be tiles, or cuBLAS' smaller ones are quicker."""


def usable(x: torch.Tensor, w: torch.Tensor) -> bool:
    """Whether the kernel can take these, and is likely to be quicker than cuBLAS: on an H200 it is
    by a sixth at K = 1024, by 2 to 4% at K = 4096."""
    if len(x) < LEAST_TOKENS or not _can_take(x, w, 2 * CHUNKS.value):
        return False
    tiles, processors = _num_tiles(len(x), len(w), gated=False), multiprocessors(x.device)
    rounds = triton.cdiv(tiles, processors)
    return rounds > 1 and tiles >= FULL * rounds * processors


def usable_gated(x: torch.Tensor, w: torch.Tensor) -> bool:
    """The same, with SwiGLU, and `silu_and_mul` after cuBLAS: by a fifth, and by some percent."""
    return len(x) >= LEAST_GATED_TOKENS and _can_take(x, w, CHUNKS.value)


def _can_take(x: torch.Tensor, w: torch.Tensor, stores: int) -> bool:
    return (
        multiprocessors(x.device) > 0
        and x.dtype in (torch.float16, torch.bfloat16)
        and w.dtype == x.dtype
        and len(w) % 32 == 0
        and w.shape[1] % STEP.value == 0
        and w.shape[1] >= stores * STEP.value
        and w.stride(1) == 1
        and w.stride(0) % 8 == 0
        and w.data_ptr() % 16 == 0
    )


def _num_tiles(num_tokens: int, outputs: int, gated: bool) -> int:
    block_n = HALF.value if gated else 2 * HALF.value
    return triton.cdiv(num_tokens, BLOCK_M.value) * triton.cdiv(outputs, block_n)


def _launch(x: torch.Tensor, w: torch.Tensor, gated: bool) -> torch.Tensor:
    num_tokens, outputs = len(x), len(w) // 2 if gated else len(w)
    out = torch.empty(num_tokens, outputs, dtype=x.dtype, device=x.device)
    tiles = _num_tiles(num_tokens, outputs, gated)
    _wide_kernel[(min(tiles, multiprocessors(x.device)),)](
        tiles_of(x, [BLOCK_M.value, STEP.value]),
        tiles_of(w, [HALF.value, STEP.value]),
        tiles_of(out, [ROWS.value, CHUNK.value], 64),
        num_tokens, outputs, x.shape[1] // STEP.value, tiles,
        GATED=gated,
        num_warps=4,
        launch_pdl=True,
    )  # fmt: skip
    return out


def wide_linear_hopper(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x [T, K], w [N, K], which are `usable`, or fewer tokens -> [T, N]."""
    return _launch(x, w, gated=False)


def gated_linear_hopper(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """`gated_linear` of arguments that are `usable_gated`, or of fewer tokens."""
    return _launch(x, w, gated=True)
