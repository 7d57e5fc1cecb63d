"""Products with weights of 8 bits (quant_w8a8.py), int8 or FP8, and of 16, in Gluon on Hopper. A
program (hopper_split_k.py) has two groups of warps that multiply."""

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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sglang.kernels.hopper import (
    PairRing,
    inside,
    load_tile,
    multiprocessors,
    next_stage,
    pair_stage,
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

GROUPS = gl.constexpr(2)
BLOCK_N = gl.constexpr(GROUPS.value * OUTPUTS.value)


class Scaling(NamedTuple):
    x_scale_ptr: gl.tensor  # float32 [T]
    scale_ptr: gl.tensor  # float32 [N]


@gluon.jit
def _load_weights(weight, ring, plan):
    """They do not depend on the kernel before."""
    turn = 0
    for item in range(num_items(plan)):
        _m, own_n, first, end = item_at(item, plan, ring.tiles.shape[1], GROUPS)
        n = inside(own_n, plan.n, BLOCK_N)
        for step in range(first, end):
            i, ready = next_stage(ring, turn)
            mbarrier.expect(ready, weight.block_type.nbytes)
            load_tile(weight, [n, step * STEP], ready, ring.others.index(i))
            turn += 1


@gluon.jit
def _multiply(group: gl.constexpr, scaling, result, ring, plan, ADDS: gl.constexpr):
    """A group's outputs of each tile."""
    BLOCK_M: gl.constexpr = ring.tiles.shape[1]
    IS_INT: gl.constexpr = ring.tiles.dtype == gl.int8
    SUM: gl.constexpr = gl.int32 if IS_INT else gl.float32
    AT_ONCE: gl.constexpr = 128 if IS_INT and BLOCK_M > 128 else BLOCK_M  # what Triton can
    DEPTH: gl.constexpr = 256 // ring.tiles.dtype.primitive_bitwidth
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, AT_ONCE, DEPTH])
    outputs = gl.arange(0, OUTPUTS, layout=gl.SliceLayout(1, ACC))
    tokens = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, ACC))
    if scaling.scale_ptr is not None:
        gdc_wait()  # the kernel before made the scales of tokens
    turn = 0
    for item in range(num_items(plan)):
        own_m, own_n, first, end = item_at(item, plan, BLOCK_M, GROUPS)
        place = place_of(group, result.out_ptr, plan, own_m, own_n, BLOCK_M, GROUPS)
        if scaling.scale_ptr is not None:
            m = gl.minimum(place.m + tokens, plan.num_tokens - 1)
            scales = gl.load(scaling.scale_ptr + place.n + outputs)
            x_scales = gl.load(scaling.x_scale_ptr + m)
        acc = gl.zeros([OUTPUTS, BLOCK_M], SUM, ACC)
        for step in range(first, end):
            inputs, weights, ready, _free, parity = pair_stage(ring, turn)
            weights = weights.slice(group * OUTPUTS, OUTPUTS, 0)
            mbarrier.wait(ready, parity)
            acc = warpgroup_mma(weights, inputs.permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(pair_stage(ring, turn - 1)[3], pred=step > first)
            turn += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(pair_stage(ring, turn - 1)[3])
        sums = acc.to(gl.float32)
        if scaling.scale_ptr is not None:
            sums = sums * x_scales[None, :] * scales[:, None]
        if result.bias_ptr is not None:
            bias = gl.load(result.bias_ptr + place.n + outputs).to(gl.float32)
            sums += gl.where(first == 0, bias, 0.0)[:, None]
        finish(sums, item, group, plan, place, result.sums_ptr, GROUPS, ADDS)


@gluon.jit(do_not_specialize=["num_tokens", "steps", "part_steps", "rounds", "left"])
def _linear_kernel(
    x,  # descriptors: of [T, K], tiles of [BLOCK_M, STEP]
    weight,  # [N, K], tiles of [BLOCK_N, STEP]
    x_scale_ptr,  # float32 [T], and...
    scale_ptr,  # ...float32 [N], of 8-bit weights
    bias_ptr,
    out_ptr,  # [T, N]
    sums_ptr,  # float32 [left, GROUPS, splits, OUTPUTS BLOCK_M], EMPTY
    num_tokens,
    n,
    steps,
    part_steps,
    rounds,
    left,
    ADDS: gl.constexpr,
    STAGES: gl.constexpr,
):
    gdc_launch_dependents()
    # Either takes two arrivals: of the warps that load, and of the groups that multiply.
    ready, free = ring_barriers(STAGES, 2, 2)
    ring = PairRing(room_for(x, STAGES), room_for(weight, STAGES), ready, free)
    fence_async_shared()  # the barriers are there before anyone waits
    plan = Plan(num_tokens, n, steps, part_steps, rounds, left)
    scaling = Scaling(x_scale_ptr, scale_ptr)
    result = Result(bias_ptr, out_ptr, sums_ptr)
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_multiply, (FIRST, scaling, result, ring, plan, ADDS)),
            (_multiply, (SECOND, scaling, result, ring, plan, ADDS)),
            (load_inputs, (x, ring.tiles, ring, plan, GROUPS)),
            (_load_weights, (weight, ring, plan)),
        ],
        [4, 1, 1],
        [232, 24, 24],  # registers of a thread
    )  # fmt: skip


