"""How products on Hopper are shared out (int4_hopper.py, linear_hopper.py), in Gluon.

They are transposed (out^T = W x^T): tiles have some tokens, and 64 outputs of each of two or three
groups of warps. Programs are persistent, one for each SM; or two, whose waiting for memory, for
tensor cores and for each other overlaps, if tiles have few tokens. Of what does not fill them
evenly, the tiles behind the last full round, each is split along K into as many parts as leave
every program one at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_wait

from sglang.kernels.hopper import inside, load_tile, multiprocessors, next_stage, tile_at
from sglang.kernels.hopper_sums import EMPTY, OUTPUTS, Parts, Place, add_up, store

STEP = gl.constexpr(128)
"""Inputs that are loaded and multiplied at a time."""
MOST_SUMS = 256 * 128
"""Numbers of the parts that an SM's programs have."""


class Plan(NamedTuple):
    """Programs [splits, columns]: each has `rounds` tiles, then in the first `left` columns one
    part of a column's tile."""

    num_tokens: gl.tensor
    n: gl.tensor
    steps: gl.tensor  # of a tile
    part_steps: gl.tensor
    rounds: gl.tensor
    left: gl.tensor


class Result(NamedTuple):
    bias_ptr: gl.tensor
    out_ptr: gl.tensor  # [num_tokens, n]
    sums_ptr: gl.tensor  # float32 [left, groups, splits, OUTPUTS BLOCK_M], EMPTY


@gluon.jit
def num_items(plan):
    """Of a program: tiles, and a part of one."""
    return plan.rounds + gl.where(gl.program_id(1) < plan.left, 1, 0)


@gluon.jit
def item_at(i, plan, BLOCK_M: gl.constexpr, GROUPS: gl.constexpr):
    """A program's i-th item: its tile's first token and first output, its first step and the one
    behind its last."""
    split, splits = gl.program_id(0), gl.num_programs(0)
    column = gl.program_id(1)
    is_whole = i < plan.rounds
    tile = i * splits * gl.num_programs(1) + gl.where(is_whole, column * splits + split, column)
    first = gl.where(is_whole, 0, split * plan.part_steps)
    end = gl.minimum(first + gl.where(is_whole, plan.steps, plan.part_steps), plan.steps)
    m, n = tile_at(tile, plan.num_tokens, plan.n, BLOCK_M, GROUPS * OUTPUTS)
    return m, n, first, end


@gluon.jit
def load_inputs(x, tiles, ring, plan, GROUPS: gl.constexpr):
    """The work of a warp: the tiles of a descriptor, [BLOCK_M, STEP], into those of a ring."""
    BLOCK_M: gl.constexpr = x.block_shape[0]
    gdc_wait()
    turn = 0
    for item in range(num_items(plan)):
        own_m, _n, first, end = item_at(item, plan, BLOCK_M, GROUPS)
        m = inside(own_m, plan.num_tokens, BLOCK_M)
        for step in range(first, end):
            i, ready = next_stage(ring, turn)
            mbarrier.expect(ready, x.block_type.nbytes)
            load_tile(x, [m, step * STEP], ready, tiles.index(i))
            turn += 1


@gluon.jit
def place_of(
    group: gl.constexpr, out_ptr, plan, m, n, BLOCK_M: gl.constexpr, GROUPS: gl.constexpr
):  # fmt: skip
    """Of a group's outputs of a tile, which lies at m, n."""
    inside_m = inside(m, plan.num_tokens, BLOCK_M)
    inside_n = inside(n, plan.n, GROUPS * OUTPUTS) + group * OUTPUTS
    return Place(out_ptr, plan.num_tokens, plan.n, inside_m, inside_n, m, n)


@gluon.jit
def finish(
    sums, i, group: gl.constexpr, plan, place, sums_ptr, GROUPS: gl.constexpr, ADDS: gl.constexpr
):  # fmt: skip
    """Stores a group's sums of a program's i-th item, float32 [OUTPUTS, BLOCK_M]; or, if they are
    a part of the tile's, all parts' sums of some tokens. ADDS: adds them to what is there."""
    splits = gl.num_programs(0)
    if i < plan.rounds or splits == 1:
        store(sums, place, ADDS)
    else:
        tile = gl.program_id(1) * GROUPS + group
        tile_ptr = sums_ptr + (tile * splits).to(gl.int64) * (OUTPUTS * sums.shape[1])
        add_up(sums, Parts(tile_ptr, splits, gl.program_id(0)), place, ADDS)


