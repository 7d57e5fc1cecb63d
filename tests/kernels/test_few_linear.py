"""Fused linear layers for 2 to 8 tokens, against their naive twin."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sglang.kernels.few_linear import (
    MAX_INPUTS,
    MAX_TOKENS,
    MAX_WEIGHTS,
    few_linear_naive,
    few_linear_triton,
    is_small,
)
from sglang.layers.norm import RMSNorm
from sglang.quantization import unquantized

from .common import DEVICE, DTYPES, GPU, assert_close, randn, seeds


@pytest.mark.parametrize("seed", seeds(20, 60))
def test_few_linear_agrees_with_its_twin(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    dtype = rng.choice(DTYPES)
    tokens = rng.choice([0, 1, 5, MAX_TOKENS, MAX_TOKENS + 1, rng.randint(1, MAX_TOKENS)])
    outputs = rng.choice([2, 64, 130] if GPU else [2, 16, 34])
    inputs = rng.choice([64, 100, 1000, 2048])
    gated, biased, normed, summed = (rng.random() < 0.5 for _ in range(4))
    x = randn(tokens, inputs + 8, dtype=dtype)[:, :inputs]  # rows with a gap between them
    weight = randn(outputs, inputs, dtype=dtype) / inputs**0.5
    bias = randn(outputs, dtype=dtype) if biased else None
    norm = torch.rand(inputs, device=DEVICE).to(dtype) + 0.5 if normed else None
    width = outputs // 2 if gated else outputs
    added = randn(tokens, width + 3, dtype=dtype)[:, :width] if summed else None
    args = (x, weight, bias, norm, 1e-5, gated, added)
    expected = few_linear_naive(*args)
    for num_warps in (None, rng.choice([2, 4, 8])):
        assert_close(few_linear_triton(*args, num_warps), expected)


def test_large_inputs_do_not_overflow_before_they_are_normed() -> None:
    """Residuals of float16 models are large in places: the norm's scale comes after the product."""
    torch.manual_seed(0)
    x, weight = randn(9, 256, dtype=torch.float16), randn(32, 256, dtype=torch.float16) / 16
    x[:, 7] = 30000.0
    norm = torch.full((256,), 3.0, dtype=torch.float16, device=DEVICE)
    args = (x, weight, None, norm, 1e-5)
    assert_close(few_linear_triton(*args), few_linear_naive(*args))


def test_it_is_for_few_tokens_of_16_bits_and_small_matrices_on_cuda() -> None:
    def small(
        tokens: int,
        outputs: int,
        inputs: int,
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cuda",
    ) -> bool:
        with FakeTensorMode():
            x = torch.empty(tokens, inputs, dtype=dtype, device=device)
            return is_small(x, torch.empty(outputs, inputs, dtype=dtype, device=device))

    assert small(5, 4096, 1024) and small(MAX_TOKENS, MAX_WEIGHTS // MAX_INPUTS, MAX_INPUTS)
    assert not small(MAX_TOKENS + 1, 4096, 1024)
    assert not small(5, MAX_WEIGHTS // MAX_INPUTS + 1, MAX_INPUTS)
    assert not small(5, 16, MAX_INPUTS + 1)
    assert not small(5, 4096, 1024, dtype=torch.float32)
    assert not small(5, 4096, 1024, device="cpu")


@pytest.mark.parametrize("tokens", [2, 8])
@pytest.mark.parametrize("biased", [False, True])
def test_unquantized_layers_use_it_and_agree(
    tokens: int, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    method, dtype = unquantized.Unquantized(), torch.float16
    layer = SimpleNamespace(weight=randn(96, 64, dtype=dtype) / 8, packed=None)
    bias = randn(96, dtype=dtype) if biased else None
    norm = RMSNorm("norm", 64, 1e-5, dtype, DEVICE)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x, stream, other = (randn(tokens, n, dtype=dtype) for n in (64, 96, 64))

    def outputs() -> list[torch.Tensor]:
        one, two = method.apply_added(layer, x, bias, stream.clone())
        plain, same = method.apply_normed(layer, x, bias, norm, None, False)
        gated, _ = method.apply_normed(layer, x, bias, norm, None, True)
        summed, total = method.apply_normed(layer, x, bias, norm, other, False)
        return [one if two is None else one + two, plain, same, gated, summed, total]

    calls = []

    def counted(*args: object, **kwargs: object) -> torch.Tensor:
        calls.append(args)
        return few_linear_triton(*args, **kwargs)

    monkeypatch.setattr(unquantized, "few_linear", counted)
    monkeypatch.setattr(unquantized, "is_small", lambda x, weight: False)
    expected = outputs()
    assert not calls
    monkeypatch.setattr(unquantized, "is_small", lambda x, weight: True)
    for actual, wanted in zip(outputs(), expected, strict=True):
        assert_close(actual, wanted)
    assert len(calls) == 3  # not where two summands are to be normed


@pytest.mark.skipif(not GPU, reason="programmatic dependent launch needs a GPU")
def test_a_chain_of_overlapping_launches_is_a_chain() -> None:
    torch.manual_seed(0)
    layers = [randn(2048, 2048, dtype=torch.bfloat16) / 2048**0.5 for _ in range(40)]
    x = start = randn(9, 2048, dtype=torch.bfloat16)
    expected = start
    for weight in layers:
        expected = few_linear_naive(expected, weight)
    few_linear_triton(x, layers[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in layers:
            x = few_linear_triton(x, weight)
    for _ in range(20):
        graph.replay()
        torch.testing.assert_close(x, expected, rtol=0.1, atol=0.1)
