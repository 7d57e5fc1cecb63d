"""What the Gluon kernels for Hopper GPUs share.

Their programs have groups of warps: some load, the others multiply. What is loaded comes through
rings of tiles in shared memory. Each stage of a ring has two barriers: `ready` completes when the
tile has come, `free` when all who read it are done. A barrier completes again and again, and who
waits for it names the parity of the lap: in lap n of a ring the readers wait for `ready` of lap n,
the loader for `free` of lap n - 1, which a new barrier takes for done if n is 0.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sglang.kernels import launch

# In Triton 3.9 they are `async_load` and `async_store`.
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@cache
def multiprocessors(device: torch.device) -> int:
    """0 if the kernels do not run there. Gluon is experimental: before 3.6 it was another."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return 0
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return launch.multiprocessors(device) * (version >= (3, 6))


def aligned(t: torch.Tensor) -> torch.Tensor:
    """A matrix, or its copy, if 16 bytes of its rows could not be loaded at once."""
    if t.stride(1) != 1 or t.stride(0) * t.element_size() % 16 or t.data_ptr() % 16:
        return t.clone(memory_format=torch.contiguous_format)
    return t


def tiles_of(t: torch.Tensor, block: list[int], swizzle: int = 128) -> TensorDescriptor:
    """How the copy engine finds tiles of a matrix, or of its copy, if it could not read this one.
    `swizzle`: bytes, up to a tile's row, among which 16 at a time change places in shared memory,
    so that those above one another lie in different banks."""
    t = aligned(t)
    layout = gl.NVMMASharedLayout(swizzle, t.element_size() * 8, rank=2)
    return TensorDescriptor(t, list(t.shape), list(t.stride()), block, layout)


class Ring(NamedTuple):
    tiles: gl.shared_memory_descriptor  # [stages, rows, columns]
    ready: gl.shared_memory_descriptor  # int64 [stages, 1]
    free: gl.shared_memory_descriptor  # int64 [stages, 1]


class PairRing(NamedTuple):
    """Two tiles a stage, those of inputs and of their weights, say."""

    tiles: gl.shared_memory_descriptor  # [stages, rows, columns]
    others: gl.shared_memory_descriptor  # [stages, rows, columns]
    ready: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor


@gluon.jit
def room_for(source, count: gl.constexpr):
    """Shared memory for some tiles of a descriptor."""
    shape: gl.constexpr = [count, source.block_shape[0], source.block_shape[1]]
    return gl.allocate_shared_memory(source.dtype, shape, source.layout)


@gluon.jit
def ring_barriers(count: gl.constexpr, ready_arrivals: gl.constexpr, free_arrivals: gl.constexpr):
    """`ready` and `free` of a ring. One of each in turn: between two of one tensor Triton lets all
    threads wait for each other."""
    LAYOUT: gl.constexpr = mbarrier.MBarrierLayout()
    ready = gl.allocate_shared_memory(gl.int64, [count, 1], LAYOUT)
    free = gl.allocate_shared_memory(gl.int64, [count, 1], LAYOUT)
    for i in gl.static_range(count):
        mbarrier.init(ready.index(i), count=ready_arrivals)
        mbarrier.init(free.index(i), count=free_arrivals)
    return ready, free


@gluon.jit
def ring_of(source, count: gl.constexpr, ready_arrivals: gl.constexpr, free_arrivals: gl.constexpr):
    """For tiles of a descriptor."""
    ready, free = ring_barriers(count, ready_arrivals, free_arrivals)
    return Ring(room_for(source, count), ready, free)


@gluon.jit
def stage(ring, turn):
    """The stage whose turn it is: tile, ready, free, and the parity of the lap."""
    stages: gl.constexpr = ring.tiles.shape[0]
    i = turn % stages
    return ring.tiles.index(i), ring.ready.index(i), ring.free.index(i), turn // stages & 1


@gluon.jit
def pair_stage(ring, turn):
    """Of a `PairRing`: tile, other tile, ready, free, and the parity of the lap."""
    tile, ready, free, parity = stage(ring, turn)
    return tile, ring.others.index(turn % ring.tiles.shape[0]), ready, free, parity


@gluon.jit
def next_stage(ring, turn):
    """Waits until the stage whose turn it is may be loaded: (its number, `ready`)."""
    STAGES: gl.constexpr = ring.free.shape[0]
    i = turn % STAGES
    mbarrier.wait(ring.free.index(i), (turn // STAGES & 1) ^ 1)
    return i, ring.ready.index(i)


@gluon.jit
def counted_on(i, parity, STAGES: gl.constexpr):
    """From one stage and the parity of its lap to the next: `stage` divides, which costs a loop
    that has no time to lose."""
    is_last = i + 1 == STAGES
    return gl.where(is_last, 0, i + 1), gl.where(is_last, parity ^ 1, parity)


@gluon.jit
def tile_at(tile, num_tokens, n, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """First token and first output of a tile of a product. Programs that run together have 2048
    tokens in common with several tiles of outputs: both are in L2. It divides only if it must:
    nothing is loaded before, and a division takes hundreds of cycles."""
    HEIGHT: gl.constexpr = 2048 // BLOCK_M
    tiles_m = gl.cdiv(num_tokens, BLOCK_M)
    row = 0
    column = tile
    if tiles_m > 1:
        first_row = 0
        height = tiles_m
        if tiles_m > HEIGHT:
            in_band = HEIGHT * gl.cdiv(n, BLOCK_N)
            band = tile // in_band
            tile -= band * in_band
            first_row = band * HEIGHT
            height = gl.minimum(tiles_m - first_row, HEIGHT)
        column = tile // height
        row = first_row + tile - column * height
    return row * BLOCK_M, column * BLOCK_N


@gluon.jit
def inside(first, size, block: gl.constexpr):
    """Where a tile begins that would begin at `first`: a last one begins early rather than end
    late, as what lies beyond a tensor's end costs the copy engine more."""
    return gl.maximum(gl.minimum(first, size - block), 0)
