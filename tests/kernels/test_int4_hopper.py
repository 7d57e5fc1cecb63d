"""Hopper's product with 4-bit weights against its naive twin, and how it shares out its work."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from sglang.kernels import int4
from sglang.kernels.int4_weight import Int4Weight, dequantize_int4_naive
from tests.kernels.common import assert_close, on_hopper, randn, random_int4

hopper = int4.hopper

if hopper is None:
    pytest.skip("needs Gluon", allow_module_level=True)


def expected(x: torch.Tensor, w: Int4Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """Added up in float32, which cuBLAS does not always do with 16-bit types."""
    out = F.linear(x.float(), dequantize_int4_naive(w, x.dtype).float())
    return (out if bias is None else out + bias.float()).to(x.dtype)


# --- on a GPU ------------------------------------------------------------------------------------


@on_hopper
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block_m", [128, 256])
@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_agrees_with_its_twin_and_with_itself(group: int, block_m: int, dtype: torch.dtype) -> None:
    rng = random.Random(group * block_m)
    torch.manual_seed(0)
    for i in range(8):
        k = rng.choice([256, 512, 1280, 4096])
        n = rng.choice([128, 136, 1160, 2008, 4104])
        tokens = rng.choice([1, block_m - 1, block_m, block_m + 37, rng.randint(1, 2048)])
        w = random_int4(n, k, group, torch.bfloat16)
        x = randn(tokens, k, dtype=dtype) / k**0.5
        bias = randn(n, dtype=dtype) if i % 2 else None
        config = hopper.HopperConfig(block_m, rng.randint(1, min(8, k // 128)))
        outs = [hopper.int4_hopper_linear(x, w, bias, config) for _ in range(3)]
        assert_close(outs[0], expected(x, w, bias))
        assert torch.equal(outs[0], outs[1])
        assert torch.equal(outs[0], outs[2])


@on_hopper
def test_full_rounds_and_parts_of_any_number_in_one_launch() -> None:
    torch.manual_seed(0)
    w = random_int4(12288 - 8, 2048, 128, torch.bfloat16)
    x = randn(512 + 3, 2048, dtype=torch.float16) / 2048**0.5
    for splits in range(1, 9):
        config = hopper.HopperConfig(256, splits)
        assert_close(hopper.int4_hopper_linear(x, w, None, config), expected(x, w, None))


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
    config = hopper.HopperConfig(256, 3)
    hopper.int4_hopper_linear(x, w, None, config)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [hopper.int4_hopper_linear(x, w, None, config) for _ in range(3)]
    for _ in range(3):
        x.copy_(randn(293, 1024, dtype=torch.bfloat16) / 32)
        graph.replay()
        for out in outs:
            assert_close(out, expected(x, w, None))


@on_hopper
def test_is_called_where_it_is_quicker_and_for_nothing_that_it_cannot_do(monkeypatch) -> None:
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

    assert was_called(256, 12288, 4096)
    assert was_called(1000, 4096, 4096)
    assert not was_called(60, 12288, 4096)
    assert not was_called(256, 4096, 4096)
    assert not was_called(2100, 4096, 4096)
    assert not was_called(1000, 4100, 4096)
    assert not was_called(1000, 4096, 4032, 64)
    assert not was_called(1000, 4096, 4096 + 128, 96)


# --- anywhere ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_items_are_all_steps_of_all_tiles_once(seed: int, monkeypatch) -> None:
    from sglang.kernels import hopper as shared

    host = SimpleNamespace(
        maximum=max, minimum=min, where=lambda c, a, b: a if c else b, cdiv=lambda a, b: -(-a // b)
    )
    for module in (hopper, shared):
        monkeypatch.setattr(module, "gl", host)
    monkeypatch.setattr(hopper, "tile_at", shared.tile_at.fn)
    block_n = hopper.BLOCK_N.value
    monkeypatch.setattr(hopper, "BLOCK_N", block_n)
    rng = random.Random(seed)
    num_tokens, n, steps = rng.randint(1, 5000), rng.randint(128, 6000), rng.randint(8, 90)
    block_m, processors = rng.choice([128, 256]), rng.choice([5, 114, 132])
    splits = rng.randint(1, 8)
    tiles = host.cdiv(num_tokens, block_m) * host.cdiv(n, block_n)
    whole = tiles if splits == 1 else tiles // processors * processors
    items = whole + (tiles - whole) * splits
    plan = SimpleNamespace(num_tokens=num_tokens, n=n, steps=steps, whole=whole, splits=splits)
    done: dict[tuple[int, int], list[int]] = {}
    for item in range(items):
        m, first_n, first, end, split = hopper._tile.fn(item, plan, block_m)
        assert m % block_m == first_n % block_n == 0
        assert (split == 0) == (first == 0)
        done.setdefault((m, first_n), []).extend(range(first, end))
    assert len(done) == tiles
    assert all(0 <= m < num_tokens and 0 <= first_n < n for m, first_n in done)
    assert all(found == list(range(steps)) for found in done.values())


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_legal_and_has_the_least_estimate(seed: int) -> None:
    rng = random.Random(seed)
    k = 128 * rng.randint(1, 100)
    shape = (rng.randint(128, 2048), 8 * rng.randint(16, 3000), k, rng.choice([78, 114, 132]))
    config = hopper.choose_config(*shape)
    assert config.block_m in hopper.TILES
    assert config.block_m * 5 <= shape[0] * 8
    assert 1 <= config.splits <= k // 128
    assert config.shares(*shape[:2], shape[3])[1] < shape[3]
    took = hopper.estimate(config, *shape)
    for block_m in (128, 256):
        if block_m <= shape[0]:
            assert took <= hopper.estimate(hopper.HopperConfig(block_m, 1), *shape)


@pytest.mark.parametrize(
    "tokens, n, k, quicker",
    [
        (128, 4096, 4096, False), (128, 12288, 4096, False), (144, 22016, 4096, False),
        (160, 22016, 4096, True), (192, 12288, 4096, True), (192, 4096, 4096, False),
        (256, 4096, 4096, False), (256, 12288, 4096, True), (256, 22016, 4096, True),
        (512, 4096, 4096, False), (512, 12288, 4096, True), (512, 22016, 4096, True),
        (512, 4096, 11008, True),
    ],
)  # fmt: skip
def test_estimates_know_which_kernel_was_quicker_on_an_h200(
    tokens: int, n: int, k: int, quicker: bool
) -> None:
    shape = (tokens, n, k, 132)
    estimate = hopper.estimate(hopper.choose_config(*shape), *shape)
    assert (estimate < int4.dot_estimate(*shape)) == quicker
