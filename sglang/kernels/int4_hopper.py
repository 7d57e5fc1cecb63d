"""Products of many tokens with 4-bit weights (int4_weight.py), in Gluon on Hopper: y = x W^T + b.

As in Machete and CUTLASS's mixed-input products, weights are dequantized on their way to the tensor
cores, which are kept busy meanwhile. A program has three groups of four warps: one loads, two
multiply, each 64 outputs (the product is transposed, out^T = W x^T) with BLOCK_M tokens. Both
operands come from shared memory, the sums stay in registers.

There are two rings (hopper.py). The one between the groups has stages that are copied (inputs) and
dequantized (weights): its `ready` takes two arrivals. The one of packed weights is the loading
group's own, which needs no `free`.

Programs are persistent. What does not fill them evenly, the tiles behind the last full round, is
split along K; the last program of a tile to arrive adds up, always in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sglang.kernels.hopper import (
    PairRing,
    barriers,
    inside,
    load_tile,
    multiprocessors,
    pair_stage,
    room_for,
    tile_at,
    tiles_of,
)
from sglang.kernels.int4_weight import (
    DEQUANTIZE_BFLOAT16,
    DEQUANTIZE_CONSTRAINTS,
    DEQUANTIZE_FLOAT16,
    MANY_TOKENS,
    Int4Weight,
)
from sglang.kernels.launch import counters

# In Triton 3.9 they are `barrier` and `reinterpret`.
thread_barrier = getattr(gl, "thread_barrier", None) or gl.barrier
_Tiles = gl.shared_memory_descriptor
reinterpret = getattr(_Tiles, "reinterpret", None) or _Tiles._reinterpret

BLOCK_N = gl.constexpr(128)
"""Outputs of a tile."""
STEP = gl.constexpr(128)
"""Inputs of a packed tile: two stages."""
HALF = gl.constexpr(64)
"""Outputs of a group that multiplies, inputs of a stage, and tokens that are stored at a time."""
PACKED_STAGES = gl.constexpr(4)


class Plan(NamedTuple):
    """Items 0 .. `whole` - 1 are tiles, all others are parts of one, `splits` of each."""

    num_tokens: gl.tensor
    n: gl.tensor
    steps: gl.tensor
    items: gl.tensor
    whole: gl.tensor
    splits: gl.tensor


@gluon.jit
def _tile(item, plan, BLOCK_M: gl.constexpr):
    """Of an item: its tile's first token and first output, and which steps it adds up."""
    part = gl.maximum(item - plan.whole, 0)
    tile = gl.minimum(item, plan.whole + part // plan.splits)
    splits = gl.where(item < plan.whole, 1, plan.splits)
    split = part % plan.splits
    first = plan.steps * split // splits
    end = plan.steps * (split + 1) // splits
    m, n = tile_at(tile, plan.num_tokens, plan.n, BLOCK_M, BLOCK_N)
    return m, n, first, end, split


PART = gl.constexpr(gl.BlockedLayout([1, 8], [32, 1], [4, 1], [1, 0]))
"""Of the words of a stage: a thread has a row. So it has one scale, or one for either half, and
stores 16 bytes at a time that, with its neighbours', touch all banks."""


@gluon.jit
def _twice(value, dtype: gl.constexpr):
    """float32 [BLOCK_N] -> int32 [BLOCK_N, 8]: two equal numbers of a 16-bit type."""
    bits = value.to(dtype).to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    return gl.expand_dims(bits << 16 | bits, 1).broadcast_to([BLOCK_N, 8])


@gluon.jit
def _zero_and_scale(scales, g: gl.constexpr, base: gl.constexpr, dtype: gl.constexpr):
    """What to add to numbers base + q of group g, and what to multiply them with then."""
    groups: gl.constexpr = scales.shape[0]
    group = gl.arange(0, groups, layout=gl.SliceLayout(1, scales.type.layout))[:, None]
    word = gl.sum(gl.where(group == g, scales, 0), 0)
    word = gl.convert_layout(word, gl.SliceLayout(1, PART), assert_trivial=True)
    zero = (word & 31).to(gl.float32)
    scale = (word & -32).to(gl.float32, bitcast=True)
    return _twice(-base - zero, dtype), _twice(scale, dtype)


@gluon.jit
def _weights(words, scales, first: gl.constexpr, GROUP: gl.constexpr, dtype: gl.constexpr):
    """int32 [BLOCK_N, 8] -> int32 [BLOCK_N, 32], pairs of weights. `first` of the step's inputs."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 32], [32, 1], [4, 1], [1, 0])
    IS_HALF: gl.constexpr = dtype == gl.float16
    BASE: gl.constexpr = 1024.0 if IS_HALF else 128.0
    HIGH_BASE: gl.constexpr = 64.0 if IS_HALF else 128.0
    zero, scale = _zero_and_scale(scales, first // GROUP, BASE, dtype)
    high_zero, high_scale = _zero_and_scale(scales, (first + 32) // GROUP, HIGH_BASE, dtype)
    words = gl.convert_layout(words, PART, assert_trivial=True)
    l01, l23, h01, h23 = gl.inline_asm_elementwise(
        DEQUANTIZE_FLOAT16 if IS_HALF else DEQUANTIZE_BFLOAT16,
        DEQUANTIZE_CONSTRAINTS,
        [words, zero, zero, high_zero, high_zero, scale, high_scale],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )
    low = gl.join(l01, l23).reshape([BLOCK_N, 16])
    high = gl.join(h01, h23).reshape([BLOCK_N, 16])
    pairs = gl.join(low, high).permute((0, 2, 1)).reshape([BLOCK_N, 32])
    return gl.convert_layout(pairs, LAYOUT, assert_trivial=True)


@gluon.jit
def _copy_packed(words, scales, packed, turn, step, n, GROUP: gl.constexpr):
    tile, groups, ready, _, _ = pair_stage(packed, turn)
    mbarrier.expect(ready, words.block_type.nbytes + scales.block_type.nbytes)
    load_tile(words, [n, step * (STEP // 8)], ready, tile)
    load_tile(scales, [step * STEP // GROUP, n], ready, groups)


@gluon.jit
def _load(x, words, scales, packed, stages, plan, GROUP: gl.constexpr):
    """Copy inputs and packed weights, dequantize the latter."""
    WORDS: gl.constexpr = gl.BlockedLayout([1, 16], [32, 1], [4, 1], [1, 0])
    GROUPS: gl.constexpr = packed.others.shape[1]
    SCALES: gl.constexpr = gl.BlockedLayout([GROUPS, 1], [1, 32], [1, 4], [0, 1])
    PAIRS: gl.constexpr = gl.NVMMASharedLayout(128, 32, rank=2)
    BLOCK_M: gl.constexpr = x.block_shape[0]
    turn = 0
    for item in range(gl.program_id(0), plan.items, gl.num_programs(0)):
        own_m, own_n, first, end, _split = _tile(item, plan, BLOCK_M)
        m = inside(own_m, plan.num_tokens, BLOCK_M)
        n = inside(own_n, plan.n, BLOCK_N)
        for step in range(first, gl.minimum(first + PACKED_STAGES, end)):
            _copy_packed(words, scales, packed, turn + step - first, step, n, GROUP)
        for step in range(first, end):
            tile, groups, ready, _, parity = pair_stage(packed, turn)
            mbarrier.wait(ready, parity)
            parts = tile.load(WORDS).reshape([BLOCK_N, 2, 8]).permute((0, 2, 1)).split()
            step_scales = groups.load(SCALES)
            for i in gl.static_range(2):
                pairs = _weights(parts[i], step_scales, i * HALF, GROUP, x.dtype)
                inputs, weights, ready, free, parity = pair_stage(stages, turn * 2 + i)
                mbarrier.wait(free, parity ^ 1)
                mbarrier.expect(ready, x.block_type.nbytes)
                load_tile(x, [m, step * STEP + i * HALF], ready, inputs)
                reinterpret(weights, gl.int32, [BLOCK_N, 32], PAIRS).store(pairs)
                fence_async_shared()  # tensor cores see it
                mbarrier.arrive(ready)  # behind a barrier: all threads have read `tile`, too
            if step + PACKED_STAGES < end:
                _copy_packed(
                    words, scales, packed, turn + PACKED_STAGES, step + PACKED_STAGES, n, GROUP
                )
            turn += 1


OUT = gl.constexpr(gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1]))
"""Of [HALF, HALF] on their way out: 8 threads have the outputs of a token, 16 bytes each."""


@gluon.jit
def _store(sums, out_ptr, m, n, own_m, own_n, plan):
    """sums: [HALF, tokens] of out's dtype, as registers have them; to be stored in rows."""
    if sums.shape[1] > HALF:
        SIZE: gl.constexpr = sums.shape[1] // 2
        left, right = sums.reshape([HALF, 2, SIZE]).permute((0, 2, 1)).split()
        _store(left, out_ptr, m, n, own_m, own_n, plan)
        _store(right, out_ptr, m + SIZE, n, own_m, own_n, plan)
    else:
        sums = gl.convert_layout(sums, OUT)
        m += gl.arange(0, HALF, layout=gl.SliceLayout(0, OUT))
        n += gl.arange(0, HALF, layout=gl.SliceLayout(1, OUT))
        mask = ((m >= own_m) & (m < plan.num_tokens))[None, :] & (n >= own_n)[:, None]
        gl.store(out_ptr + m.to(gl.int64)[None, :] * plan.n + n[:, None], sums, mask=mask)


FOURS = gl.constexpr(gl.BlockedLayout([1, 4], [1, 32], [1, 4], [1, 0]))
"""Of [tokens / 8, 512], the sums of [HALF, tokens] in an order in which a thread's registers go out
four at a time, and those of a warp side by side."""


@gluon.jit
def _in_fours(tokens: gl.constexpr):
    row = gl.arange(0, tokens // 8, layout=gl.SliceLayout(1, FOURS))
    return row[:, None] * 512 + gl.arange(0, 512, layout=gl.SliceLayout(0, FOURS))[None, :]


@gluon.jit
def _store_part(acc, parts_ptr, arrived_ptr, split, out_ptr, m, n, own_m, own_n, plan):
    """Hand over the sums of one part; the last one of half a tile to arrive stores all parts'.
    parts_ptr: float32 [splits, BLOCK_M / 8, 512]."""
    CHUNK: gl.constexpr = 128  # tokens whose sums, and the loads that go into them, are registers
    BLOCK_M: gl.constexpr = acc.shape[1]
    SIZE: gl.constexpr = HALF * BLOCK_M
    # outputs are (warp, register, lane), tokens are (register, lane, register)
    acc = acc.reshape([4, 2, 8, BLOCK_M // 8, 4, 2]).permute((3, 0, 2, 4, 1, 5))
    acc = gl.convert_layout(acc.reshape([BLOCK_M // 8, 512]), FOURS, assert_trivial=True)
    gl.store(parts_ptr + split * SIZE + _in_fours(BLOCK_M), acc)
    thread_barrier()  # all are written before the program is counted
    if gl.atomic_add(arrived_ptr, 1, sem="acq_rel") == plan.splits - 1:
        thread_barrier()
        gl.store(arrived_ptr, 0)
        for i in gl.static_range(BLOCK_M // CHUNK):
            sums = gl.zeros([CHUNK // 8, 512], gl.float32, FOURS)
            for other in range(plan.splits):
                at = parts_ptr + other * SIZE + i * CHUNK * HALF + _in_fours(CHUNK)
                sums += gl.load(at, cache_modifier=".cg")
            sums = sums.to(out_ptr.dtype.element_ty).reshape([CHUNK // 8, 4, 8, 4, 2, 2])
            sums = sums.permute((1, 4, 2, 0, 3, 5)).reshape([HALF, CHUNK])
            _store(sums, out_ptr, m + i * CHUNK, n, own_m, own_n, plan)


@gluon.jit
def _multiply(half: gl.constexpr, bias_ptr, out_ptr, partial_ptr, arrived_ptr, stages, plan):
    """Half of the outputs of each tile."""
    BLOCK_M: gl.constexpr = stages.tiles.shape[1]
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    outputs = gl.arange(0, HALF, layout=gl.SliceLayout(1, ACC))
    turn = 0
    for item in range(gl.program_id(0), plan.items, gl.num_programs(0)):
        own_m, own_n, first, end, split = _tile(item, plan, BLOCK_M)
        m = inside(own_m, plan.num_tokens, BLOCK_M)
        n = inside(own_n, plan.n, BLOCK_N) + half * HALF
        acc = gl.zeros([HALF, BLOCK_M], gl.float32, ACC)
        if bias_ptr is not None:
            bias = gl.load(bias_ptr + n + outputs).to(gl.float32)
            acc += gl.where(first == 0, bias, 0.0)[:, None]
        for step in range(first * 2, end * 2):
            inputs, weights, ready, _free, parity = pair_stage(stages, turn)
            weights = weights.slice(half * HALF, HALF, 0)
            mbarrier.wait(ready, parity)
            acc = warpgroup_mma(weights, inputs.permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(pair_stage(stages, turn - 1)[3], pred=step > first * 2)
            turn += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(pair_stage(stages, turn - 1)[3])
        if item < plan.whole:
            _store(acc.to(out_ptr.dtype.element_ty), out_ptr, m, n, own_m, own_n, plan)
        else:
            tile = (item - plan.whole) // plan.splits * 2 + half
            parts_ptr = partial_ptr + (tile * plan.splits).to(gl.int64) * (HALF * BLOCK_M)
            arrived = arrived_ptr + tile
            _store_part(acc, parts_ptr, arrived, split, out_ptr, m, n, own_m, own_n, plan)


@gluon.jit(do_not_specialize=["num_tokens", "items", "whole", "splits"])
def _int4_kernel(
    x,  # a descriptor of [T, K], tiles of [BLOCK_M, HALF]
    words,  # int32 [N, K / 8], tiles of [BLOCK_N, STEP / 8]
    scales,  # int32 [groups, N], tiles of [groups of a STEP, BLOCK_N]
    bias_ptr,
    out_ptr,  # [T, N]
    partial_ptr,  # float32 [split tiles, 2, splits, HALF BLOCK_M]
    arrived_ptr,  # int32, zero
    num_tokens,
    n,
    steps,
    items,
    whole,
    splits,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
):
    gdc_launch_dependents()
    gdc_wait()
    # inputs [STAGES, BLOCK_M, HALF], weights [STAGES, BLOCK_N, HALF]
    weights = gl.allocate_shared_memory(x.dtype, [STAGES, BLOCK_N, HALF], x.layout)
    stages = PairRing(room_for(x, STAGES), weights, barriers(STAGES, 2), barriers(STAGES, 2))
    ready = barriers(PACKED_STAGES, 1)
    packed = PairRing(room_for(words, PACKED_STAGES), room_for(scales, PACKED_STAGES), ready, ready)
    fence_async_shared()  # the barriers are there before anyone waits
    plan = Plan(num_tokens, n, steps, items, whole, splits)
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_multiply, (FIRST, bias_ptr, out_ptr, partial_ptr, arrived_ptr, stages, plan)),
            (_multiply, (SECOND, bias_ptr, out_ptr, partial_ptr, arrived_ptr, stages, plan)),
            (_load, (x, words, scales, packed, stages, plan, GROUP)),
        ],
        [4, 4],
        [208, 88],  # registers of a thread
    )  # fmt: skip


TILES = {256: 3, 128: 5}
"""Tokens of a tile, and how many stages shared memory then has room for. With 64 tokens a stage
would wait for its weights, and int4.py's kernel is quicker."""

# Microseconds, measured on an H200 at the shapes of Llama-2-7B: of a launch, of STEP inputs, and of
# a token's sums, those of a part to write and those of each part to read.
START, STEPS, WRITE, READ = 2.0, {256: 1.3, 128: 1.05}, 0.01, 0.012


@dataclass(frozen=True)
class HopperConfig:
    block_m: int
    splits: int
    """Of the tiles behind the last full round of all programs."""

    def shares(self, num_tokens: int, n: int, processors: int) -> tuple[int, int]:
        """How many tiles are not split, and how many are."""
        tiles = triton.cdiv(num_tokens, self.block_m) * triton.cdiv(n, BLOCK_N.value)
        rest = 0 if self.splits == 1 else tiles % processors
        return tiles - rest, rest


@cache
def estimate(config: HopperConfig, num_tokens: int, n: int, k: int, processors: int) -> float:
    """Microseconds: rounds of programs, each with a tile, then with a part of one."""
    whole, rest = config.shares(num_tokens, n, processors)
    steps = k / STEP.value * STEPS[config.block_m]
    part = steps / config.splits + config.block_m * (WRITE + READ * config.splits)
    rounds, part_rounds = (triton.cdiv(x, processors) for x in (whole, rest * config.splits))
    return START + rounds * steps + part_rounds * part


@cache
def choose_config(num_tokens: int, n: int, k: int, processors: int) -> HopperConfig:
    able = [
        HopperConfig(block_m, splits)
        for block_m in TILES
        if block_m * 5 <= num_tokens * 8  # half empty tiles would be slow
        for splits in range(1, max(min(8, k // 512), 1) + 1)
    ]
    return min(able, key=lambda config: estimate(config, num_tokens, n, k, processors))


def usable(x: torch.Tensor, w: Int4Weight) -> bool:
    n, k = w.packed.shape[0], w.num_inputs
    return (
        multiprocessors(x.device) > 0
        and x.dtype in (torch.float16, torch.bfloat16)
        and min(TILES) <= len(x) <= MANY_TOKENS
        and n >= BLOCK_N.value
        and n % 8 == 0
        and k % STEP.value == 0
        and (w.group_size in (32, 64) or w.group_size % STEP.value == 0)
    )


def int4_hopper_linear(
    x: torch.Tensor,
    w: Int4Weight,
    bias: torch.Tensor | None = None,
    config: HopperConfig | None = None,
) -> torch.Tensor:
    """x [T, K] -> [T, N] in x's dtype, accumulated in float32, of arguments that are `usable`."""
    num_tokens, n, k = x.shape[0], w.packed.shape[0], w.num_inputs
    processors = multiprocessors(x.device)
    config = config or choose_config(num_tokens, n, k, processors)
    whole, rest = config.shares(num_tokens, n, processors)
    items = whole + rest * config.splits
    out = torch.empty(num_tokens, n, dtype=x.dtype, device=x.device)
    partial = out.new_empty((items - whole) * config.block_m * BLOCK_N.value, dtype=torch.float32)
    groups = max(STEP.value // w.group_size, 1)

    _int4_kernel[(min(items, processors),)](
        tiles_of(x, [config.block_m, HALF.value]),
        tiles_of(w.packed.view(torch.int32), [BLOCK_N.value, STEP.value // 8], 64),
        tiles_of(w.scales, [groups, BLOCK_N.value], 0),
        bias, out, partial, counters(x.device, 2 * rest),
        num_tokens, n, k // STEP.value, items, whole, config.splits,
        GROUP=w.group_size,
        STAGES=TILES[config.block_m],
        num_warps=4,
        launch_pdl=True,
    )  # fmt: skip
    return out
