"""Hopper's product with 4-bit weights against its naive twin."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from sglang.kernels import int4
from sglang.kernels.int4_weight import Int4Weight, dequantize_int4_naive
from tests.kernels.common import any_split, assert_close, on_hopper, randn, random_int4

hopper = int4.hopper

if hopper is None:
    pytest.skip("needs Gluon", allow_module_level=True)

from sglang.kernels.hopper_split_k import Split, Tile  # noqa: E402

each_tile = pytest.mark.parametrize(
    "tile",
    hopper.TILES,
    ids=lambda t: f"{t.block_m} tokens, {t.block_n} outputs, {t.per_sm} programs",
)
pytestmark = pytest.mark.usefixtures("parts_are_left_empty")


def expected(x: torch.Tensor, w: Int4Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """Added up in float32, which cuBLAS does not always do with 16-bit types."""
    out = F.linear(x.float(), dequantize_int4_naive(w, x.dtype).float())
    return (out if bias is None else out + bias.float()).to(x.dtype)


@on_hopper
@each_tile
@pytest.mark.parametrize(
    "group, dtype",
    [
        (32, torch.float16), (64, torch.bfloat16), (128, torch.float16), (128, torch.bfloat16),
        (256, torch.bfloat16),
    ],
)  # fmt: skip
def test_agrees_with_its_twin_and_with_itself(group: int, tile: Tile, dtype: torch.dtype) -> None:
    block_m, rng = tile.block_m, random.Random(group * tile.block_m)
    torch.manual_seed(0)
    for i in range(5):
        k = rng.choice([256, 512, 1280, 4096])
        n = rng.choice([tile.block_n, tile.block_n + 16, 1168, 2016, 4112])
        tokens = rng.choice([2, block_m - 1, block_m, block_m + 37, rng.randint(1, 2048)])
        w = random_int4(n, k, group, torch.bfloat16)
        x = randn(tokens, k, dtype=dtype) / k**0.5
        bias = randn(n, dtype=dtype) if i % 2 else None
        split = any_split(rng, tile, tokens, n, k)
        outs = [hopper.int4_hopper_linear(x, w, bias, split) for _ in range(3)]
        assert_close(outs[0], expected(x, w, bias))
        assert torch.equal(outs[0], outs[1])
        assert torch.equal(outs[0], outs[2])


@on_hopper
def test_full_rounds_and_parts_of_any_number_in_one_launch() -> None:
    torch.manual_seed(0)
    processors = hopper.multiprocessors(torch.device("cuda"))
    w = random_int4((processors + 16) * 128 - 8, 2048, 128, torch.bfloat16)
    x = randn(256 - 3, 2048, dtype=torch.float16) / 2048**0.5
    tile = max(hopper.TILES, key=lambda tile: tile.block_m)
    for splits in (1, 2, 3, 4, 6):
        split = Split(tile, splits)
        _columns, rounds, left = split.shares(len(x), w.packed.shape[0], processors)
        assert rounds == 1 and left > 0
        assert_close(hopper.int4_hopper_linear(x, w, None, split), expected(x, w, None))


@on_hopper
@each_tile
def test_adds_to_what_is_there_wherever_tiles_overlap(tile: Tile) -> None:
    rng = random.Random(tile.block_m)
    torch.manual_seed(0)
    for tokens in (tile.block_m, tile.block_m + 5, 700):
        n, k = rng.choice([tile.block_n + 8, 1168, 2016]), 1280
        w = random_int4(n, k, 128, torch.bfloat16)
        x, there = (
            randn(tokens, k, dtype=torch.float16) / k**0.5,
            randn(tokens, n, dtype=torch.float16),
        )
        for split, bias in ((None, None), (any_split(rng, tile, tokens, n, k), there[0])):
            added = there.clone()
            assert hopper.int4_hopper_linear(x, w, bias, split, added) is added
            assert_close(added, there + expected(x, w, bias))


@on_hopper
@each_tile
@pytest.mark.parametrize("bits", [-1, 0x7F80])
def test_parts_that_are_no_numbers_are_not_waited_for(tile: Tile, bits: int) -> None:
    """NaNs, infinities."""
    torch.manual_seed(0)
    w = random_int4(256, 1024, 128, torch.bfloat16)
    x = torch.full((tile.block_m, 1024), bits, dtype=torch.int16, device="cuda")
    for splits in (2, 8):
        out = hopper.int4_hopper_linear(x.view(torch.bfloat16), w, None, Split(tile, splits))
        assert not out.isfinite().any()


class Recorded:
    """A kernel, and how it was compiled."""

    def __init__(self, kernel) -> None:
        self._kernel, self.compiled = kernel, None

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.compiled = self._kernel[grid](*args, **options)

        return launch


@on_hopper
@each_tile
@pytest.mark.parametrize("group", [32, 64, 128])
def test_a_multiprocessor_has_room_for_all_programs_and_no_more(
    tile: Tile, group: int, monkeypatch
) -> None:
    w = random_int4(256, 1024, group, torch.bfloat16)
    x = randn(tile.block_m, 1024, dtype=torch.bfloat16)
    properties = torch.cuda.get_device_properties(x.device)
    kernel = Recorded(hopper._int4_kernel)
    monkeypatch.setattr(hopper, "_int4_kernel", kernel)
    hopper.int4_hopper_linear(x, w, None, Split(tile, 1))
    shared = properties.shared_memory_per_multiprocessor // (kernel.compiled.metadata.shared + 1024)
    threads = 128 * (tile.groups + 1)
    registers = properties.regs_per_multiprocessor // (threads * kernel.compiled.n_regs)
    assert min(shared, registers) == tile.per_sm


@on_hopper
@pytest.mark.parametrize("gap, first", [(8, 0), (8, 3), (5, 0)])
def test_rows_of_the_input_lie_anywhere(gap: int, first: int) -> None:
    torch.manual_seed(0)
    w = random_int4(256, 512, 128, torch.bfloat16)
    x = randn(300, 512 + gap, dtype=torch.float16)[:, first : first + 512] / 512**0.5
    assert_close(hopper.int4_hopper_linear(x, w), expected(x, w, None))


@on_hopper
def test_a_captured_call_can_be_repeated() -> None:
    torch.manual_seed(0)
    w = random_int4(1160, 1024, 128, torch.bfloat16)
    x = randn(293, 1024, dtype=torch.bfloat16) / 32
    split = Split(hopper.TILES[-1], 3)
    hopper.int4_hopper_linear(x, w, None, split)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [hopper.int4_hopper_linear(x, w, None, split) for _ in range(3)]
    for _ in range(3):
        x.copy_(randn(293, 1024, dtype=torch.bfloat16) / 32)
        graph.replay()
        for out in outs:
            assert_close(out, expected(x, w, None))


@on_hopper
def test_is_called_for_more_than_a_few_tokens_and_for_nothing_that_it_cannot_do(
    monkeypatch,
) -> None:
    torch.manual_seed(0)
    calls = []
    kernel = hopper.int4_hopper_linear
    monkeypatch.setattr(
        hopper, "int4_hopper_linear", lambda *a, **k: calls.append(1) or kernel(*a, **k)
    )

    def was_called(tokens: int, n: int, k: int, group: int = 128) -> bool:
        calls.clear()
        w = random_int4(n, k, group, torch.bfloat16)
        x = randn(tokens, k, dtype=torch.float16) / k**0.5
        assert_close(int4.int4_linear(x, w), expected(x, w, None))
        return len(calls) > 0

    assert was_called(9, 4096, 4096)
    assert was_called(2, 4096 + 8, 4096)
    assert was_called(2, 4096, 4096, 64)
    assert was_called(256, 12288, 4096)
    assert was_called(2100, 4096, 4096)
    assert not was_called(8, 4096, 4096)
    assert not was_called(1000, 4100, 4096)
    assert not was_called(1000, 4096, 4032, 64)
    assert not was_called(1000, 4096, 4096 + 128, 96)
