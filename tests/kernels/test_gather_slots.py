"""The slots of rows, end to end."""

import pytest
import torch

from sglang.kernels.gather_slots import gather_slots_naive, gather_slots_triton

from .common import DEVICE, int32


@pytest.mark.parametrize("lens", [[1], [0, 3, 0], [900, 1, 0, 512, 513]])
def test_rows_are_laid_end_to_end_and_nothing_else_is_written(lens: list[int]) -> None:
    table = torch.randperm(7 * 1000, device=DEVICE).int().view(7, 1000)
    rows = torch.randperm(7, device=DEVICE)[: len(lens)].int()
    starts = int32([sum(lens[:i]) for i in range(len(lens) + 1)])
    out = torch.full((sum(lens) + 5,), -1, dtype=torch.int32, device=DEVICE)
    expected = out.clone()
    gather_slots_naive(table, rows, starts, expected)
    gather_slots_triton(table, rows, starts, out)
    assert torch.equal(out, expected)
    assert torch.equal(out[starts[-1] :], int32([-1] * 5))
    assert out[: lens[0]].tolist() == table[rows[0], : lens[0]].tolist()
