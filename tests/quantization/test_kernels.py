"""Every quantized product against its naive twin, over random shapes."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from sglang.kernels import int4, quant_tokens
from sglang.kernels import quant_w8a8 as w8a8
from sglang.kernels.int4_gemv import int4_fused_linear_naive, int4_fused_linear_triton
from sglang.kernels.int4_weight import (
    Int4Weight,
    dequantize_int4_naive,
    pack_int4,
    pack_scales,
    unpack_int4,
    unpack_scales,
)
from sglang.kernels.one_token import OneTokenConfig
from sglang.kernels.quant_tokens import quantize_tokens
from sglang.kernels.w8a8_gemv import w8a8_fused_linear_naive, w8a8_fused_linear_triton
from tests.kernels.common import DEVICE, DTYPES, GPU, assert_close, randn, random_int4, seeds


def random_case(
    seed: int, scale_dtype: torch.dtype = torch.float32
) -> tuple[Int4Weight, torch.dtype]:
    random.seed(seed)
    torch.manual_seed(seed)
    group = random.choice([32, 64, 128, -1])
    k = random.choice([2, 4, 6, 18] if GPU else [2, 4]) * 64
    k = max(k, group)
    n = random.choice([16, 40, 64, 136])
    dtype = random.choice(DTYPES)
    return random_int4(n, k, k if group == -1 else group, scale_dtype), dtype


def test_packing_is_undone_by_unpacking():
    q = torch.randint(0, 16, (5, 160))
    assert torch.equal(unpack_int4(pack_int4(q))[:, :160], q.to(torch.uint8))
    scales, zeros = torch.randn(5, 7).half().float(), torch.randint(0, 17, (5, 7))
    for actual, expected in zip(
        unpack_scales(pack_scales(scales, zeros)), (scales, zeros.float()), strict=True
    ):
        assert torch.equal(actual, expected)


def test_a_word_has_what_a_lane_of_tensor_cores_wants():
    q = torch.randint(0, 16, (3, 128))
    words = pack_int4(q).view(torch.int32)
    for block, c, t in itertools.product(range(2), range(4), range(2)):
        i = 64 * block + 16 * t + 2 * c
        for nibble, at in enumerate((0, 32, 8, 40, 1, 33, 9, 41)):
            actual = words[:, 8 * block + 2 * c + t] >> 4 * nibble & 15
            assert torch.equal(actual.long(), q[:, i + at])


def random_surroundings(
    rng: random.Random, tokens: int, n: int, k: int, dtype: torch.dtype
) -> tuple:
    """(x, (bias, residual, norm, eps, gated)) of a fused linear layer."""
    biased, added, normed, gated = (rng.random() < 0.5 for _ in range(4))
    x = randn(tokens, k + 8, dtype=dtype)[:, :k]  # rows with a gap between them
    bias = randn(n, dtype=dtype) if biased else None
    residual = randn(tokens, k, dtype=dtype) if added else None
    norm = torch.rand(k, device=DEVICE).to(dtype) + 0.5 if normed else None
    return x * 0.2, (bias, residual, norm, 1e-5, gated)


@pytest.mark.parametrize("seed", seeds(16, 40))
def test_int4_of_one_token(seed):
    rng = random.Random(seed)
    w, dtype = random_case(seed)
    n = len(w.packed)
    x, around = random_surroundings(rng, rng.choice([0, 1, 2]), n, w.num_inputs, dtype)
    expected = int4_fused_linear_naive(x, w, *around)
    for config in (
        None,
        OneTokenConfig(rng.choice([1, 2, 4]), rng.choice([1, 4]), rng.choice([1, 3])),
    ):
        actual = int4_fused_linear_triton(x, w, *around, config)
        assert_alike(actual[0], expected[0])
        assert_close(actual[1], expected[1])


@pytest.mark.parametrize(
    ("n", "k", "group", "gated"),
    [
        (1026, 4096, 128, True), (514, 4096, 64, True), (514, 4096, 32, False),
        (130, 11008, 128, False), (66, 11008, 32, False), (24, 28672, 128, False),
        (130, 128, 128, False), (130, 160, 32, True), (258, 5120, 128, True),
        (34, 288, 96, False), (34, 384, 192, True), (20, 8192, 64, False),
    ]
    if GPU
    else [(18, 160, 32, True), (21, 192, 64, False), (12, 288, 96, True), (10, 384, 192, False)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES)
def test_int4_of_one_token_at_odd_shapes(n, k, group, gated, dtype):
    """On a GPU this is what says that the compiler lays tensors out as the kernel's tensor cores
    need them: elsewhere a result has nothing to do with the right one."""
    torch.manual_seed(n + k)
    w = random_int4(n, k, group)
    x, residual = (randn(1, k, dtype=dtype) * 0.2 for _ in range(2))
    norm = torch.rand(k, device=DEVICE).to(dtype) * 0.02  # so small that a float16 holds it badly
    for around in ((None, None, None, 0.0, gated), (None, residual, norm, 1e-5, gated)):
        actual = int4_fused_linear_triton(x, w, *around)
        expected = int4_fused_linear_naive(x, w, *around)
        assert_alike(actual[0], expected[0])
        assert torch.equal(actual[1], expected[1])


def assert_alike(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Within what rounding to the tensors' type does to sums of many terms and to their factors."""
    if actual.numel():
        tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[actual.dtype]
        error = (actual.float() - expected.float()).abs().max()
        assert error <= tolerance * expected.float().abs().max().clamp_min(1.0)


