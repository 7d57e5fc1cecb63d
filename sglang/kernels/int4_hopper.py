"""Products of two and more tokens with 4-bit weights (int4_weight.py), in Gluon on Hopper:
y = x W^T + b, or added to what is there.

A program (hopper_split_k.py) has two or three groups of warps that multiply. Weights are
dequantized into registers, from which tensor cores take them; while one group does so, another
multiplies. All read the same inputs from shared memory.

That hides less of it than one would think. Beside busy tensor cores an SM's quarter takes 4 to 5
cycles for an instruction of integers or of pairs of 16-bit numbers, alone 2; and for one of float32
numbers 1.5, alone 1. So each instruction counts here, and who multiplies when does not: an order of
the groups, as FlashAttention-3 has one, changed nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents

from sglang.kernels.hopper import (
    counted_on,
    inside,
    load_tile,
    multiprocessors,
    next_stage,
    ring_barriers,
    room_for,
    tiles_of,
)
from sglang.kernels.hopper_split_k import (
    STEP,
    Plan,
    Result,
    Split,
    Tile,
    choose_split,
    finish,
    item_at,
    load_inputs,
    num_items,
    place_of,
)
from sglang.kernels.hopper_sums import OUTPUTS
from sglang.kernels.int4_registers import WORDS, dequantize, of_group, scales_layout
from sglang.kernels.int4_weight import Int4Weight


class Ring(NamedTuple):
    """As in hopper.py, of a tile of inputs a stage, and tiles of words and of scales for each group
    that multiplies. `ready` takes an arrival of each warp that loads, `free` one of each group."""

    inputs: gl.shared_memory_descriptor  # [stages, BLOCK_M, STEP]
    words: gl.shared_memory_descriptor  # int32 [stages groups, OUTPUTS, STEP / 8]
    scales: gl.shared_memory_descriptor  # int32 [stages groups, scales of an output, OUTPUTS]
    ready: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor


# --- loading -------------------------------------------------------------------------------------


@gluon.jit
def _load_weights(words, scales, ring, plan, GROUP: gl.constexpr, GROUPS: gl.constexpr):
    """They do not depend on the kernel before."""
    turn = 0
    for item in range(num_items(plan)):
        _m, own_n, first, end = item_at(item, plan, ring.inputs.shape[1], GROUPS)
        n = inside(own_n, plan.n, GROUPS * OUTPUTS)
        for step in range(first, end):
            i, ready = next_stage(ring, turn)
            size: gl.constexpr = words.block_type.nbytes + scales.block_type.nbytes
            mbarrier.expect(ready, GROUPS * size)
            for group in gl.static_range(GROUPS):
                slot, row = i * GROUPS + group, n + group * OUTPUTS
                load_tile(words, [row, step * (STEP // 8)], ready, ring.words.index(slot))
                load_tile(scales, [step * STEP // GROUP, row], ready, ring.scales.index(slot))
            turn += 1


# --- multiplying ---------------------------------------------------------------------------------


@gluon.jit
def _multiply(
    group: gl.constexpr, result, ring, plan,
    GROUP: gl.constexpr, GROUPS: gl.constexpr, ADDS: gl.constexpr,
):  # fmt: skip
    """A group's outputs of each tile."""
    STAGES: gl.constexpr = ring.inputs.shape[0]
    BLOCK_M: gl.constexpr = ring.inputs.shape[1]
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    SCALES: gl.constexpr = scales_layout(ring.scales.shape[1])
    # Few tokens' sums are scaled instead of weights: a thread has no more of them than pairs of
    # weights, and a float32 product takes half as long as that of a pair.
    SCALE_SUMS: gl.constexpr = GROUPS * BLOCK_M <= STEP and GROUP % STEP == 0
    outputs = gl.arange(0, OUTPUTS, layout=gl.SliceLayout(1, ACC))
    i = 0
    parity = 0
    for item in range(num_items(plan)):
        own_m, own_n, first, end = item_at(item, plan, BLOCK_M, GROUPS)
        place = place_of(group, result.out_ptr, plan, own_m, own_n, BLOCK_M, GROUPS)
        acc = gl.zeros([OUTPUTS, BLOCK_M], gl.float32, ACC)
        if result.bias_ptr is not None:
            bias = gl.load(result.bias_ptr + place.n + outputs).to(gl.float32)
            acc += gl.where(first == 0, bias, 0.0)[:, None]
        for _step in range(first, end):
            mbarrier.wait(ring.ready.index(i), parity)
            scales = ring.scales.index(i * GROUPS + group).load(SCALES)
            words = ring.words.index(i * GROUPS + group).load(WORDS)
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
            i, parity = counted_on(i, parity, STAGES)
        finish(acc, item, group, plan, place, result.sums_ptr, GROUPS, ADDS)


