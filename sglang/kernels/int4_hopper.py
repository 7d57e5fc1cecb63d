"""Products of some and of many tokens with 4-bit weights (int4_weight.py), in Gluon on Hopper:
y = x W^T + b.

The product is transposed (out^T = W x^T). A program has three groups of warps: one loads, two
multiply, each 64 outputs with BLOCK_M tokens. Weights are dequantized into registers, from which
tensor cores take them; while one group does so, the other multiplies. Both read the same inputs
from shared memory.

Programs are persistent, one for each SM. Of what does not fill them evenly, the tiles behind the
last full round, each is split along K into as many parts as leave every program one at most.
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
    barriers,
    inside,
    load_tile,
    multiprocessors,
    room_for,
    tile_at,
    tiles_of,
)
from sglang.kernels.hopper_sums import OUTPUTS, Parts, Place, add_up, store, store_part
from sglang.kernels.int4_registers import INPUTS, WORDS, dequantize, of_group, scales_layout
from sglang.kernels.int4_weight import Int4Weight
from sglang.kernels.launch import counters

BLOCK_N = gl.constexpr(128)
"""Outputs of a tile: of two groups."""
STEP = INPUTS
"""Inputs of a stage."""


class Plan(NamedTuple):
    """Each program has `rounds` tiles, then at most one of the `splits` parts of a tile left."""

    num_tokens: gl.tensor
    n: gl.tensor
    steps: gl.tensor  # of a tile
    rounds: gl.tensor
    left: gl.tensor  # tiles
    splits: gl.tensor


@gluon.jit
def _num_items(plan):
    """Of a program: tiles, and a part of one."""
    return plan.rounds + gl.where(gl.program_id(0) < plan.left * plan.splits, 1, 0)


@gluon.jit
def _item(i, plan, BLOCK_M: gl.constexpr):
    """A program's i-th item: its tile's first token and first output, its first step and the one
    behind its last."""
    program = gl.program_id(0)
    is_whole = i < plan.rounds
    splits = gl.where(is_whole, 1, plan.splits)
    split = gl.where(is_whole, 0, program % plan.splits)
    tile = i * gl.num_programs(0) + program // splits
    m, n = tile_at(tile, plan.num_tokens, plan.n, BLOCK_M, BLOCK_N)
    return m, n, plan.steps * split // splits, plan.steps * (split + 1) // splits


class Ring(NamedTuple):
    """As in hopper.py, of three tiles a stage. `free` takes an arrival of each group."""

    inputs: gl.shared_memory_descriptor  # [stages, BLOCK_M, STEP]
    words: gl.shared_memory_descriptor  # int16 [stages, BLOCK_N, STEP / 4]
    scales: gl.shared_memory_descriptor  # int32 [stages, groups, BLOCK_N]
    ready: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor


# --- loading -------------------------------------------------------------------------------------


@gluon.jit
def _copy_weights(words, scales, ring, turn, step, n, GROUP: gl.constexpr):
    i = turn % ring.inputs.shape[0]
    load_tile(words, [n, step * (STEP // 4)], ring.ready.index(i), ring.words.index(i))
    load_tile(scales, [step * STEP // GROUP, n], ring.ready.index(i), ring.scales.index(i))


@gluon.jit
def _load(x, words, scales, ring, plan, GROUP: gl.constexpr):
    STAGES: gl.constexpr = ring.inputs.shape[0]
    BLOCK_M: gl.constexpr = x.block_shape[0]
    BYTES: gl.constexpr = x.block_type.nbytes + words.block_type.nbytes + scales.block_type.nbytes
    turn = 0
    for item in range(_num_items(plan)):
        own_m, own_n, first, end = _item(item, plan, BLOCK_M)
        m = inside(own_m, plan.num_tokens, BLOCK_M)
        n = inside(own_n, plan.n, BLOCK_N)
        early = 0
        if item == 0:  # weights do not depend on the kernel before
            early = gl.minimum(STAGES, end - first)
            for i in range(early):
                mbarrier.expect(ring.ready.index(i), BYTES)
                _copy_weights(words, scales, ring, i, first + i, n, GROUP)
            gdc_wait()
        for step in range(first, end):
            i = turn % STAGES
            ready = ring.ready.index(i)
            mbarrier.wait(ring.free.index(i), (turn // STAGES & 1) ^ 1)
            if turn >= early:
                mbarrier.expect(ready, BYTES)
                _copy_weights(words, scales, ring, turn, step, n, GROUP)
            load_tile(x, [m, step * STEP], ready, ring.inputs.index(i))
            turn += 1


# --- multiplying ---------------------------------------------------------------------------------


@gluon.jit
def _multiply(
    half: gl.constexpr, bias_ptr, out_ptr, sums_ptr, counts_ptr, ring, plan, GROUP: gl.constexpr
):
    """Half of the outputs of each tile."""
    STAGES: gl.constexpr = ring.inputs.shape[0]
    BLOCK_M: gl.constexpr = ring.inputs.shape[1]
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    SCALES: gl.constexpr = scales_layout(ring.scales.shape[1])
    # With few tokens it is their sums that are scaled: they are fewer than weights.
    SCALE_SUMS: gl.constexpr = BLOCK_M <= 64 and GROUP % STEP == 0
    outputs = gl.arange(0, OUTPUTS, layout=gl.SliceLayout(1, ACC))
    turn = 0
    for item in range(_num_items(plan)):
        own_m, own_n, first, end = _item(item, plan, BLOCK_M)
        m = inside(own_m, plan.num_tokens, BLOCK_M)
        n = inside(own_n, plan.n, BLOCK_N) + half * OUTPUTS
        acc = gl.zeros([OUTPUTS, BLOCK_M], gl.float32, ACC)
        if bias_ptr is not None:
            bias = gl.load(bias_ptr + n + outputs).to(gl.float32)
            acc += gl.where(first == 0, bias, 0.0)[:, None]
        for _step in range(first, end):
            i = turn % STAGES
            mbarrier.wait(ring.ready.index(i), turn // STAGES & 1)
            words = ring.words.index(i).slice(half * OUTPUTS, OUTPUTS, 0).load(WORDS)
            scales = ring.scales.index(i).slice(half * OUTPUTS, OUTPUTS, 1).load(SCALES)
            inputs = ring.inputs.index(i).permute((1, 0))
            weights = dequantize(words, scales, GROUP, not SCALE_SUMS, ring.inputs.dtype, WEIGHTS)
            if SCALE_SUMS:
                sums = gl.zeros([OUTPUTS, BLOCK_M], gl.float32, ACC)
                sums = warpgroup_mma(weights, inputs, sums, use_acc=False, is_async=True)
                sums = warpgroup_mma_wait(0, deps=(sums,))
                scale = gl.convert_layout(
                    of_group(scales, 0)[0], gl.SliceLayout(1, ACC), assert_trivial=True
                )
                acc += sums * scale[:, None]
            else:
                acc = warpgroup_mma(weights, inputs, acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(ring.free.index(i))
            turn += 1
        place = Place(out_ptr, plan.num_tokens, plan.n, m, n, own_m, own_n)
        if item < plan.rounds or plan.splits == 1:
            store(acc, place)
        else:
            tile = gl.program_id(0) // plan.splits * 2 + half
            tile_ptr = sums_ptr + (tile * plan.splits).to(gl.int64) * (OUTPUTS * BLOCK_M)
            own = gl.program_id(0) % plan.splits
            parts = Parts(tile_ptr, counts_ptr + tile * 2, plan.splits, own)
            store_part(acc, parts)
            add_up(parts, BLOCK_M, place)


@gluon.jit(do_not_specialize=["num_tokens", "steps", "rounds", "left", "splits"])
def _int4_kernel(
    x,  # a descriptor of [T, K], tiles of [BLOCK_M, STEP]
    words,  # int16 [N, K / 4], tiles of [BLOCK_N, STEP / 4]
    scales,  # int32 [groups, N], tiles of [groups of a STEP, BLOCK_N]
    bias_ptr,
    out_ptr,  # [T, N]
    sums_ptr,  # float32 [left, 2, splits, OUTPUTS BLOCK_M]
    counts_ptr,  # int32 [left, 2, 2], zeros
    num_tokens,
    n,
    steps,
    rounds,
    left,
    splits,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
):
    gdc_launch_dependents()
    ready, free = barriers(STAGES, 1), barriers(STAGES, 2)
    ring = Ring(room_for(x, STAGES), room_for(words, STAGES), room_for(scales, STAGES), ready, free)
    fence_async_shared()  # the barriers are there before anyone waits
    plan = Plan(num_tokens, n, steps, rounds, left, splits)
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_multiply, (FIRST, bias_ptr, out_ptr, sums_ptr, counts_ptr, ring, plan, GROUP)),
            (_multiply, (SECOND, bias_ptr, out_ptr, sums_ptr, counts_ptr, ring, plan, GROUP)),
            (_load, (x, words, scales, ring, plan, GROUP)),
        ],
        [4, 1],
        [232, 24],  # registers of a thread
    )  # fmt: skip


# --- on the host ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    stages: int
    """For which shared memory has room."""
    start: float
    """Microseconds, as all that follow, measured on an H200 at the shapes of Llama-2-7B: of a
    launch."""
    step: float
    parts: float
    """What they take, with..."""
    each_part: float
    """...each of a tile's parts."""