# --- on the host ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)  # each is one of its kind: looked up for every product
class Tile:
    block_m: int
    """Tokens."""
    stages: int
    """For which shared memory has room."""
    start: float
    """Of a launch. Microseconds, as all that follow, fitted to what shapes of Llama took."""
    step: float
    """If memory is quick enough..."""
    load: float
    """...and what memory takes for its weights, one program's."""
    parts: float
    """What they take, with..."""
    each_part: float
    """...each of a tile's parts."""
    per_sm: int = 1
    """Programs. There is room for no more: the GPU would lay two on one SM, and none on others."""
    groups: int = 2
    """Of warps, that have 64 outputs each."""

    @property
    def block_n(self) -> int:
        """Outputs."""
        return self.groups * OUTPUTS.value

    @property
    def registers(self) -> int:
        """Of a thread at the start: all that there are, for the groups that multiply and one more,
        which has the warps that load."""
        return 65536 // (128 * (self.groups + 1) * self.per_sm) // 8 * 8


@dataclass(frozen=True)
class Split:
    tile: Tile
    splits: int
    """Of the tiles behind the last full round of all programs."""

    def shares(self, num_tokens: int, n: int, processors: int) -> tuple[int, int, int]:
        """(columns of programs, full rounds, tiles left)."""
        tiles = triton.cdiv(num_tokens, self.tile.block_m) * triton.cdiv(n, self.tile.block_n)
        columns = processors * self.tile.per_sm // self.splits
        rounds, left = divmod(tiles, columns * self.splits)
        return columns if rounds else left, rounds, left

    def is_legal(self, num_tokens: int, n: int, k: int, processors: int) -> bool:
        """Programs wait for those with the other parts: all are there, and none is empty. No tile
        is larger than the weights."""
        programs = processors * self.tile.per_sm
        steps = triton.cdiv(k, STEP.value)
        if self.splits > programs or (self.splits - 1) * triton.cdiv(steps, self.splits) >= steps:
            return False
        if self.tile.block_n > n:
            return False
        return self.shares(num_tokens, n, processors)[2] * self.splits <= programs

    def estimate(self, num_tokens: int, n: int, k: int, processors: int) -> float:
        """Microseconds."""
        tile, steps = self.tile, triton.cdiv(k, STEP.value)
        columns, rounds, left = self.shares(num_tokens, n, processors)

        def run(steps: int, programs: int) -> float:
            """So many programs at once, of which those with other tokens share weights."""
            load = programs * tile.load / triton.cdiv(num_tokens, tile.block_m)
            return steps * max(tile.step, load)

        took = tile.start + run(rounds * steps, columns * self.splits)
        if left:
            took += run(triton.cdiv(steps, self.splits), left * self.splits)
        if left and self.splits > 1:
            took += tile.parts + self.splits * tile.each_part
        return took

    def launch(
        self, num_tokens: int, n: int, k: int, device: torch.device
    ) -> tuple[tuple[int, int], torch.Tensor, tuple[int, ...]]:
        """(programs, room for parts' sums, what a Plan says)."""
        processors = multiprocessors(device)
        assert self.is_legal(num_tokens, n, k, processors), "no way to share out the work"
        columns, rounds, left = self.shares(num_tokens, n, processors)
        steps = triton.cdiv(k, STEP.value)
        plan = (num_tokens, n, steps, triton.cdiv(steps, self.splits), rounds, left)
        return (self.splits, columns), empty_sums(device), plan


@cache
def empty_sums(device: torch.device) -> torch.Tensor:
    """Room for all parts that there can be at once. Every launch leaves it EMPTY, and the launches
    of one stream share it."""
    shape = (multiprocessors(device), MOST_SUMS)
    return torch.full(shape, EMPTY.value, dtype=torch.int32, device=device).view(torch.float32)


def possible_splits(
    tiles: tuple[Tile, ...], num_tokens: int, n: int, k: int, processors: int
) -> list[Split]:
    """With the smallest tiles that hold all tokens; if there are more than 64, with those of fewer,
    too, but of 64 at least (of 128 from 257 tokens on). Parts have two steps or more."""
    sizes = sorted({tile.block_m for tile in tiles})
    enough = next((size for size in sizes if size >= num_tokens), sizes[-1])
    least = 64 if num_tokens <= 256 else 128
    found = []
    for tile in tiles:
        if tile.block_m == enough or least <= tile.block_m < enough:
            left = Split(tile, 1).shares(num_tokens, n, processors)[2]
            most = min(processors * tile.per_sm // max(left, 1), k // STEP.value // 2)
            found += [Split(tile, splits) for splits in range(1, max(most, 1) + 1)]
    return [split for split in found if split.is_legal(num_tokens, n, k, processors)]


@cache
def choose_split(
    tiles: tuple[Tile, ...], num_tokens: int, n: int, k: int, processors: int
) -> Split:
    shape = (num_tokens, n, k, processors)
    possible = possible_splits(tiles, *shape)
    return min(possible, key=lambda split: (round(split.estimate(*shape), 2), split.splits))
