"""SwiGLU's first half in one product: Hopper's kernel against its naive twin, and who is called."""

from __future__ import annotations

import random

import pytest
import torch

from sglang.kernels import gated_linear as dispatch
from sglang.kernels.gated_linear import gated_linear, gated_linear_naive

from .common import assert_close, on_hopper, randn

hopper = dispatch.hopper

HALVES = [torch.float16, torch.bfloat16]


def expected(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Rounded once, at the end."""
    return gated_linear_naive(x.float(), w.float()).to(x.dtype)


def inputs(tokens: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    return randn(tokens, k, dtype=dtype) / k**0.5


@on_hopper
@pytest.mark.parametrize("dtype", HALVES)
def test_agrees_with_its_twin_and_with_itself(dtype: torch.dtype) -> None:
    rng = random.Random(0)
    torch.manual_seed(0)
    for _ in range(20):
        tokens = rng.choice([1, 63, 65, 127, 128, 129, 2049, rng.randint(1, 5000)])
        outputs = 32 * rng.choice([1, 3, 4, 5, 34, 344, rng.randint(1, 200)])
        k = 64 * rng.choice([4, 5, 16, 64, rng.randint(4, 100)])
        x, w = inputs(tokens, k, dtype), randn(2 * outputs, k, dtype=dtype)
        outs = [hopper.gated_linear_hopper(x, w) for _ in range(3)]
        assert_close(outs[0], expected(x, w))
        assert torch.equal(outs[0], outs[1])
        assert torch.equal(outs[0], outs[2])


@on_hopper
@pytest.mark.parametrize("gap, first", [(8, 0), (8, 3), (5, 0)])
def test_rows_of_the_input_lie_anywhere(gap: int, first: int) -> None:
    torch.manual_seed(0)
    x = inputs(300, 512 + gap, torch.float16)[:, first : first + 512]
    w = randn(2 * 192, 512, dtype=torch.float16)
    assert_close(hopper.gated_linear_hopper(x, w), expected(x, w))


@on_hopper
def test_a_captured_call_can_be_repeated() -> None:
    torch.manual_seed(0)
    x, w = inputs(2500, 512, torch.bfloat16), randn(2 * 1056, 512, dtype=torch.bfloat16)
    gated_linear(x, w)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [gated_linear(x, w) for _ in range(3)]
    for _ in range(3):
        x.copy_(inputs(2500, 512, torch.bfloat16))
        graph.replay()
        for out in outs:
            assert_close(out, expected(x, w))


@on_hopper
def test_is_called_for_many_tokens_and_for_nothing_that_it_cannot_do(monkeypatch) -> None:
    torch.manual_seed(0)
    calls = []
    kernel = hopper.gated_linear_hopper
    monkeypatch.setattr(hopper, "gated_linear_hopper", lambda *a: calls.append(1) or kernel(*a))

    def was_called(tokens: int, outputs: int, k: int, dtype: torch.dtype = torch.float16) -> bool:
        calls.clear()
        x, w = inputs(tokens, k, dtype), randn(2 * outputs, k, dtype=dtype)
        assert_close(gated_linear(x, w), expected(x, w))
        return len(calls) > 0

    assert was_called(2048, 3072, 1024)
    assert not was_called(2047, 3072, 1024)
    assert not was_called(2048, 3080, 1024)
    assert not was_called(2048, 3072, 1000)
    assert not was_called(2048, 3072, 192)
    x, w = inputs(2048, 256, torch.float32), randn(512, 256, dtype=torch.float32)
    assert not hopper.usable(x, w)
    assert not hopper.usable(x.half(), w.bfloat16())
    assert not hopper.usable(x.half(), w.half().t().contiguous().t())
    assert hopper.usable(x.half(), w.half())


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("tokens", [0, 1, 7, 2100])
def test_other_products_are_the_twins(tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = inputs(tokens, 256, dtype).cpu()
    w = randn(2 * 32, 256, dtype=dtype).cpu()
    assert hopper is None or not hopper.usable(x, w)
    assert_close(gated_linear(x, w), gated_linear_naive(x, w))