@pytest.mark.parametrize("seed", seeds(8, 24))
def test_int4_dot(seed):
    # A checkpoint's scales are of a 16-bit type, and tensor cores get them in one.
    w, dtype = random_case(seed, torch.bfloat16)
    tokens = random.choice([3, 16, 21, 40])
    x = randn(tokens, w.num_inputs, dtype=dtype) * 0.2
    bias = randn(len(w.packed), dtype=dtype) if seed % 2 else None
    config = int4.DotConfig(random.choice([16, 32]), 64, random.choice([1, 2, 3]), 4, 2)
    expected = int4.int4_linear_naive(x, w, bias)
    for _ in range(2):  # the second time it finds the counters as the first one left them
        assert_close(int4.int4_dot_triton(x, w, bias, config), expected)


@pytest.mark.parametrize("seed", seeds(4, 12))
def test_int4_dequantize(seed):
    w, dtype = random_case(seed)
    expected = dequantize_int4_naive(w, dtype)
    assert_close(int4.dequantize_int4_triton(w, dtype), expected)
    assert_close(int4.dequantize_int4_triton(w, dtype, 2, 2), expected)


@pytest.mark.parametrize("tokens", [1, 7, 33, 300])
def test_int4_linear_chooses_a_way_for_any_number_of_tokens(tokens):
    torch.manual_seed(tokens)
    w = random_int4(72, 192, 64)
    x = randn(tokens, 192, dtype=DTYPES[0]) * 0.2
    assert_close(int4.int4_linear(x, w), int4.int4_linear_naive(x, w))
    if tokens <= 33:
        assert_close(int4.int4_dot_triton(x, w), int4.int4_linear_naive(x, w))


FORMATS = [torch.int8, torch.float8_e4m3fn] if GPU else [torch.int8]  # the interpreter has no FP8


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("seed", seeds(4, 8))
def test_tokens_are_quantized_as_by_torch(seed, format):
    torch.manual_seed(seed)
    x = randn(5, 96 + 100 * seed, dtype=DTYPES[seed % 2])
    x[2] = 0
    q, scales = quant_tokens.quantize_tokens_triton(x, format)
    q_naive, scales_naive = quant_tokens.quantize_tokens_naive(x, format)
    torch.testing.assert_close(scales, scales_naive)
    difference = (q.float() - q_naive.float()).abs()
    assert (difference > 0).float().mean() < 0.01  # a division rounded otherwise, at a tie
    assert difference.max() <= (1 if format == torch.int8 else 32)
    error = q.float() * scales[:, None] - x.float()
    assert (error.abs() <= scales[:, None] * (0.51 if format == torch.int8 else 17)).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("seed", seeds(4, 8))
