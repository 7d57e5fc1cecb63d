"""Hopper's products with weights of 8 and 16 bits against their naive twins."""

from __future__ import annotations

import random

import pytest
import torch

from sglang.kernels.quant_tokens import quantize_tokens
from sglang.kernels.quant_w8a8 import scaled_matmul_naive
from tests.kernels.common import any_split, assert_close, on_hopper, randn

pytest.importorskip("sglang.kernels.linear_hopper", reason="needs Gluon", exc_type=ImportError)

from sglang.kernels import linear as dispatch
from sglang.kernels.hopper_split_k import Split
from sglang.kernels.linear_hopper import TILES, TILES_OF_16_BITS, linear_hopper, w8a8_hopper

pytestmark = pytest.mark.usefixtures("parts_are_left_empty")


@on_hopper
@pytest.mark.parametrize(
    "format, dtype", [(torch.int8, torch.float16), (torch.float8_e4m3fn, torch.bfloat16)]
)
@pytest.mark.parametrize("tile", TILES, ids=lambda t: f"{t.block_m} tokens, {t.stages} stages")
def test_agrees_with_its_twin_and_with_itself(tile, format, dtype) -> None:
    rng = random.Random(tile.block_m)
    torch.manual_seed(0)
    for i in range(5):
        k = rng.choice([128, 256, 512, 1280, 4096])
        n = rng.choice([128, 144, 1168, 2016, 4112])
        tokens = rng.choice([2, tile.block_m - 1, tile.block_m, tile.block_m + 37, 1500])
        x = quantize_tokens(randn(tokens, k, dtype=torch.float32) / k**0.5, format)
        w = quantize_tokens(randn(n, k, dtype=torch.float32), format)
        bias = randn(n, dtype=dtype) if i % 2 else None
        split = any_split(rng, tile, tokens, n, k)
        outs = [w8a8_hopper(*x, *w, dtype, bias, split) for _ in range(3)]
        # Tensor cores add up products of FP8 with some 14 bits.
        expected = scaled_matmul_naive(*x, *w, dtype, bias)
        torch.testing.assert_close(outs[0], expected, rtol=0.01, atol=0.02)
        assert torch.equal(outs[0], outs[1])
        assert torch.equal(outs[0], outs[2])


@on_hopper
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "tile", TILES_OF_16_BITS, ids=lambda t: f"{t.block_m} tokens, {t.stages} stages"
)
def test_of_16_bits_agrees_with_torch_and_with_itself(tile, dtype) -> None:
    rng = random.Random(tile.block_m)
    torch.manual_seed(0)
    for i in range(6):
        k, n = rng.choice([128, 1024, 1280, 3072]), rng.choice([128, 144, 1168, 2016])
        tokens = rng.choice([1, tile.block_m - 1, tile.block_m, tile.block_m + 37, 500])
        x, w = randn(tokens, k + 8, dtype=dtype)[:, :k] / k**0.5, randn(n, k, dtype=dtype)
        bias = randn(n, dtype=dtype) if i % 2 else None
        split = any_split(rng, tile, tokens, n, k)
        expected = (x.float() @ w.float().t() + (0.0 if bias is None else bias.float())).to(dtype)
        outs = [linear_hopper(x, w, bias, split=split) for _ in range(3)]
        assert_close(outs[0], expected)
        assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
        there = randn(tokens, n, dtype=dtype)
        added = there.clone()
        assert linear_hopper(x, w, bias, added, split) is added
        assert_close(added, there + expected)


@on_hopper
def test_parts_that_are_no_numbers_are_not_waited_for() -> None:
    torch.manual_seed(0)
    x = torch.full((20, 1024), -1, dtype=torch.int16, device="cuda").view(torch.bfloat16)
    out = linear_hopper(
        x, randn(256, 1024, dtype=torch.bfloat16), split=Split(TILES_OF_16_BITS[0], 4)
    )
    assert out.isnan().all()
    x, scales = torch.full((20, 1024), -1, dtype=torch.int8, device="cuda"), torch.ones(20).cuda()
    w = torch.ones(256, 1024, device="cuda").to(torch.float8_e4m3fn), torch.ones(256).cuda()
    x = x.view(torch.float8_e4m3fn)
    assert w8a8_hopper(x, scales, *w, torch.float16, None, Split(TILES[1], 4)).isnan().all()


@on_hopper
def test_is_called_for_some_tokens_and_small_matrices(monkeypatch) -> None:
    calls = []
    kernel = dispatch.hopper.linear_hopper
    monkeypatch.setattr(
        dispatch.hopper, "linear_hopper", lambda *a, **k: calls.append(1) or kernel(*a, **k)
    )

    def was_called(tokens: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> bool:
        calls.clear()
        x, w = randn(tokens, k, dtype=dtype) / k**0.5, randn(n, k, dtype=dtype)
        expected = (x.float() @ w.float().t()).to(dtype)
        torch.testing.assert_close(dispatch.linear(x, w), expected, rtol=0.03, atol=0.03)
        zeros = torch.zeros_like(expected)
        torch.testing.assert_close(dispatch.add_linear(zeros, x, w), expected, rtol=0.03, atol=0.03)
        return len(calls) == 2

    assert was_called(20, 4096, 1024)
    assert was_called(64, 1024, 3072)
    assert not was_called(65, 4096, 1024)
    assert not was_called(20, 12288, 4096)
    assert not was_called(20, 4096, 1000)
    assert not was_called(20, 4100, 1024)
    assert not was_called(20, 512, 1024, torch.float32)


@pytest.mark.parametrize("tokens", [0, 20])
def test_elsewhere_products_are_those_of_blas(tokens: int) -> None:
    x, w, added = torch.randn(tokens, 256), torch.randn(128, 256), torch.randn(tokens, 128)
    assert not dispatch.has_own(x, w)
    assert torch.equal(dispatch.linear(x, w), torch.nn.functional.linear(x, w))
    expected = torch.addmm(added, x, w.t())
    assert torch.equal(dispatch.add_linear(added, x, w), expected)
