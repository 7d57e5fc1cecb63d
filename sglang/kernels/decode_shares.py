"""Which program of decode attention does what, and how the parts of a row become one.

The tiles of all rows, end to end, are cut into equal shares, one for each program (as stream-K does
for products: Osama et al., 2023): so all end at about the same time, whatever the rows' lengths. A
share may begin and end within a row; of a row's parts, the one that ends last merges all. But if
there are as many programs as rows, these are not short, and none is much longer than a share, a
program takes a row: SMs are not equally quick, and those that are take more rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sglang.kernels.launch import counters


@dataclass(frozen=True)
class DecodeConfig:
    """How the work is cut. The launch grid follows from the shapes alone, so it fits a CUDA graph;
    what each program does is decided on the device."""

    block_n: int
    """Tokens of a tile."""
    num_warps: int
    num_stages: int
    programs: int
    """As many as the GPU holds at once, or less: of all KV heads together."""
    min_tokens: int = 64
    """A program's share at least."""
    rounds: int = 8
    """Of programs that take a row each, at most."""
    max_parts: int = 16
    """Of a row."""
    dots: bool = True
    """On tensor cores, the query heads of a KV head as a tile; or without, for a single one."""

    def cut(self, num_rows: int, heads: int) -> tuple[int, int]:
        """(shares of the work, programs) for each of so many blocks of heads: a program for each
        share, or, if there are more rows and not too many, for each row."""
        shares = min(num_rows * self.max_parts, max(self.programs // heads, 1))
        # Those that find no work take time too.
        return shares, num_rows if shares < num_rows <= self.rounds * shares else shares


def part_buffers(
    q: torch.Tensor, programs: int, heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For queries [n, HQ, D], whose heads are in so many blocks: float32 [programs, 2, HQ, D], the
    parts' results; float32 [programs, 2, HQ], log2 of their sums of exponentials; int32
    [n, blocks], how many of a row's parts have ended. A program has two parts of rows that others
    have parts of, at most: its first, and the last, which begins the row."""
    num_rows, num_heads, dim = q.shape
    partial = torch.empty(programs, 2, num_heads, dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(programs, 2, num_heads, dtype=torch.float32, device=q.device)
    return partial, lse, counters(q.device, num_rows * heads)


class Share(NamedTuple):
    """Of a program. Tiles are numbered through the rows, from the first one on, or from the
    program's first."""

    first_row: tl.tensor
    last_row: tl.tensor
    first_tile: tl.tensor
    end_tile: tl.tensor
    before: tl.tensor  # tiles of the rows before the first
    size: tl.tensor  # tiles of a share
    is_row: tl.tensor  # it is a whole row instead


@triton.jit
def _rows_of(tiles, r, first_tile, end_tile):
    """First and last row that have some of these tiles, and the tiles of the rows before."""
    ends = tl.cumsum(tiles, 0)
    first_row = tl.sum((ends <= first_tile).to(tl.int32), 0)
    last_row = tl.sum((ends < end_tile).to(tl.int32), 0)
    return first_row, last_row, tl.sum(tl.where(r < first_row, tiles, 0), 0)


@triton.jit
def take_share(
    lens_ptr, num_rows, num_shares,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_TILES: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    ROWS_PADDED: tl.constexpr,
    BRANCH: tl.constexpr,
):  # fmt: skip
    """This program's `Share`.

    BRANCH  around what a whole row does not need: quicker, if that does not make the compiler's
            code of the kernel around it worse, as it does with 16-bit caches
    """
    program = tl.program_id(1)
    r = tl.arange(0, ROWS_PADDED)
    seen_lens = tl.load(lens_ptr + r, mask=r < num_rows, other=0)
    if WINDOW > 0:
        seen_lens = tl.minimum(seen_lens, WINDOW)
    tiles = tl.cdiv(seen_lens, BLOCK_N)
    total_tiles = tl.sum(tiles, 0)
    longest = tl.max(tiles, 0)
    size = tl.maximum(tl.cdiv(total_tiles, num_shares), tl.cdiv(longest, MAX_PARTS - 1))
    size = tl.maximum(size, MIN_TILES)
    are_even = (4 * longest <= 5 * size) & (total_tiles >= 8 * num_rows)
    is_row = are_even & (tl.num_programs(1) >= num_rows)
    if BRANCH:
        first_row = program
        last_row = tl.minimum(program, num_rows - 1)
        first_tile = 0
        end_tile = longest
        before = 0
        if not is_row:
            first_tile = program * size
            end_tile = tl.minimum(first_tile + size, total_tiles)
            first_row, last_row, before = _rows_of(tiles, r, first_tile, end_tile)
    else:
        first_tile = program * size
        end_tile = tl.minimum(first_tile + size, total_tiles)
        if is_row:
            first_tile = tl.sum(tl.where(r < program, tiles, 0), 0)
            end_tile = tl.sum(tl.where(r <= program, tiles, 0), 0)
        first_row, last_row, before = _rows_of(tiles, r, first_tile, end_tile)
    return Share(first_row, last_row, first_tile, end_tile, before, size, is_row)


@triton.jit
def row_part(share, kv_len, before, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of a row, `before` which there are so many tiles: the tokens start..end-1 that this program
    has, the row's tiles, how many programs have parts of it, and the first of them."""
    first = 0
    if WINDOW > 0:
        first = tl.maximum(kv_len - WINDOW, 0)
    tiles = tl.cdiv(kv_len - first, BLOCK_N)
    start = first + tl.maximum(share.first_tile - before, 0) * BLOCK_N
    end = tl.minimum(first + (share.end_tile - before) * BLOCK_N, kv_len)
    first_program = before // share.size
    parts = (before + tiles - 1) // share.size - first_program + 1
    parts = tl.where(tiles > 0, tl.where(share.is_row, 1, parts), 0)
    return start, end, tiles, parts, first_program


@triton.jit
def part_at(first_program):
    """Where this program's part of a row is, in units of a part: its first, or, if the row begins
    here, its last."""
    program = tl.program_id(1)
    return 2 * program + (program == first_program).to(tl.int32)


@triton.jit
def merge_parts(
    row, base_head, first, end, parts, first_program, partial_ptr, lse_ptr, ended_ptr, out_ptr,
    HQ: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MAX_PARTS: tl.constexpr,
):  # fmt: skip
    """Count this program's part of a row (int64), stored for the heads first..end-1 after
    `base_head`; if it was the last one, merge all."""
    tl.debug_barrier()  # the stores of all threads come before the count
    ended_at = ended_ptr + row * tl.num_programs(0) + tl.program_id(0)
    if tl.atomic_add(ended_at, 1, sem="acq_rel") == parts - 1:
        tl.store(ended_at, 0)
        d = tl.arange(0, BLOCK_D)
        s = tl.arange(0, MAX_PARTS)
        used = s < parts
        at_parts = (2 * (first_program + s) + (s == 0).to(tl.int32)) * HQ
        for h in range(first, end):
            head = base_head + h
            # Past the L1, which other SMs' stores do not reach.
            lse_at = lse_ptr + at_parts + head
            lse = tl.load(lse_at, mask=used, other=-1.0e30, cache_modifier=".cg")
            tile = partial_ptr + (at_parts + head)[:, None] * D + d[None, :]
            tile_mask = used[:, None] & (d[None, :] < D)
            part = tl.load(tile, mask=tile_mask, other=0.0, cache_modifier=".cg")
            weight = tl.exp2(lse - tl.max(lse, 0))
            out = tl.sum(weight[:, None] * part, 0) / tl.sum(weight, 0)
            out_at = out_ptr + (row * HQ + head) * D + d
            tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=d < D)