def test_norm_and_gate_quantize_as_if_apart(seed, format):
    torch.manual_seed(seed)
    dtype = DTYPES[seed % 2]
    x, weight = randn(5, 96 + 100 * seed, dtype=dtype), randn(96 + 100 * seed, dtype=dtype)
    residual = randn(*x.shape, dtype=dtype) if seed % 3 else None
    # A bfloat16 that is rounded otherwise before it is quantized may be the largest one, too.
    ulp = 2**-8 if dtype == torch.bfloat16 else 0.0
    normed = quant_tokens.norm_and_quantize(x, residual, weight, 1e-5, format)
    expected = quant_tokens.norm_and_quantize_naive(x, residual, weight, 1e-5, format)
    assert_close(normed[2], expected[2])
    gated = quant_tokens.silu_and_quantize(x, format)
    for (q, scales, *_), (q_naive, scales_naive, *_) in (
        (normed, expected),
        (gated, quant_tokens.silu_and_quantize_naive(x, format)),
    ):
        torch.testing.assert_close(scales, scales_naive, rtol=1e-2, atol=0)
        error = q.float() * scales[:, None] - q_naive.float() * scales_naive[:, None]
        step = 1.1 + 2 * ulp * 127 if format == torch.int8 else 33
        assert (error.abs() <= step * scales_naive[:, None]).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("seed", seeds(10, 20))
def test_8_bit_products_of_one_token(seed, format):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    n, k, dtype = rng.choice([16, 74]), rng.choice([64, 112, 352, 1376]), rng.choice(DTYPES)
    weight, scales = quantize_tokens(randn(n, k, dtype=torch.float32), format)
    x, around = random_surroundings(rng, rng.choice([0, 1, 2]), n, k, dtype)
    expected = w8a8_fused_linear_naive(x, weight, scales, *around)
    for config in (
        None,
        OneTokenConfig(rng.choice([1, 2, 4]), rng.choice([1, 2]), rng.choice([1, 2])),
    ):
        actual = w8a8_fused_linear_triton(x, weight, scales, *around, config)
        # What is near a tie may be rounded otherwise.
        error = (actual[0].float() - expected[0].float()).abs()
        assert (error <= 0.03 * expected[0].float().abs().max()).all() if len(x) else True
        assert_close(actual[1], expected[1])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("seed", seeds(6, 16))
def test_8_bit_products(seed, format):
    random.seed(seed)
    torch.manual_seed(seed)
    tokens, n, k = random.choice([1, 9, 33]), random.choice([16, 72, 160]), 32 * (1 + seed)
    x_q, x_scales = quantize_tokens(randn(tokens, k, dtype=torch.float32), format)
    w_q, w_scales = quantize_tokens(randn(n, k, dtype=torch.float32), format)
    bias = randn(n, dtype=DTYPES[0]) if seed % 2 else None
    arguments = (x_q, x_scales, w_q, w_scales, DTYPES[0], bias)
    expected = w8a8.scaled_matmul_naive(*arguments)
    tolerance = {"rtol": 1e-2, "atol": 0.03} if GPU else {"rtol": 1e-5, "atol": 1e-4}
    for splits in (1, 2, 3):
        config = w8a8.W8A8Config(16, 64, 64, splits, 4, 2)
        out = w8a8.scaled_matmul_triton(*arguments, config)
        torch.testing.assert_close(out, expected, **tolerance)
    torch.testing.assert_close(w8a8.scaled_matmul_triton(*arguments), expected, **tolerance)


@pytest.mark.skipif(not GPU, reason="torch's FP8 product needs a GPU")
def test_8_bit_products_of_the_library():
    torch.manual_seed(0)
    format = torch.float8_e4m3fn
    x, w = randn(140, 256, dtype=torch.bfloat16), randn(96, 256, dtype=torch.float32)
    w_q, w_scales = quantize_tokens(w, format)
    expected = x.float() @ w.t()
    out = w8a8.scaled_matmul(*quantize_tokens(x, format), w_q, w_scales, x.dtype)
    error = (out.float() - expected).pow(2).mean().sqrt() / expected.std()
    assert error < 0.06
