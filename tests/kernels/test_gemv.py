"""Fused linear layers for one token, against their naive twin."""

import random

import pytest
import torch

from sglang.kernels.gemv import (
    GemvConfig,
    fused_linear_naive,
    fused_linear_triton,
)

from .common import DEVICE, DTYPES, GPU, assert_close, randn, seeds


@pytest.mark.parametrize("seed", seeds(30, 60))
def test_fused_linear_agrees_with_its_twin(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    dtype = rng.choice(DTYPES)
    tokens = rng.randint(0, 3)
    outputs = rng.choice([2, 64, 130] if GPU else [2, 16, 34])
    inputs = rng.choice([64, 100, 1024, 3000])
    gated, biased, normed, added = (rng.random() < 0.5 for _ in range(4))
    x = randn(tokens, inputs + 8, dtype=dtype)[:, :inputs]  # rows with a gap between them
    weight = randn(outputs, inputs, dtype=dtype) / inputs**0.5
    bias = randn(outputs, dtype=dtype) if biased else None
    residual = randn(tokens, inputs, dtype=dtype) if added else None
    norm = torch.rand(inputs, device=DEVICE).to(dtype) + 0.5 if normed else None
    args = (x, weight, bias, residual, norm, 1e-5, gated)
    expected = fused_linear_naive(*args)
    for config in (None, GemvConfig(rng.choice([1, 2, 8]), rng.choice([2, 4, 8]))):
        for actual, wanted in zip(fused_linear_triton(*args, config), expected, strict=True):
            assert_close(actual, wanted)


@pytest.mark.skipif(not GPU, reason="programmatic dependent launch needs a GPU")
def test_a_chain_of_overlapping_launches_is_a_chain() -> None:
    torch.manual_seed(0)
    layers = [randn(2048, 2048, dtype=torch.bfloat16) / 2048**0.5 for _ in range(40)]
    x = start = randn(1, 2048, dtype=torch.bfloat16)
    expected = start
    for weight in layers:
        expected = fused_linear_naive(expected, weight)[0]
    fused_linear_triton(x, layers[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in layers:
            x = fused_linear_triton(x, weight)[0]
    for _ in range(20):
        graph.replay()
        torch.testing.assert_close(x, expected, rtol=0.1, atol=0.1)
