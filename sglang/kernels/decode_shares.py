"""Equal shares of decode attention's work.

The tokens of all rows, in tiles, are one sequence, of which every program has an equal part,
wherever rows begin and end ("stream-K", Osama et al., 2023). A kernel of its own says where each
program begins, on the device, so that it fits a CUDA graph; once a step does for all layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from sglang.kernels.launch import launch_next, pdl, wait_for_previous

PARTS_PER_ROW = 16
"""Programs of a head for each row at most. With more, merging takes longer than it saves."""


@dataclass(frozen=True)
class DecodeConfig:
    block_n: int
    """Tokens of a tile."""
    num_warps: int
    num_stages: int
    programs: int
    """In all: as many as the GPU holds at a time, for they have equal shares."""
    early_tiles: int = 0
    """Of a program's tiles, so many are asked for before the kernel before this one has ended."""


@cache
def decode_config(
    device: torch.device, num_rows: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> DecodeConfig:
    """The quickest on an H200. dtype: the cache's."""
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    heads = num_rows * num_kv_heads
    in_bytes = dtype.itemsize == 1
    if head_dim > 128 or dtype.itemsize == 4:
        return DecodeConfig(32, num_warps=4, num_stages=2, programs=2 * sms)
    if heads <= sms:
        return DecodeConfig(64, num_warps=4, num_stages=2, programs=2 * sms, early_tiles=4)
    # A warp takes a third or more of a quarter of an SM's registers: eight of them fit.
    return DecodeConfig(32, num_warps=1, num_stages=3 if in_bytes else 2, programs=8 * sms)


@dataclass(frozen=True)
class Shares:
    """Which tiles of which rows each program has. Kernels read this before they wait for the one
    before them: between it and them, one without programmatic dependent launch has to run."""

    config: DecodeConfig
    programs: int
    """Of each KV head."""
    work: torch.Tensor
    """int32 [programs, 8]: the first row, the first tile in it, the last row (-1: there is nothing
    to do), the first of all tiles and the one after the last, how many tiles there are in all. With
    fewer tiles than programs, the first ones have one each."""


@triton.jit
def tiles_of(seen, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr):
    if WINDOW > 0:
        seen = tl.minimum(seen, WINDOW)
    return tl.cdiv(seen, BLOCK_N)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["lens_ptr"])
def _share_kernel(
    lens_ptr,
    work_ptr,
    num_rows,
    programs,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ROWS_PADDED: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_next(PDL)
    wait_for_previous(PDL)
    r = tl.arange(0, ROWS_PADDED)
    tiles = tiles_of(tl.load(lens_ptr + r, mask=r < num_rows, other=0), BLOCK_N, WINDOW)
    row_end = tl.cumsum(tiles, 0)[None, :]
    total = tl.sum(tiles, 0)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    busy = tl.maximum(tl.minimum(programs, total), 1)
    start = share_start(p, total, busy)
    end = share_start(p + 1, total, busy)
    before = row_end <= start[:, None]
    row = tl.sum(before.to(tl.int32), 1)
    tile = start - tl.max(tl.where(before, row_end, 0), 1)
    last = tl.sum((row_end < end[:, None]).to(tl.int32), 1)
    work_at = work_ptr + 8 * p
    tl.store(work_at, row, mask=p < programs)
    tl.store(work_at + 1, tile, mask=p < programs)
    tl.store(work_at + 2, tl.where(p < tl.minimum(busy, total), last, -1), mask=p < programs)
    tl.store(work_at + 3, start, mask=p < programs)
    tl.store(work_at + 4, end, mask=p < programs)
    tl.store(work_at + 5, total, mask=p < programs)


@triton.jit
def share_start(p, total, programs):
    """The first tile of program p."""
    return (p.to(tl.int64) * total // programs).to(tl.int32)


@triton.jit
def program_of(tile, total, programs):
    """Whose share a tile is in."""
    return (((tile + 1).to(tl.int64) * programs - 1) // total).to(tl.int32)


def share_out(
    kv_lens: torch.Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    window: int = 0,
    config: DecodeConfig | None = None,
) -> Shares:
    """kv_lens int32 [n] on a GPU, where this is computed: it fits a CUDA graph. dtype: the
    cache's."""
    device, num_rows = kv_lens.device, len(kv_lens)
    config = config or decode_config(device, num_rows, num_kv_heads, head_dim, dtype)
    heads = num_kv_heads * triton.cdiv(num_q_heads // num_kv_heads, 16)
    programs = max(min(config.programs // heads, PARTS_PER_ROW * num_rows), 1)
    work = torch.empty(programs, 8, dtype=torch.int32, device=device)
    block_p = 16
    _share_kernel[(triton.cdiv(programs, block_p),)](
        kv_lens, work, num_rows, programs,
        WINDOW=window,
        BLOCK_N=config.block_n,
        BLOCK_P=block_p,
        ROWS_PADDED=max(256, triton.next_power_of_2(num_rows)),
        **pdl(device),
    )  # fmt: skip
    return Shares(config, programs, work)
