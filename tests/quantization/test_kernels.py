"""Every quantized product against its naive twin, over random shapes."""

from __future__ import annotations

import random

import pytest
import torch

from sglang.kernels import int4
from sglang.kernels import quant_w8a8 as w8a8
from tests.kernels.common import DEVICE, DTYPES, GPU, assert_close, randn, seeds


def random_int4(n: int, k: int, group: int) -> int4.Int4Weight:
    groups = -(-k // group)
    q = torch.randint(0, 16, (n, k), device=DEVICE)
    scales = torch.rand(groups, n, device=DEVICE) * 0.1 + 0.05
    zeros = torch.randint(0, 16, (groups, n), device=DEVICE).float()
    return int4.Int4Weight(int4.pack_int4(q), scales, zeros, k, group)


def random_case(seed: int) -> tuple[int4.Int4Weight, torch.dtype]:
    random.seed(seed)
    torch.manual_seed(seed)
    group = random.choice([32, 64, 128, -1])
    k = random.choice([2, 4, 6, 18] if GPU else [2, 4]) * 64
    k = max(k, group)
    n = random.choice([16, 40, 64, 136])
    dtype = random.choice(DTYPES)
    return random_int4(n, k, k if group == -1 else group), dtype


def test_packing_is_undone_by_unpacking():
    q = torch.randint(0, 16, (5, 160))
    assert torch.equal(int4.unpack_int4(int4.pack_int4(q))[:, :160], q.to(torch.uint8))


@pytest.mark.parametrize("seed", seeds(6, 20))
def test_int4_gemv(seed):
    w, dtype = random_case(seed)
    tokens = random.choice([1, 2, 3])
    x = randn(tokens, w.num_inputs, dtype=dtype) * 0.2
    bias = randn(len(w.packed), dtype=dtype) if seed % 2 else None
    config = int4.GemvConfig(4, random.choice([64, 256]), 4)
    out = int4.int4_linear_triton(x, w, bias, config)
    assert_close(out, int4.int4_linear_naive(x, w, bias))


@pytest.mark.parametrize("seed", seeds(8, 24))
def test_int4_dot(seed):
    w, dtype = random_case(seed)
    tokens = random.choice([3, 16, 21, 40])
    x = randn(tokens, w.num_inputs, dtype=dtype) * 0.2
    bias = randn(len(w.packed), dtype=dtype) if seed % 2 else None
    config = int4.DotConfig(random.choice([16, 32]), 64, random.choice([1, 2, 3]), 4, 2)
    expected = int4.int4_linear_naive(x, w, bias)
    for _ in range(2):  # the second time it finds the counters as the first one left them
        assert_close(int4.int4_linear_triton(x, w, bias, config), expected)


@pytest.mark.parametrize("seed", seeds(4, 12))
def test_int4_dequantize(seed):
    w, dtype = random_case(seed)
    expected = int4.dequantize_int4_naive(w, dtype)
    assert_close(int4.dequantize_int4_triton(w, dtype), expected)
    assert_close(int4.dequantize_int4_triton(w, dtype, 2, 2), expected)


@pytest.mark.parametrize("tokens", [1, 7, 33, 300])
def test_int4_linear_chooses_a_way_for_any_number_of_tokens(tokens):
    torch.manual_seed(tokens)
    w = random_int4(72, 192, 64)
    x = randn(tokens, 192, dtype=DTYPES[0]) * 0.2
    assert_close(int4.int4_linear(x, w), int4.int4_linear_naive(x, w))
    if tokens <= 33:
        assert_close(int4.int4_linear_triton(x, w), int4.int4_linear_naive(x, w))


FORMATS = [torch.int8, torch.float8_e4m3fn] if GPU else [torch.int8]  # the interpreter has no FP8


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("seed", seeds(4, 8))
def test_tokens_are_quantized_as_by_torch(seed, format):
    torch.manual_seed(seed)
    x = randn(5, 96 + 100 * seed, dtype=DTYPES[seed % 2])
    x[2] = 0
    q, scales = w8a8.quantize_tokens_triton(x, format)
    q_naive, scales_naive = w8a8.quantize_tokens_naive(x, format)
    torch.testing.assert_close(scales, scales_naive)
    difference = (q.float() - q_naive.float()).abs()
    assert (difference > 0).float().mean() < 0.01  # a division rounded otherwise, at a tie
    assert difference.max() <= (1 if format == torch.int8 else 32)
    error = q.float() * scales[:, None] - x.float()
    assert (error.abs() <= scales[:, None] * (0.51 if format == torch.int8 else 17)).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("seed", seeds(6, 16))
def test_8_bit_products(seed, format):
    random.seed(seed)
    torch.manual_seed(seed)
    tokens, n, k = random.choice([1, 9, 33]), random.choice([16, 72, 160]), 32 * (1 + seed)
    x_q, x_scales = w8a8.quantize_tokens(randn(tokens, k, dtype=torch.float32), format)
    w_q, w_scales = w8a8.quantize_tokens(randn(n, k, dtype=torch.float32), format)
    bias = randn(n, dtype=DTYPES[0]) if seed % 2 else None
    arguments = (x_q, x_scales, w_q, w_scales, DTYPES[0], bias)
    expected = w8a8.scaled_matmul_naive(*arguments)
    tolerance = {"rtol": 1e-2, "atol": 0.03} if GPU else {"rtol": 1e-5, "atol": 1e-4}
    for splits in (1, 2, 3):
        config = w8a8.W8A8Config(16, 64, 64, splits, 4, 2)
        out = w8a8.scaled_matmul_triton(*arguments, config)
        torch.testing.assert_close(out, expected, **tolerance)
    torch.testing.assert_close(w8a8.scaled_matmul_triton(*arguments), expected, **tolerance)


@pytest.mark.skipif(not GPU, reason="cuBLAS")
@pytest.mark.parametrize("format", FORMATS)
def test_8_bit_products_of_the_library(format):
    torch.manual_seed(0)
    x, w = randn(140, 256, dtype=torch.bfloat16), randn(96, 256, dtype=torch.float32)
    w_q, w_scales = w8a8.quantize_tokens(w, format)
    expected = x.float() @ w.t()
    out = w8a8.w8a8_linear(x, w_q, w_scales)
    error = (out.float() - expected).pow(2).mean().sqrt() / expected.std()
    assert error < (0.02 if format == torch.int8 else 0.06)
