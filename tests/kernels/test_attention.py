"""Decode and extend attention against their naive twins, over random shapes."""

import itertools
import random
from collections.abc import Sequence

import pytest
import torch

from sglang.kernels.decode_attention import (
    decode_attention,
    decode_attention_naive,
    decode_attention_triton,
)
from sglang.kernels.decode_shares import DecodeConfig
from sglang.kernels.extend_attention import (
    ExtendConfig,
    extend_attention_naive,
    extend_attention_triton,
    extend_config,
)

from .common import DEVICE, DTYPES, GPU, assert_close, int32, randn, seeds

HEAD_DIMS = [64, 80, 128, 256]


class Cache:
    """n rows of at most max_len tokens, whose slots are scattered over the cache."""

    def __init__(self, rows: int, max_len: int, kv_heads: int, dim: int, dtype: torch.dtype):
        self.k, self.v = randn(2, rows * max_len, kv_heads, dim, dtype=dtype)
        self.table = torch.randperm(rows * max_len, device=DEVICE).int().view(rows, max_len)
        self.rows = torch.randperm(rows, device=DEVICE).int()

    def args(self) -> tuple[torch.Tensor, ...]:
        return self.k, self.v, self.table, self.rows


def qkv(tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> Sequence:
    """q, k and v as the model has them: parts of one tensor."""
    return randn(tokens, heads + 2 * kv_heads, dim, dtype=dtype).split(
        (heads, kv_heads, kv_heads), 1
    )


@pytest.mark.parametrize("seed", seeds(50, 24))
def test_decode_agrees_with_its_twin(seed: int) -> None:
    rng = random.Random(seed)
    dtype = rng.choice(DTYPES)
    torch.manual_seed(seed)
    n = rng.choice([1, 5, 33] if GPU else [1, 3])
    max_len = rng.choice([300, 5000] if GPU else [150, 300])
    kv_heads, group = rng.choice([1, 2]), rng.choice([1, 2, 3, 5, 8, 20])
    dim, window = rng.choice(HEAD_DIMS), rng.choice([0, 0, 1, 70, 1000])
    lens = int32([rng.choice([0, 1, 2, 63, 64, 65, rng.randint(1, max_len)]) for _ in range(n)])
    cache = Cache(n, max_len, kv_heads, dim, dtype)
    q = randn(n, kv_heads * group, dim, dtype=dtype)
    # Programs with a part of a row each, or with many rows.
    programs, least = rng.choice([1, 4, 10, 2048]), rng.choice([32, 64, 256])
    parts = rng.choice([4, 16])
    configs = [DecodeConfig(rng.choice([32, 64]), 4, 2, programs, least, max_parts=parts)]
    if GPU:
        configs.append(None)
    expected = decode_attention_naive(q, *cache.args(), lens, dim**-0.5, window)
    for config in configs:
        out = torch.zeros_like(q)
        decode_attention_triton(q, *cache.args(), lens, dim**-0.5, window, config, out)
        assert_close(out, expected)


@pytest.mark.parametrize("seed", seeds(16, 16))
def test_decode_without_tensor_cores_agrees_with_its_twin(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    n, heads, dim = rng.choice([1, 3, 17 if GPU else 5]), rng.choice([1, 2]), rng.choice([64, 128])
    parts, block_n, warps = rng.choice([4, 16]), *rng.choice([(16, 1), (32, 2)])
    longest, window = 1500 if GPU else 200, 0
    if seed % 4 == 0:  # rows of about one length: a program has one
        shortest, block_n, programs = longest * 4 // 5, 16, n * heads
    else:
        longest, window = rng.choice([20, longest]), rng.choice([0, 0, 1, 70])
        shortest, programs = 0, rng.choice([1, 10, 2048])
    lens = int32(sorted((rng.randint(shortest, longest) for _ in range(n)), reverse=True))
    cache = Cache(n, longest, heads, dim, torch.float16)
    cache.k, cache.v = (x.to(torch.float8_e4m3fn) for x in (cache.k, cache.v))
    args = (randn(n, heads, dim, dtype=rng.choice(DTYPES)), *cache.args(), lens, 0.3, window)
    configs = [DecodeConfig(block_n, warps, 3, programs, 32, max_parts=parts, dots=False)]
    if GPU:
        configs.append(None)
    expected = decode_attention_naive(*args)
    for config in configs:
        assert_close(decode_attention_triton(*args, config, torch.zeros_like(args[0])), expected)


def test_a_program_may_have_many_rows() -> None:
    rng, n, dtype = random.Random(0), 1000 if GPU else 260, DTYPES[0]
    cache, q = Cache(n, 40, 1, 64, dtype), randn(n, 2, 64, dtype=dtype)
    args = (*cache.args(), int32([rng.randint(0, 40) for _ in range(n)]), 0.125, 0)
    config = DecodeConfig(64, 4, 2, 3)
    out = decode_attention_triton(q, *args, config, torch.zeros_like(q))
    assert_close(out, decode_attention_naive(q, *args))


@pytest.mark.parametrize("seed", seeds(50, 24))
def test_extend_agrees_with_its_twin(seed: int) -> None:
    rng = random.Random(seed)
    dtype = rng.choice(DTYPES)
    torch.manual_seed(seed)
    n = rng.choice([1, 2, 9] if GPU else [1, 2])
    longest, longest_prefix = (700, 3000) if GPU else (70, 90)
    kv_heads, group = rng.choice([1, 2]), rng.choice([1, 2, 3, 8 if GPU else 5])
    dim, window = rng.choice(HEAD_DIMS), rng.choice([0, 0, 1, 40, 1000])
    news = [rng.choice([1, 2, 16, 33, rng.randint(1, longest)]) for _ in range(n)]
    prefixes = [rng.choice([0, 0, 1, 64, rng.randint(1, longest_prefix)]) for _ in range(n)]
    lens = int32([new + prefix for new, prefix in zip(news, prefixes, strict=True)])
    cache = Cache(n, longest + longest_prefix, kv_heads, dim, dtype)
    new = qkv(sum(news), kv_heads * group, kv_heads, dim, dtype)
    starts = torch.nn.functional.pad(int32(news).cumsum(0), (1, 0)).int()
    args = (*new, *cache.args(), starts, lens, dim**-0.5, window, max(news))
    splits = rng.choice([(1, 512), (4, 32), (8, 64)])
    configs = [ExtendConfig(rng.choice([16, 32, 64]), 32, 4, 2, rng.random() < 0.5, *splits)]
    if GPU:
        configs.append(None)
    expected = extend_attention_naive(*args)
    for config in configs:
        assert_close(extend_attention_triton(*args, config), expected)


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("max_q_len", [1, 16, 100, 128, 2000])
def test_chosen_extend_tiles_are_ones_that_tensor_cores_take(max_q_len: int, dim: int) -> None:
    for group, dtype in itertools.product((1, 2, 7, 8), (torch.float32, torch.bfloat16)):
        config = extend_config(max_q_len, max_q_len, group, dim, dtype)
        assert config.block_m in (16, 32, 64, 128)
        assert config.block_n in (32, 64, 128)


def test_rows_of_length_zero_are_left_as_they_were_and_leave_the_others_alone() -> None:
    dtype = DTYPES[0]
    cache = Cache(3, 100, 2, 64, dtype)
    q, k, v = qkv(3, 4, 2, 64, dtype)
    out = torch.full(q.shape, 7.0, dtype=dtype, device=DEVICE)
    config = DecodeConfig(32, 4, 2, 40, 32)
    full = decode_attention_triton(q, *cache.args(), int32([70, 5, 100]), 0.1, 0, config)
    some = decode_attention_triton(q, *cache.args(), int32([70, 0, 100]), 0.1, 0, config, out)
    assert (some[1] == 7).all()
    assert torch.equal(some[[0, 2]], full[[0, 2]])

    starts, lens = int32([0, 1, 2, 3]), int32([70, 0, 100])
    tile = ExtendConfig(16, 32, 4, 2, pack=False)
    args = (q, k, v, *cache.args(), starts, lens, 0.1, 0, 1)
    some = extend_attention_triton(*args, tile, torch.full_like(out, 7.0))
    assert (some[1] == 7).all()
    assert_close(some, extend_attention_naive(*args, out=torch.full_like(out, 7.0)))


def test_what_lies_past_the_end_of_a_row_is_never_read() -> None:
    dtype = DTYPES[0]
    cache = Cache(1, 100, 1, 64, dtype)
    unused = cache.table[0, 41:].long()
    cache.k[unused] = cache.v[unused] = float("nan")
    q = randn(1, 2, 64, dtype=dtype)
    args = (*cache.args(), int32([41]), 0.1, 0)
    out = decode_attention_triton(q, *args, DecodeConfig(32, 4, 2, 40, 32))
    assert_close(out, decode_attention_naive(q, *args))
    single = (q[:, :1], *(x.to(torch.float8_e4m3fn) for x in args[:2]), *args[2:])
    summed = decode_attention_triton(*single, DecodeConfig(32, 2, 3, 40, 32, dots=False))
    assert_close(summed, decode_attention_naive(*single))
    starts, lens = int32([0, 1]), int32([41])
    tile = ExtendConfig(16, 32, 4, 2, pack=True)
    k, v = (x[cache.table[0, 40:41].long()] for x in (cache.k, cache.v))
    extended = extend_attention_triton(q, k, v, *cache.args(), starts, lens, 0.1, 0, 1, tile)
    assert_close(extended, out)


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
def test_a_captured_decode_follows_what_changes_on_the_device() -> None:
    cache = Cache(4, 3000, 2, 128, torch.bfloat16)
    q, lens = randn(4, 8, 128, dtype=torch.bfloat16), int32([1, 1, 0, 1])
    args = (q, *cache.args(), lens, 0.1, 0)
    out = decode_attention(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode_attention(*args, out)
    for new_lens in ([3000, 17, 5, 0], [1, 1000, 257, 256]):
        lens.copy_(int32(new_lens))
        out.zero_()
        graph.replay()
        assert_close(out, decode_attention_naive(*args))


@pytest.mark.parametrize("window", [0, 20])
def test_a_cache_of_8_bit_floats_is_read_as_what_it_holds(window: int) -> None:
    torch.manual_seed(0)
    dtype = torch.float16
    cache = Cache(2, 100, 2, 64, dtype)
    cache.k, cache.v = (x.to(torch.float8_e4m3fn) for x in (cache.k, cache.v))
    q, lens = randn(5, 4, 64, dtype=dtype), int32([70, 100])
    small = (q[:2], *cache.args(), lens, 0.1, window)
    config = DecodeConfig(32, 4, 2, 40, 32)
    assert_close(decode_attention_triton(*small, config), decode_attention_naive(*small))
    new = qkv(5, 4, 2, 64, dtype)
    large = (*new, *cache.args(), int32([0, 2, 5]), lens, 0.1, window, 3)
    tile = ExtendConfig(16, 32, 4, 2, pack=True)
    assert_close(extend_attention_triton(*large, tile), extend_attention_naive(*large))
    cache.k, cache.v = cache.k.to(dtype), cache.v.to(dtype)
    same = (q[:2], *cache.args(), lens, 0.1, window)
    assert torch.equal(decode_attention_naive(*same), decode_attention_naive(*small))