TILES = (  # on an H200, when parts took longer
    Tile(16, stages=8, start=1.7, step=0.25, load=0.0036, parts=1.2, each_part=0.00),
    Tile(32, stages=8, start=2.5, step=0.22, load=0.0036, parts=1.8, each_part=0.02),
    Tile(64, stages=8, start=3.4, step=0.21, load=0.0036, parts=3.3, each_part=0.05),
    Tile(128, stages=6, start=3.2, step=0.37, load=0.0036, parts=2.1, each_part=0.97),
    Tile(256, stages=4, start=2.9, step=0.72, load=0.0036, parts=2.3, each_part=2.35),
)


TILES_OF_16_BITS = (  # on an H200, at the shapes of Qwen3-0.6B, when parts took longer
    Tile(32, stages=5, start=2.0, step=0.33, load=0.0075, parts=1.3, each_part=0.03),
    Tile(64, stages=4, start=2.2, step=0.42, load=0.0085, parts=1.6, each_part=0.05),
)


def usable(x: torch.Tensor, weight: torch.Tensor) -> bool:
    n, k = weight.shape
    return (
        multiprocessors(x.device) > 0 and n >= BLOCK_N.value and n % 8 == 0 and k % STEP.value == 0
    )


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: tuple[torch.Tensor, torch.Tensor] | tuple[None, None],
    bias: torch.Tensor | None,
    out: torch.Tensor,
    adds: bool,
    split: Split,
) -> torch.Tensor:
    (num_tokens, k), n = x.shape, weight.shape[0]
    programs, sums, plan = split.launch(num_tokens, n, k, x.device)
    _linear_kernel[programs](
        tiles_of(x, [split.tile.block_m, STEP.value]),
        tiles_of(weight, [BLOCK_N.value, STEP.value]),
        *scales, bias, out, sums, *plan,
        ADDS=adds,
        STAGES=split.tile.stages,
        num_warps=4,
        launch_pdl=True,
    )  # fmt: skip
    return out


def w8a8_hopper(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    split: Split | None = None,
) -> torch.Tensor:
    """`scaled_matmul` of arguments that are `usable`."""
    (num_tokens, k), n = x.shape, weight.shape[0]
    out = torch.empty(num_tokens, n, dtype=dtype, device=x.device)
    if num_tokens == 0:
        return out
    split = split or choose_split(TILES, num_tokens, n, k, multiprocessors(x.device))
    return _launch(x, weight, (x_scales, scales), bias, out, False, split)


def linear_hopper(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    added: torch.Tensor | None = None,
    split: Split | None = None,
) -> torch.Tensor:
    """x [T, K] -> x W^T + bias, [T, N], of arguments of one 16-bit type that are `usable`.
    added: [T, N], contiguous, to which the result is added, in place."""
    (num_tokens, k), n = x.shape, weight.shape[0]
    out = torch.empty(num_tokens, n, dtype=x.dtype, device=x.device) if added is None else added
    split = split or choose_split(TILES_OF_16_BITS, num_tokens, n, k, multiprocessors(x.device))
    return _launch(x, weight, (None, None), bias, out, added is not None, split)