@gluon.jit(do_not_specialize=["num_tokens", "steps", "part_steps", "rounds", "left"])
def _int4_kernel(
    x,  # a descriptor of [T, K], tiles of [BLOCK_M, STEP]
    words,  # int32 [N, K / 8], tiles of [OUTPUTS, STEP / 8]
    scales,  # int32 [K / GROUP, N], tiles of [STEP / GROUP, OUTPUTS]
    bias_ptr,
    out_ptr,  # [T, N]
    sums_ptr,  # float32 [left, GROUPS, splits, OUTPUTS BLOCK_M], EMPTY
    num_tokens,
    n,
    steps,
    part_steps,
    rounds,
    left,
    GROUP: gl.constexpr,
    ADDS: gl.constexpr,
    STAGES: gl.constexpr,
    PER_SM: gl.constexpr,
    GROUPS: gl.constexpr,
):
    gdc_launch_dependents()
    ready, free = ring_barriers(STAGES, 2, GROUPS)
    SLOTS: gl.constexpr = STAGES * GROUPS
    ring = Ring(room_for(x, STAGES), room_for(words, SLOTS), room_for(scales, SLOTS), ready, free)
    fence_async_shared()  # the barriers are there before anyone waits
    plan = Plan(num_tokens, n, steps, part_steps, rounds, left)
    result = Result(bias_ptr, out_ptr, sums_ptr)
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    THIRD: gl.constexpr = 2
    # Behind the functions: warps, then registers of a thread, of all but the first of them, whose
    # four warps have what is left.
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_multiply, (FIRST, result, ring, plan, GROUP, GROUPS, ADDS)),
                (_multiply, (SECOND, result, ring, plan, GROUP, GROUPS, ADDS)),
                (load_inputs, (x, ring.inputs, ring, plan, GROUPS)),
                (_load_weights, (words, scales, ring, plan, GROUP, GROUPS)),
            ],
            [4, 1, 1],
            [232 if PER_SM == 1 else 104, 24, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (FIRST, result, ring, plan, GROUP, GROUPS, ADDS)),
                (_multiply, (SECOND, result, ring, plan, GROUP, GROUPS, ADDS)),
                (_multiply, (THIRD, result, ring, plan, GROUP, GROUPS, ADDS)),
                (load_inputs, (x, ring.inputs, ring, plan, GROUPS)),
                (_load_weights, (words, scales, ring, plan, GROUP, GROUPS)),
            ],
            [4, 4, 1, 1],
            [160, 160, 24, 24],
        )


# --- on the host ---------------------------------------------------------------------------------


TILES = (  # on an H200
    Tile(16, stages=7, start=1.83, step=0.58, load=0.0032, parts=0.80, each_part=0.03, per_sm=2),
    Tile(16, stages=8, start=1.19, step=0.38, load=0.0016, parts=1.56, each_part=0.16),
    Tile(32, stages=6, start=1.89, step=0.75, load=0.002, parts=1.33, each_part=0.18, per_sm=2),
    Tile(32, stages=8, start=1.96, step=0.40, load=0.002, parts=1.93, each_part=0.05),
    Tile(64, stages=4, start=0.35, step=1.04, load=0.002, parts=3.40, each_part=0.31, per_sm=2),
    Tile(64, stages=6, start=1.40, step=0.51, load=0.002, parts=2.82, each_part=0.01),
    Tile(64, stages=6, start=2.79, step=0.70, load=0.003, parts=1.84, each_part=0.13, groups=3),
    Tile(128, stages=5, start=0.09, step=0.76, load=0.002, parts=3.49, each_part=0.40),
    Tile(128, stages=4, start=1.09, step=1.04, load=0.003, parts=4.50, each_part=0.56, groups=3),
    Tile(256, stages=3, start=0.24, step=1.30, load=0.002, parts=2.93, each_part=1.33),
)
_FEWEST_OUTPUTS = min(tile.block_n for tile in TILES)


def usable(x: torch.Tensor, w: Int4Weight) -> bool:
    n, k = w.packed.shape[0], w.num_inputs
    return (
        multiprocessors(x.device) > 0
        and x.dtype in (torch.float16, torch.bfloat16)
        and n >= _FEWEST_OUTPUTS
        and n % 8 == 0
        and k % STEP.value == 0
        and (w.group_size in (32, 64) or w.group_size % STEP.value == 0)
    )


def int4_hopper_linear(
    x: torch.Tensor,
    w: Int4Weight,
    bias: torch.Tensor | None = None,
    split: Split | None = None,
    added: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [T, K] -> [T, N] in x's dtype, accumulated in float32, of arguments that are `usable`.
    added: [T, N], contiguous, to which the result is added, in place."""
    num_tokens, n, k = x.shape[0], w.packed.shape[0], w.num_inputs
    out = torch.empty(num_tokens, n, dtype=x.dtype, device=x.device) if added is None else added
    if num_tokens == 0:
        return out
    split = split or choose_split(TILES, num_tokens, n, k, multiprocessors(x.device))
    programs, sums, plan = split.launch(num_tokens, n, k, x.device)
    scales = max(STEP.value // w.group_size, 1)  # of an output, in a step

    _int4_kernel[programs](
        tiles_of(x, [split.tile.block_m, STEP.value]),
        tiles_of(w.packed.view(torch.int32), [OUTPUTS.value, STEP.value // 8], 64),
        tiles_of(w.scales, [scales, OUTPUTS.value], 0),
        bias, out, sums, *plan,
        GROUP=w.group_size,
        ADDS=added is not None,
        STAGES=split.tile.stages,
        PER_SM=split.tile.per_sm,
        GROUPS=split.tile.groups,
        maxnreg=split.tile.registers,
        num_warps=4,
        launch_pdl=True,
    )  # fmt: skip
    return out