TILES = {
    16: Tile(8, 1.2, 0.41, 0.6, 0.70),
    32: Tile(8, 1.2, 0.48, 1.2, 0.65),
    64: Tile(6, 1.4, 0.55, 1.6, 0.55),
    128: Tile(5, 0.7, 0.77, 3.6, 0.68),
    256: Tile(3, 0.5, 1.30, 3.2, 1.40),
}
"""By tokens."""


@dataclass(frozen=True)
class HopperConfig:
    block_m: int
    splits: int
    """Of the tiles behind the last full round of all programs."""

    def shares(self, num_tokens: int, n: int, processors: int) -> tuple[int, int]:
        """(full rounds, tiles left)."""
        tiles = triton.cdiv(num_tokens, self.block_m) * triton.cdiv(n, BLOCK_N.value)
        return divmod(tiles, processors)


@cache
def estimate(config: HopperConfig, num_tokens: int, n: int, k: int, processors: int) -> float:
    """Microseconds."""
    tile, steps = TILES[config.block_m], k // STEP.value
    rounds, left = config.shares(num_tokens, n, processors)
    took = tile.start + rounds * steps * tile.step
    if left:
        took += triton.cdiv(steps, config.splits) * tile.step
    if left and config.splits > 1:
        took += tile.parts + config.splits * tile.each_part
    return took


