"""RMSNorm, SwiGLU's gate, and RoPE with the KV cache write, against their naive twins."""

import random

import pytest
import torch

from sglang.kernels.activation import silu_and_mul_naive, silu_and_mul_triton
from sglang.kernels.norm import (
    add_rms_norm_naive,
    add_rms_norm_triton,
    rms_norm_naive,
    rms_norm_triton,
)
from sglang.kernels.rope import rope_and_write_kv_naive, rope_and_write_kv_triton
from sglang.kernels.row_scale import RowScale

from .common import DEVICE, DTYPES, GPU, assert_close, int32, randn, seeds

TOKENS = [0, 1, 3, 300] if GPU else [0, 1, 3]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("hidden", [64, 100, 576, 4096])
def test_norms_agree_with_torch(tokens: int, hidden: int, dtype: torch.dtype) -> None:
    torch.manual_seed(hidden)
    x = randn(tokens, hidden + 8, dtype=dtype)[:, :hidden]  # rows with a gap between them
    residual, weight = randn(tokens, hidden, dtype=dtype), randn(hidden, dtype=dtype)
    assert_close(rms_norm_triton(x, weight, 1e-5), rms_norm_naive(x, weight, 1e-5))
    got = add_rms_norm_triton(x, residual, weight, 1e-5)
    for actual, expected in zip(got, add_rms_norm_naive(x, residual, weight, 1e-5), strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("inner", [8, 100, 1536, 3000])
def test_silu_and_mul_agrees_with_torch(tokens: int, inner: int, dtype: torch.dtype) -> None:
    x = randn(tokens, 2 * inner, dtype=dtype) * 3
    # The twin rounds between its two steps.
    expected = silu_and_mul_naive(x.float()).to(dtype)
    assert_close(silu_and_mul_triton(x), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [64, 100, 576, 4096])
def test_outputs_are_scaled_by_the_norm_of_their_tokens(inputs: int, dtype: torch.dtype) -> None:
    torch.manual_seed(inputs)
    scale = RowScale(randn(5, inputs + 8, dtype=dtype)[:, :inputs] * 3, 1e-5)
    out = randn(5, 200, dtype=dtype) * 3
    expected = silu_and_mul_naive(out.float(), scale).to(dtype)
    assert_close(silu_and_mul_triton(out, scale), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", seeds(20, 30))
def test_rope_turns_q_and_k_and_writes_only_named_slots(seed: int, dtype: torch.dtype) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    tokens = rng.choice([1, 2, 7, 200] if GPU else [1, 2, 7])
    kv_heads, group, dim = rng.choice([1, 2, 8]), rng.choice([1, 3, 4]), rng.choice([64, 80, 128])
    normed, num_slots, eps = rng.random() < 0.5, 256, 1e-6
    qkv = randn(tokens, kv_heads * (group + 2) * dim, dtype=dtype)
    slots = torch.randperm(num_slots, device=DEVICE)[:tokens].int()
    slots[torch.rand(tokens, device=DEVICE) < 0.3] = -1
    positions = torch.randint(0, 50, (tokens,), device=DEVICE).int()
    angles = torch.rand(50, dim // 2, device=DEVICE) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
    weights = [randn(dim, dtype=dtype) if normed else None for _ in range(2)]
    before = randn(2, num_slots, kv_heads, dim, dtype=dtype)
    caches, expected_caches = before.clone(), before.clone()
    scale = rng.choice([None, RowScale(randn(tokens, 96, dtype=dtype) * 2, 1e-5)])
    rest = (kv_heads * group, kv_heads, *weights, eps, scale)

    expected = qkv.clone()

    block_kv = rng.choice([None, 2, 8])  # as few tokens have it, and many; beyond the heads too
    rope_and_write_kv_triton(qkv, positions, slots, cos_sin, *caches, *rest, block_kv)

    rope_and_write_kv_naive(expected, positions, slots, cos_sin, *expected_caches, *rest)
    assert_close(qkv, expected)
    assert_close(caches, expected_caches)
    untouched = torch.ones(num_slots, dtype=torch.bool, device=DEVICE)
    untouched[slots[slots >= 0].long()] = False
    assert torch.equal(caches[:, untouched], before[:, untouched])


def test_rope_at_position_zero_changes_nothing() -> None:
    qkv = randn(1, 4 * 64, dtype=torch.float32)
    cos_sin = torch.cat((torch.ones(1, 32), torch.zeros(1, 32)), -1).to(DEVICE)
    k, v = torch.zeros(2, 5, 1, 64, device=DEVICE)
    before = qkv.clone()
    rope_and_write_kv_triton(qkv, int32([0]), int32([3]), cos_sin, k, v, 2, 1)
    torch.testing.assert_close(qkv, before)
    torch.testing.assert_close(torch.cat((k[3], v[3])).flatten(), before[0, 2 * 64 :])


def test_a_cache_of_8_bit_floats_saturates() -> None:
    # Values that it can hold, as the interpreter rounds others wrongly, and some beyond.
    qkv = (randn(3, 4 * 64, dtype=torch.float16) * 100).to(torch.float8_e4m3fn).half()
    qkv[:, ::9] = 1000
    qkv[:, 5::9] = -60000
    cos_sin = torch.cat((torch.ones(1, 32), torch.zeros(1, 32)), -1).to(DEVICE)
    caches = torch.zeros(2, 5, 1, 64, device=DEVICE).to(torch.float8_e4m3fn)
    naive = caches.clone()
    rest = (int32([0, 0, 0]), int32([3, -1, 1]), cos_sin)
    rope_and_write_kv_triton(qkv, *rest, *caches, 2, 1)
    rope_and_write_kv_naive(qkv, *rest, *naive, 2, 1)
    assert torch.equal(caches.float(), naive.float())
    values = qkv[[0, 2], 192:].float().clamp(-448, 448)
    assert torch.equal(naive[1, [3, 1], 0].float(), values)
