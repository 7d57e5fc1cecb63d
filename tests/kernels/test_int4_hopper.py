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


def most_splits(block_m: int, tokens: int, n: int, k: int) -> int:
    """As many as leave each program one part at most."""
    processors = hopper.multiprocessors(torch.device("cuda"))
    left = hopper.HopperConfig(block_m, 1).shares(tokens, n, processors)[1]
    return max(min(processors // max(left, 1), k // 128), 1)


# --- on a GPU ------------------------------------------------------------------------------------


@on_hopper
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block_m", list(hopper.TILES))
@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_agrees_with_its_twin_and_with_itself(group: int, block_m: int, dtype: torch.dtype) -> None:
    rng = random.Random(group * block_m)
    torch.manual_seed(0)
    for i in range(5):
        k = rng.choice([256, 512, 1280, 4096])
        n = rng.choice([128, 136, 1160, 2008, 4104])
        tokens = rng.choice([2, block_m - 1, block_m, block_m + 37, rng.randint(1, 2048)])
        w = random_int4(n, k, group, torch.bfloat16)
        x = randn(tokens, k, dtype=dtype) / k**0.5
        bias = randn(n, dtype=dtype) if i % 2 else None
        config = hopper.HopperConfig(block_m, rng.randint(1, most_splits(block_m, tokens, n, k)))
        outs = [hopper.int4_hopper_linear(x, w, bias, config) for _ in range(3)]
        assert_close(outs[0], expected(x, w, bias))
        assert torch.equal(outs[0], outs[1])
        assert torch.equal(outs[0], outs[2])


@on_hopper
def test_full_rounds_and_parts_of_any_number_in_one_launch() -> None:
    torch.manual_seed(0)
    processors = hopper.multiprocessors(torch.device("cuda"))
    w = random_int4((processors + 16) * 128 - 8, 2048, 128, torch.bfloat16)
    x = randn(256 - 3, 2048, dtype=torch.float16) / 2048**0.5
    for splits in range(1, 9):
        config = hopper.HopperConfig(256, splits)
        assert config.shares(len(x), w.packed.shape[0], processors) == (1, 16)
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
    config = hopper.HopperConfig(256, 3)  # 20 tiles
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
def test_is_called_for_more_than_one_token_and_for_nothing_that_it_cannot_do(monkeypatch) -> None:
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

    assert was_called(2, 4096, 4096)
    assert was_called(256, 12288, 4096)
    assert was_called(2100, 4096, 4096)
    assert not was_called(1, 4096, 4096)
    assert not was_called(1000, 4100, 4096)
    assert not was_called(1000, 4096, 4032, 64)
    assert not was_called(1000, 4096, 4096 + 128, 96)


# --- anywhere ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_items_are_all_steps_of_all_tiles_once(seed: int, monkeypatch) -> None:
    from sglang.kernels import hopper as shared

    rng = random.Random(seed)
    num_tokens, n, k = rng.randint(2, 5000), rng.randint(128, 6000), 128 * rng.randint(1, 90)
    processors = rng.choice([5, 114, 132])
    config = hopper.choose_config(num_tokens, n, k, processors)
    rounds, left = config.shares(num_tokens, n, processors)
    programs = processors if rounds else left * config.splits
    assert programs <= processors
    at = SimpleNamespace(program=0)
    host = SimpleNamespace(
        maximum=max, minimum=min, where=lambda c, a, b: a if c else b, cdiv=lambda a, b: -(-a // b),
        program_id=lambda _: at.program, num_programs=lambda _: programs,
    )  # fmt: skip
    for module in (hopper, shared):
        monkeypatch.setattr(module, "gl", host)
    monkeypatch.setattr(hopper, "tile_at", shared.tile_at.fn)
    monkeypatch.setattr(hopper, "BLOCK_N", 128)
    plan = hopper.Plan(num_tokens, n, k // 128, rounds, left, config.splits)
    done: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for at.program in range(programs):
        for i in range(hopper._num_items.fn(plan)):
            m, first_n, first, end = hopper._item.fn(i, plan, config.block_m)
            assert m % config.block_m == first_n % 128 == 0
            assert first < end
            done.setdefault((m, first_n), []).append((first, end))
    assert len(done) == rounds * processors + left
    assert all(0 <= m < num_tokens and 0 <= first_n < n for m, first_n in done)
    for parts in done.values():
        assert [step for part in sorted(parts) for step in range(*part)] == list(range(k // 128))


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_legal_and_has_the_least_estimate(seed: int) -> None:
    rng = random.Random(seed)
    k = 128 * rng.randint(1, 100)
    shape = (rng.randint(2, 9000), 8 * rng.randint(16, 3000), k, rng.choice([78, 114, 132]))
    config = hopper.choose_config(*shape)
    assert config.block_m >= min(shape[0], 128)
    assert 1 <= config.splits <= k // 128
    took = hopper.estimate(config, *shape)
    assert all(took <= hopper.estimate(hopper.HopperConfig(m, 1), *shape) for m in (128, 256))


@pytest.mark.parametrize(
    "tokens, n, k, block_m, splits",
    [
        (2, 4096, 4096, 16, 4), (16, 12288, 4096, 16, 1), (32, 4096, 11008, 32, 4),
        (64, 22016, 4096, 64, 3), (128, 4096, 4096, 128, 4), (256, 4096, 4096, 128, 2),
        (256, 12288, 4096, 256, 1), (256, 4096, 11008, 256, 4), (2048, 12288, 4096, 256, 1),
    ],
)  # fmt: skip
def test_the_choice_is_what_was_quickest_on_an_h200(
    tokens: int, n: int, k: int, block_m: int, splits: int
) -> None:
    assert hopper.choose_config(tokens, n, k, 132) == hopper.HopperConfig(block_m, splits)