@cache
def choose_config(num_tokens: int, n: int, k: int, processors: int) -> HopperConfig:
    able = []
    for block_m in TILES:
        _, left = HopperConfig(block_m, 1).shares(num_tokens, n, processors)
        most = min(processors // max(left, 1), k // STEP.value // 2)
        if block_m >= min(num_tokens, 128):
            able += [HopperConfig(block_m, splits) for splits in range(1, max(most, 1) + 1)]
    return min(able, key=lambda config: estimate(config, num_tokens, n, k, processors))


def usable(x: torch.Tensor, w: Int4Weight) -> bool:
    n, k = w.packed.shape[0], w.num_inputs
    return (
        multiprocessors(x.device) > 0
        and x.dtype in (torch.float16, torch.bfloat16)
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
    out = torch.empty(num_tokens, n, dtype=x.dtype, device=x.device)
    if num_tokens == 0:
        return out
    processors = multiprocessors(x.device)
    config = config or choose_config(num_tokens, n, k, processors)
    rounds, left = config.shares(num_tokens, n, processors)
    parts = left * config.splits
    size = parts * BLOCK_N.value * config.block_m if config.splits > 1 else 0
    groups = max(STEP.value // w.group_size, 1)

    _int4_kernel[(processors if rounds else parts,)](
        tiles_of(x, [config.block_m, STEP.value]),
        tiles_of(w.packed.view(torch.int16), [BLOCK_N.value, STEP.value // 4], 64),
        tiles_of(w.scales, [groups, BLOCK_N.value], 0),
        bias, out, out.new_empty(size, dtype=torch.float32), counters(x.device, 4 * left),
        num_tokens, n, k // STEP.value, rounds, left, config.splits,
        GROUP=w.group_size,
        STAGES=TILES[config.block_m].stages,
        num_warps=4,
        launch_pdl=True,
    )  # fmt: skip
    return out
