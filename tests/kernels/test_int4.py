"""The tensor cores' product with 4-bit weights against its naive twin."""

from __future__ import annotations

import random

import pytest
import torch

from sglang.kernels import int4
from sglang.kernels.int4_weight import Int4Weight
from tests.kernels.common import DEVICE, DTYPES, assert_close, randn, random_int4, seeds


def random_weight(n: int, k: int, group: int) -> Int4Weight:
    # A checkpoint's scales are of a 16-bit type, and tensor cores get them in one.
    return random_int4(n, k, group, torch.bfloat16)


def random_config(rng: random.Random) -> int4.DotConfig:
    block_m, block_n = rng.choice([(16, 64), (64, 64), (32, 128), (256, 64)])
    return int4.DotConfig(block_m, block_n, rng.choice([1, 1, 2, 3]), 4, 2)


@pytest.mark.parametrize("seed", seeds(10, 24))
def test_product_of_any_shape_and_group(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    k = rng.choice([96, 128, 160, 256, 320])
    group = rng.choice([g for g in (32, 64, 96, 128, k) if g <= k])
    n, tokens, dtype = rng.choice([1, 17, 64, 131]), rng.choice([1, 9, 40, 130]), rng.choice(DTYPES)
    w = random_weight(n, k, group)
    x = randn(tokens, k, dtype=dtype) * 0.2
    bias = randn(n, dtype=dtype) if rng.random() < 0.5 else None
    actual = int4.int4_dot_triton(x, w, bias, random_config(rng))
    assert_close(actual, int4.int4_linear_naive(x, w, bias))


@pytest.mark.parametrize("group", [32, 64, 128])
def test_product_with_the_identity_is_the_weight(group):
    torch.manual_seed(group)
    w = random_weight(40, 128, group)
    x = torch.eye(128, dtype=DTYPES[0], device=DEVICE)
    assert_close(int4.int4_dot_triton(x, w), int4.int4_linear_naive(x, w))


@pytest.mark.parametrize("gap, first", [(8, 0), (8, 3), (5, 0)])
def test_rows_of_the_input_lie_anywhere(gap, first):
    torch.manual_seed(gap + first)
    w = random_weight(24, 128, 64)
    x = randn(20, 128 + gap, dtype=DTYPES[0])[:, first : first + 128] * 0.2
    assert_close(int4.int4_dot_triton(x, w), int4.int4_linear_naive(x, w))
