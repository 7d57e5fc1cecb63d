"""Rows of the slot table, cut to their lengths and laid end to end: FlashInfer's page indices."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def gather_slots(
    slot_table: torch.Tensor, rows: torch.Tensor, starts: torch.Tensor, out: torch.Tensor
) -> None:
    """out[starts[i]:starts[i+1]] = the first slots of row rows[i], for each of n rows.

    slot_table [R+1, max_len], rows [n], starts [n + 1] and out [at least starts[n]] are int32. No
    length need be known on the host.
    """
    (gather_slots_triton if out.is_cuda else gather_slots_naive)(slot_table, rows, starts, out)


def gather_slots_naive(
    slot_table: torch.Tensor, rows: torch.Tensor, starts: torch.Tensor, out: torch.Tensor
) -> None:
    ends = starts[1:].tolist()
    for row, start, end in zip(rows.tolist(), starts.tolist(), ends, strict=False):
        out[start:end] = slot_table[row, : end - start]


@triton.jit
def _gather_slots_kernel(
    table_ptr, rows_ptr, starts_ptr, out_ptr, max_len, SHARES: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.program_id(0)
    start = tl.load(starts_ptr + i)
    length = tl.load(starts_ptr + i + 1) - start
    row_ptr = table_ptr + tl.load(rows_ptr + i).to(tl.int64) * max_len
    for first in range(tl.program_id(1) * BLOCK, length, SHARES * BLOCK):
        at = first + tl.arange(0, BLOCK)
        slots = tl.load(row_ptr + at, mask=at < length)
        tl.store(out_ptr + start + at, slots, mask=at < length)


def gather_slots_triton(
    slot_table: torch.Tensor,
    rows: torch.Tensor,
    starts: torch.Tensor,
    out: torch.Tensor,
    shares: int = 8,
    block: int = 512,
) -> None:
    """shares: programs of each row."""
    _gather_slots_kernel[(len(rows), shares)](
        slot_table, rows, starts, out, slot_table.shape[1], SHARES=shares, BLOCK=block
    )
