"""How products on Hopper share out their work, and what they take to be the quickest way."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang.kernels.hopper_split_k", reason="needs Gluon", exc_type=ImportError)

from sglang.kernels import hopper, hopper_split_k, int4_hopper, linear_hopper
from sglang.kernels.hopper_split_k import Plan, Split, choose_split, possible_splits

ALL_TILES = [int4_hopper.TILES, linear_hopper.TILES, linear_hopper.TILES_OF_16_BITS]


@pytest.mark.parametrize("seed", range(20))
def test_items_are_all_steps_of_all_tiles_once(seed: int, monkeypatch) -> None:
    rng = random.Random(seed)
    num_tokens, n, k = rng.randint(2, 5000), rng.randint(128, 6000), 128 * rng.randint(1, 90)
    processors = rng.choice([5, 114, 132])
    tiles = rng.choice(ALL_TILES)
    split = rng.choice(possible_splits(tiles, num_tokens, n, k, processors))
    block_m, block_n, groups = split.tile.block_m, split.tile.block_n, split.tile.groups
    columns, rounds, left = split.shares(num_tokens, n, processors)
    assert columns * split.splits <= processors * split.tile.per_sm
    assert left * split.splits * block_m * block_n <= processors * hopper_split_k.MOST_SUMS
    at = [0, 0]
    host = SimpleNamespace(
        maximum=max, minimum=min, where=lambda c, a, b: a if c else b, cdiv=lambda a, b: -(-a // b),
        program_id=lambda axis: at[axis], num_programs=lambda axis: (split.splits, columns)[axis],
    )  # fmt: skip
    for module in (hopper, hopper_split_k):
        monkeypatch.setattr(module, "gl", host)
    monkeypatch.setattr(hopper_split_k, "tile_at", hopper.tile_at.fn)
    monkeypatch.setattr(hopper_split_k, "OUTPUTS", 64)
    plan = Plan(num_tokens, n, k // 128, -(-k // 128 // split.splits), rounds, left)
    done: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for at[:] in itertools.product(range(split.splits), range(columns)):
        for i in range(hopper_split_k.num_items.fn(plan)):
            m, first_n, first, end = hopper_split_k.item_at.fn(i, plan, block_m, groups)
            assert m % block_m == first_n % block_n == 0
            assert first < end
            done.setdefault((m, first_n), []).append((first, end))
    assert len(done) == rounds * columns * split.splits + left
    assert all(0 <= m < num_tokens and 0 <= first_n < n for m, first_n in done)
    for parts in done.values():
        assert [step for part in sorted(parts) for step in range(*part)] == list(range(k // 128))


@pytest.mark.parametrize("tiles", ALL_TILES, ids=["int4", "w8a8", "16 bits"])
@pytest.mark.parametrize("seed", range(10))
def test_the_choice_is_legal_and_has_the_least_estimate(seed: int, tiles: tuple) -> None:
    rng = random.Random(seed)
    k = 128 * rng.randint(1, 100)
    n = rng.choice([128, 136, 184, 192, 200, 8 * rng.randint(16, 3000)])
    shape = (rng.randint(2, 9000), n, k, rng.choice([20, 78, 114, 132]))
    split = choose_split(tiles, *shape)
    assert split.is_legal(*shape) and split.tile.block_n <= n
    assert split.tile.block_m >= min(shape[0], 64)
    least = min(split.estimate(*shape) for split in possible_splits(tiles, *shape))
    assert split.estimate(*shape) == pytest.approx(least, abs=0.01)


@pytest.mark.parametrize(
    "bits, tokens, n, k, expected",  # (tokens of a tile, groups, programs of an SM, splits)
    [
        (4, 2, 4096, 4096, (16, 2, 2, 8)), (4, 16, 12288, 4096, (16, 2, 2, 2)),
        (4, 32, 4096, 11008, (32, 2, 1, 4)), (4, 16, 22016, 4096, (16, 2, 1, 3)),
        (4, 64, 22016, 4096, (64, 3, 1, 1)), (4, 128, 4096, 4096, (128, 2, 1, 4)),
        (4, 256, 4096, 4096, (128, 2, 1, 2)), (4, 256, 12288, 4096, (128, 3, 1, 1)),
        (4, 256, 4096, 11008, (128, 2, 1, 2)), (4, 2048, 12288, 4096, (256, 2, 1, 1)),
        (8, 8, 12288, 4096, (16, 2, 1, 1)), (8, 64, 4096, 4096, (64, 2, 1, 1)),
        (8, 128, 4096, 4096, (64, 2, 1, 1)), (8, 256, 4096, 4096, (64, 2, 1, 1)),
        (8, 256, 22016, 4096, (128, 2, 1, 1)), (8, 256, 4096, 11008, (64, 2, 1, 1)),
        (8, 512, 4096, 11008, (128, 2, 1, 1)), (8, 4096, 22016, 4096, (256, 2, 1, 1)),
    ],
)  # fmt: skip
def test_the_choice_is_what_was_quickest(
    bits: int, tokens: int, n: int, k: int, expected: tuple[int, ...]
) -> None:
    tiles = {4: int4_hopper.TILES, 8: linear_hopper.TILES}[bits]
    split = choose_split(tiles, tokens, n, k, 132)
    tile = split.tile
    assert (tile.block_m, tile.groups, tile.per_sm, split.splits) == expected


@pytest.mark.parametrize("tiles", ALL_TILES, ids=["int4", "w8a8", "16 bits"])
def test_there_is_room_for_all_parts_of_all_programs(tiles: tuple) -> None:
    for tile in tiles:
        assert tile.per_sm * tile.block_m * tile.block_n <= hopper_split_k.MOST_SUMS


@pytest.mark.parametrize("k, splits", [(256, 3), (4096, 5), (1 << 15, 133)])
def test_programs_that_would_wait_forever_are_not_launched(
    k: int, splits: int, monkeypatch
) -> None:
    monkeypatch.setattr(hopper_split_k, "multiprocessors", lambda _: 132)
    with pytest.raises(AssertionError, match="no way"):  # of 32 tiles
        Split(linear_hopper.TILES[0], splits).launch(16, 4096, k, torch.device("cpu"))
