"""Hopper's 8-bit product against its naive twin."""

from __future__ import annotations

import random

import pytest
import torch

from sglang.kernels.quant_tokens import quantize_tokens
from sglang.kernels.quant_w8a8 import scaled_matmul_naive
from tests.kernels.common import any_split, on_hopper, randn

pytest.importorskip("sglang.kernels.w8a8_hopper", reason="needs Gluon", exc_type=ImportError)

from sglang.kernels.w8a8_hopper import TILES, w8a8_hopper


@on_hopper
@pytest.mark.parametrize(
    "format, dtype", [(torch.int8, torch.float16), (torch.float8_e4m3fn, torch.bfloat16)]
)
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.block_m} tokens")
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
