"""How quantized products are shared out: tiles of outputs along the grid's first axis, and where
those are too few to fill a GPU, splits of the inputs along its second.

Of a split product every program writes its partial sums; the last one of a tile to arrive adds them
up, always in the same order, so results do not depend on timing. It also resets the tile's counter:
the workspace is ready for the next launch, in a CUDA graph too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_MAX_TILES = 1 << 16
_counters: dict[torch.device, torch.Tensor] = {}


def split_k_workspace(
    splits: int, num_tokens: int, n: int, device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(float32 [splits, num_tokens, n], int32 counters, all zero), None where there is one split.
    Kernels that use the counters must follow each other in one stream."""
    if splits == 1:
        return None, None
    if device not in _counters:
        _counters[device] = torch.zeros(_MAX_TILES, dtype=torch.int32, device=device)
    partial = torch.empty(splits, num_tokens, n, dtype=torch.float32, device=device)
    return partial, _counters[device]


@triton.jit
def tile_of(program, tiles_m, tiles_n, HEIGHT: tl.constexpr = 8):
    """The program's (tile of tokens, tile of outputs). Programs that run together have HEIGHT tiles
    of tokens in common with several of outputs, and so find both operands in the L2."""
    band = program // (HEIGHT * tiles_n)
    height = tl.minimum(tiles_m - band * HEIGHT, HEIGHT)
    place = program % (HEIGHT * tiles_n)
    return band * HEIGHT + place % height, place // height


@triton.jit
def sum_splits(acc, at, mask, partial_ptr, arrived_ptr, size, SPLITS: tl.constexpr):
    """acc: this program's sums, which go to `at` of [SPLITS, size]. Returns (the sums of all
    splits, whether this program is the one that has them). The split is program_id(1)."""
    base = tl.program_id(1).to(tl.int64) * size
    tl.store(partial_ptr + base + at, acc, mask=mask)
    tl.debug_barrier()  # every thread's sums are written before the program is counted
    tile = tl.program_id(0)
    is_last = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == SPLITS - 1
    if is_last:
        tl.debug_barrier()
        acc = tl.zeros_like(acc)
        for split in range(SPLITS):
            other = partial_ptr + tl.cast(split, tl.int64) * size
            acc += tl.load(other + at, mask=mask, other=0.0, cache_modifier=".cg")
        tl.store(arrived_ptr + tile, 0)
    return acc, is_last
