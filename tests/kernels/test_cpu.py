"""The CPU's kernels in C++, against their plain twins."""

import random

import pytest
import torch

from sglang.kernels import cpu
from sglang.kernels.activation import silu_and_mul_naive
from sglang.kernels.decode_attention import decode_attention_naive
from sglang.kernels.norm import add_rms_norm_naive, rms_norm_naive
from sglang.kernels.rope import rope_and_write_kv_naive
from sglang.layers.rope import cos_sin_table

needs_compiler = pytest.mark.skipif(cpu.library() is None, reason="needs a C++ compiler")
CPU = torch.device("cpu")


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("seed", range(12))
def test_products_are_those_of_the_dequantized_weights(bits: int, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    tokens, n = rng.randint(1, 17), rng.randint(1, 150)
    group = rng.choice([32, 64, 128])
    k = group * rng.randint(1, 10)
    q = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)
    scales, low = (torch.randn(n, k // group).half() for _ in range(2))
    weight = q.view(n, -1, group) * scales.double()[:, :, None] + low.double()[:, :, None]
    x, bias = torch.randn(tokens, k), torch.randn(n) if seed % 2 else None
    x[:, : k // 2] *= 0.0 if seed % 3 == 0 else 1e-20 if seed % 3 == 1 else 1e10
    blocks = cpu.pack_blocks(q, scales.float(), low.float(), bits)
    in_blocks = n + -n % cpu.LANES
    assert blocks.data.nbytes == in_blocks * k // 32 * (4 * bits + 4)
    expected = x.double() @ weight.flatten(1).t() + (0.0 if bias is None else bias)
    error = cpu.linear(x, blocks, bias) - expected
    assert error.norm() < 5e-5 * expected.norm()


def test_what_does_not_fit_blocks_is_not_packed() -> None:
    def packed(k: int, groups: int) -> object:
        scales = torch.ones(3, groups)
        return cpu.pack_blocks(torch.zeros(3, k, dtype=torch.uint8), scales, scales, 4)

    assert packed(96, 3) is not None
    assert packed(64, 4) is None
    assert packed(80, 2) is None


@needs_compiler
@pytest.mark.parametrize("tokens", [0, 1, 7, 40])
@pytest.mark.parametrize("size", [8, 576])
def test_norms_and_swiglu_agree_with_torch(tokens: int, size: int) -> None:
    torch.manual_seed(size)
    x, residual, weight = torch.randn(tokens, size), torch.randn(tokens, size), torch.randn(size)
    normed, same = cpu.rms_norm(x, None, weight, 1e-5)
    assert same is x
    assert_close(normed, rms_norm_naive(x, weight, 1e-5))
    got = cpu.rms_norm(x, residual, weight, 1e-5)
    for actual, expected in zip(got, add_rms_norm_naive(x, residual, weight, 1e-5), strict=True):
        assert_close(actual, expected)
    gates = 50 * torch.randn(tokens, 2 * size)  # where exponentials end, too
    assert_close(cpu.silu_and_mul(gates), silu_and_mul_naive(gates))


@needs_compiler
@pytest.mark.parametrize("seed", range(8))
def test_rope_and_decode_attention_agree_with_their_twins(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    num_slots, max_len, n, dim = 900, 300, rng.randint(1, 20), rng.choice([32, 64, 96, 128])
    kv_heads, group, window = rng.randint(1, 3), rng.randint(1, 4), rng.choice([0, 0, 1, 50])
    heads = kv_heads * group
    caches = [torch.randn(num_slots, kv_heads, dim) for _ in range(2)]
    expected_caches = [cache.clone() for cache in caches]
    qkv = torch.randn(n, (heads + 2 * kv_heads) * dim)
    expected = qkv.clone()
    lens = torch.tensor([rng.choice([0, 1, rng.randint(2, max_len)]) for _ in range(n)]).int()
    slots = torch.where(lens > 0, torch.randperm(num_slots)[:n].int(), -1)
    positions = (lens - 1).clamp(min=0)
    table = cos_sin_table(dim, max_len, 1e4, None, CPU)
    cpu.rope_and_write_kv(qkv, positions, slots, table, *caches, heads, kv_heads)
    rope_and_write_kv_naive(expected, positions, slots, table, *expected_caches, heads, kv_heads)
    assert_close(qkv, expected)
    for actual, wanted in zip(caches, expected_caches, strict=True):
        assert_close(actual, wanted)

    q = qkv[:, : heads * dim].view(n, heads, dim)
    slot_table = torch.randint(num_slots, (n + 3, max_len), dtype=torch.int32)
    where = (slot_table, torch.randperm(n + 3)[:n].int(), lens, dim**-0.5, window)
    out, wanted = torch.full((2, n, heads, dim), 7.0)
    decode_attention_naive(q, *caches, *where, out=wanted)
    before = torch.get_num_threads()
    try:
        for threads in (1, n + 1, n * kv_heads + 1):  # as these are many, tasks have fewer heads
            torch.set_num_threads(threads)
            cpu.decode_attention(q, *caches, *where, out.fill_(7.0))
            assert_close(out, wanted)
    finally:
        torch.set_num_threads(before)


def test_without_a_compiler_there_are_no_kernels(monkeypatch, caplog) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    cpu.library.cache_clear()
    try:
        assert not cpu.takes(torch.randn(1, 64))
        assert "no C++ compiler" in caplog.text
    finally:
        cpu.library.cache_clear()


@needs_compiler
def test_a_compiler_that_fails_is_told_of_and_leaves_nothing(monkeypatch, caplog, tmp_path) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\n[ $1 = --version ] || { echo cannot do that >&2; exit 1; }\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("SGLANG_CACHE_DIR", str(tmp_path / "cache"))
    cpu.library.cache_clear()
    try:
        assert not cpu.takes(torch.randn(1, 64))
        assert "cannot do that" in caplog.text
        assert not list((tmp_path / "cache" / "kernels").iterdir())
    finally:
        cpu.library.cache_clear()
