"""How products on Hopper are shared out (int4_hopper.py, linear_hopper.py), in Gluon.

They are transposed (out^T = W x^T): tiles have 128 outputs, 64 of either of two groups of warps,
and some tokens. Programs are persistent, one for each SM. Of what does not fill them evenly, the
tiles behind the last full round, each is split along K into as many parts as leave every program
one at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sglang.kernels.hopper import inside, multiprocessors, tile_at
from sglang.kernels.hopper_sums import OUTPUTS, Parts, Place, add_up, store, store_part
from sglang.kernels.launch import counters

BLOCK_N = gl.constexpr(128)
"""Outputs of a tile."""
STEP = gl.constexpr(128)
"""Inputs that are loaded and multiplied at a time."""


class Plan(NamedTuple):
    """Each program has `rounds` tiles, then at most one of the `splits` parts of a tile left."""

    num_tokens: gl.tensor
    n: gl.tensor
    steps: gl.tensor  # of a tile
    rounds: gl.tensor
    left: gl.tensor  # tiles
    splits: gl.tensor


@gluon.jit
def num_items(plan):
    """Of a program: tiles, and a part of one."""
    return plan.rounds + gl.where(gl.program_id(0) < plan.left * plan.splits, 1, 0)


@gluon.jit
def item_at(i, plan, BLOCK_M: gl.constexpr):
    """A program's i-th item: its tile's first token and first output, its first step and the one
    behind its last."""
    program = gl.program_id(0)
    is_whole = i < plan.rounds
    splits = gl.where(is_whole, 1, plan.splits)
    split = gl.where(is_whole, 0, program % plan.splits)
    tile = i * gl.num_programs(0) + program // splits
    m, n = tile_at(tile, plan.num_tokens, plan.n, BLOCK_M, BLOCK_N)
    return m, n, plan.steps * split // splits, plan.steps * (split + 1) // splits


@gluon.jit
def place_of(half: gl.constexpr, out_ptr, plan, m, n, BLOCK_M: gl.constexpr):
    """Of half of the outputs of a tile, which lies at m, n."""
    inside_m = inside(m, plan.num_tokens, BLOCK_M)
    inside_n = inside(n, plan.n, BLOCK_N) + half * OUTPUTS
    return Place(out_ptr, plan.num_tokens, plan.n, inside_m, inside_n, m, n)


@gluon.jit
def finish(sums, i, half: gl.constexpr, plan, place, sums_ptr, counts_ptr, ADDS: gl.constexpr):
    """Stores the sums of half of a program's i-th item, float32 [OUTPUTS, BLOCK_M], or its share of
    the tile's if they are a part. ADDS: adds them to what is there."""
    BLOCK_M: gl.constexpr = sums.shape[1]
    if i < plan.rounds or plan.splits == 1:
        store(sums, place, ADDS)
    else:
        tile = gl.program_id(0) // plan.splits * 2 + half
        tile_ptr = sums_ptr + (tile * plan.splits).to(gl.int64) * (OUTPUTS * BLOCK_M)
        own = gl.program_id(0) % plan.splits
        parts = Parts(tile_ptr, counts_ptr + tile * 2, plan.splits, own)
        store_part(sums, parts)
        add_up(parts, BLOCK_M, place, ADDS)


# --- on the host ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    block_m: int
    """Tokens."""
    stages: int
    """For which shared memory has room."""
    start: float
    """Of a launch. Microseconds, as all that follow, measured at the shapes of Llama-2-7B."""
    step: float
    """If memory is quick enough..."""
    load: float
    """...and what memory takes for its weights, one program's."""
    parts: float
    """What they take, with..."""
    each_part: float
    """...each of a tile's parts."""


@dataclass(frozen=True)
class Split:
    tile: Tile
    splits: int
    """Of the tiles behind the last full round of all programs."""

    def shares(self, num_tokens: int, n: int, processors: int) -> tuple[int, int]:
        """(full rounds, tiles left)."""
        tiles = triton.cdiv(num_tokens, self.tile.block_m) * triton.cdiv(n, BLOCK_N.value)
        return divmod(tiles, processors)

    def estimate(self, num_tokens: int, n: int, k: int, processors: int) -> float:
        """Microseconds."""
        tile, steps = self.tile, triton.cdiv(k, STEP.value)
        rounds, left = self.shares(num_tokens, n, processors)
        took = tile.start + self._steps(rounds * steps, processors, num_tokens)
        if left:
            steps = triton.cdiv(steps, self.splits)
            took += self._steps(steps, left * self.splits, num_tokens)
        if left and self.splits > 1:
            took += tile.parts + self.splits * tile.each_part
        return took

    def _steps(self, steps: int, programs: int, num_tokens: int) -> float:
        """Of so many programs at once, of which those with other tokens share weights."""
        load = self.tile.load / triton.cdiv(num_tokens, self.tile.block_m)
        return steps * max(self.tile.step, programs * load)

    def launch(
        self, num_tokens: int, n: int, k: int, device: torch.device
    ) -> tuple[int, tuple[torch.Tensor, torch.Tensor], tuple[int, ...]]:
        """(programs; room for parts' sums, and their counters; what a Plan says)."""
        processors = multiprocessors(device)
        rounds, left = self.shares(num_tokens, n, processors)
        steps, parts = triton.cdiv(k, STEP.value), left * self.splits
        # Programs wait for those with the other parts: all are there, and none is empty.
        assert self.splits <= steps and parts <= processors, "too many splits"
        size = parts * BLOCK_N.value * self.tile.block_m if self.splits > 1 else 0
        sums = torch.empty(size, dtype=torch.float32, device=device)
        plan = (num_tokens, n, steps, rounds, left, self.splits)
        return processors if rounds else parts, (sums, counters(device, 4 * left)), plan


def possible_splits(
    tiles: tuple[Tile, ...], num_tokens: int, n: int, k: int, processors: int
) -> list[Split]:
    """With the smallest tile that holds all tokens, or one of the two largest if there are many."""
    fitting = [tile for tile in tiles if tile.block_m >= num_tokens][:1]
    if num_tokens > tiles[-2].block_m:
        fitting = list(tiles[-2:])
    found = []
    for tile in fitting:
        _, left = Split(tile, 1).shares(num_tokens, n, processors)
        most = min(processors // max(left, 1), k // STEP.value // 2)
        found += [Split(tile, splits) for splits in range(1, max(most, 1) + 1)]
    return found


@cache
def choose_split(
    tiles: tuple[Tile, ...], num_tokens: int, n: int, k: int, processors: int
) -> Split:
    shape = (num_tokens, n, k, processors)
    return min(possible_splits(tiles, *shape), key=lambda split: split.estimate(*shape))
