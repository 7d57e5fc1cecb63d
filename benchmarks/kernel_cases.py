"""The cases of benchmarks/kernels.py: data, calls, and what each call moves and computes.

A case is a function of a shape that makes the data and returns two functions: the first times our
kernel, by default with the configuration that it would choose itself; the second flashinfer's.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F

from sglang.kernels import (
    activation,
    decode_attention,
    extend_attention,
    gemv,
    norm,
    rope,
    sampling,
)

Call = Callable[[], object]
Timed = tuple[str, list[Call], float, float]
"""What was run, calls over different data, bytes and floating-point operations of one call."""

DTYPE = torch.bfloat16
COLD_BYTES = 256 << 20
MAX_COPIES = 64
FP8 = torch.float8_e4m3fn
"""Of a KV cache."""


def copies(bytes_each: float) -> int:
    """How many sets of data to rotate over, so that none is still in the L2."""
    return int(min(max(COLD_BYTES // max(bytes_each, 1) + 1, 2), MAX_COPIES))


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=DTYPE, device="cuda")


def int32(values: object) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.int32, device="cuda")


class PagedKV:
    """Rows of one length each, or of all lengths up to twice that, in a cache whose slots are
    shuffled."""

    def __init__(
        self,
        batch: int,
        kv_len: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = DTYPE,
        mixed: bool = False,
    ) -> None:
        lens = [kv_len] * batch
        if mixed:
            lens = [2 * kv_len * (i + 1) // batch for i in range(batch)]
            random.Random(0).shuffle(lens)
            kv_len *= 2
        each = sum(lens) * kv_heads * head_dim * 2 * dtype.itemsize
        self.sets = copies(each)
        rows = batch * self.sets
        self.k, self.v = randn(2, rows * kv_len, kv_heads, head_dim).to(dtype)
        self.table = torch.randperm(rows * kv_len, device="cuda").int().view(rows, kv_len)
        self.rows = torch.arange(rows, device="cuda").int().view(self.sets, batch)
        self.lens = int32(lens)
        self.bytes = each


def decode_case(
    batch: int,
    kv_len: int,
    q_heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype = DTYPE,
    mixed: bool = False,
):
    kv = PagedKV(batch, kv_len, kv_heads, dim, dtype, mixed)
    q = randn(batch, q_heads, dim)

    def timed(name: str, config=None) -> Timed:
        def call(rows):
            return lambda: decode_attention.decode_attention_triton(
                q, kv.k, kv.v, kv.table, rows, kv.lens, dim**-0.5, config=config
            )

        return name, [call(rows) for rows in kv.rows], kv.bytes + 2 * q.nbytes, 0

    def flashinfer_timed(flashinfer) -> Timed:
        calls = []
        workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        for rows in kv.rows[:8]:
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                workspace, "NHD", use_tensor_cores=q_heads > kv_heads
            )
            wrapper.plan(
                int32(range(0, (batch + 1) * kv_len, kv_len)), kv.table[rows.long()].flatten(),
                int32([1] * batch), q_heads, kv_heads, dim, 1, q_data_type=DTYPE,
                kv_data_type=dtype,
            )  # fmt: skip
            cache = (kv.k.unsqueeze(1), kv.v.unsqueeze(1))
            calls.append(lambda wrapper=wrapper, cache=cache: wrapper.run(q, cache))
        return "flashinfer", calls, kv.bytes + 2 * q.nbytes, 0

    return timed, flashinfer_timed


def extend_case(new: int, prefix: int, q_heads: int, kv_heads: int, dim: int, batch: int = 1):
    kv = PagedKV(batch, new + prefix, kv_heads, dim)
    heads = (q_heads, kv_heads, kv_heads)
    q, k, v = randn(batch * new, sum(heads), dim).split(heads, 1)
    starts = int32(range(0, (batch + 1) * new, new))
    flops = 4 * batch * q_heads * dim * (new * prefix + new * (new + 1) / 2)

    def timed(name: str, config=None) -> Timed:
        def call(rows):
            return lambda: extend_attention.extend_attention_triton(
                q, k, v, kv.k, kv.v, kv.table, rows, starts, kv.lens, dim**-0.5, 0, new, config
            )

        return name, [call(rows) for rows in kv.rows[:4]], kv.bytes + 2 * q.nbytes, flops

    def flashinfer_timed(flashinfer) -> Timed:
        workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        kv_len = new + prefix
        wrapper.plan(
            starts, int32(range(0, (batch + 1) * kv_len, kv_len)),
            kv.table[kv.rows[0].long()].flatten(), int32([1] * batch), q_heads, kv_heads, dim, 1,
            causal=True, q_data_type=DTYPE, kv_data_type=DTYPE,
        )  # fmt: skip
        cache = (kv.k.unsqueeze(1), kv.v.unsqueeze(1))
        query = q.contiguous()
        return "flashinfer", [lambda: wrapper.run(query, cache)] * 4, kv.bytes + 2 * q.nbytes, flops

    return timed, flashinfer_timed


def norm_case(tokens: int, hidden: int):
    each = 4 * tokens * hidden * DTYPE.itemsize
    sets = copies(each)
    x, residual, weight = randn(sets, tokens, hidden), randn(sets, tokens, hidden), randn(hidden)
    out = torch.empty(2, tokens, hidden, dtype=DTYPE, device="cuda")

    def timed(name: str, num_warps: int | None = None) -> Timed:
        def call(i: int):
            return lambda: norm._launch(
                x[i], residual[i], weight, out[0], out[1], 1e-6, num_warps=num_warps
            )

        return name, [call(i) for i in range(sets)], each, 0

    def flashinfer_timed(flashinfer) -> Timed:
        run = flashinfer.fused_add_rmsnorm
        calls = [lambda i=i: run(x[i], residual[i], weight, 1e-6) for i in range(sets)]
        return "flashinfer", calls, each, 0

    return timed, flashinfer_timed


def rope_case(tokens: int, q_heads: int, kv_heads: int, dim: int):
    width = (q_heads + 2 * kv_heads) * dim
    each = 2 * tokens * width * DTYPE.itemsize
    sets = copies(each)
    qkv = randn(sets, tokens, width)
    k, v = randn(2, max(65536, tokens), kv_heads, dim)
    cos_sin = torch.randn(32768, dim, device="cuda")
    positions = torch.randint(0, 32768, (tokens,), device="cuda").int()
    slots = torch.randperm(len(k), device="cuda")[:tokens].int()
    weight = randn(dim)

    def timed(name: str, block_kv: int | None = None, num_warps: int = 1) -> Timed:
        def call(i: int):
            return lambda: rope.rope_and_write_kv_triton(
                qkv[i], positions, slots, cos_sin, k, v, q_heads, kv_heads, weight, weight, 1e-6,
                None, block_kv, num_warps,
            )  # fmt: skip

        return name, [call(i) for i in range(sets)], each, 0

    return timed, None


def silu_case(tokens: int, inner: int):
    each = 3 * tokens * inner * DTYPE.itemsize
    x = randn(copies(each), tokens, 2 * inner)

    def timed(name: str, block: int = 1024, num_warps: int = 4) -> Timed:
        calls = [lambda i=i: activation.silu_and_mul_triton(i, None, block, num_warps) for i in x]
        return name, calls, each, 0

    def flashinfer_timed(flashinfer) -> Timed:
        return "flashinfer", [lambda i=i: flashinfer.silu_and_mul(i) for i in x], each, 0

    return timed, flashinfer_timed


def gemv_case(outputs: int, inputs: int, tokens: int, kind: str):
    """kind: "plain", "norm" (with residual) or "gated" (that, and SwiGLU)."""
    each = outputs * inputs * DTYPE.itemsize
    weights = [randn(outputs, inputs) / inputs**0.5 for _ in range(copies(each))]
    x, residual, norm_weight = randn(tokens, inputs), randn(tokens, inputs), randn(inputs)
    rest = (None, None, None, 0.0, False)
    if kind != "plain":
        rest = (None, residual, norm_weight, 1e-6, kind == "gated")

    def timed(name: str, config=None) -> Timed:
        return (
            name,
            [lambda w=w: gemv.fused_linear_triton(x, w, *rest, config) for w in weights],
            each,
            0,
        )

    def cublas_timed(_) -> Timed:
        return "cuBLAS alone", [lambda w=w: F.linear(x, w) for w in weights], each, 0

    return timed, cublas_timed


def sampling_case(rows: int, kind: str, vocab: int = 151936):
    """Logits as a model's are: most of the mass on a few tokens."""
    each = rows * vocab * DTYPE.itemsize
    logits = randn(copies(each), rows, vocab) * 3

    def full(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((rows,), value, dtype=dtype, device="cuda")

    knobs = (
        full(1.0, torch.float32),
        full(50 if kind in ("top-k", "top-k-p") else 0, torch.int32),
        full(0.9 if kind in ("top-p", "top-k-p") else 1.0, torch.float32),
        full(0.0, torch.float32),
        torch.arange(rows, device="cuda"),
        torch.arange(rows, device="cuda").int(),
    )
    if kind == "greedy":
        knobs = (None,) * 6

    def timed(name: str, **config: int) -> Timed:
        return name, [lambda i=i: sampling._launch(i, knobs, **config) for i in logits], each, 0

    def flashinfer_timed(flashinfer) -> Timed:
        if kind == "greedy":
            return "torch argmax", [lambda i=i: i.argmax(-1) for i in logits], each, 0
        run = flashinfer.sampling.top_k_top_p_sampling_from_logits
        top_k = 50 if "k" in kind else vocab
        top_p = 0.9 if "p" in kind else 1.0
        return "flashinfer", [lambda i=i: run(i.float(), top_k, top_p) for i in logits], each, 0

    return timed, flashinfer_timed


CASES: dict[str, tuple[Callable, list[tuple], list[tuple]]] = {
    # section: (case, arguments, of these with --quick)
    "decode": (
        decode_case,
        [
            *itertools.product((1, 8, 64, 256), (1024, 2048, 4096), (16,), (8,), (128,)),
            *((b, 2048, 32, 32, 128) for b in (1, 64)),
            *((b, 2048, 32, 4, 128) for b in (1, 64, 256)),
            (64, 2048, 9, 3, 64),
            (256, 128, 16, 8, 128),
            (1, 128, 16, 8, 128),
            (1, 32768, 16, 8, 128),
            *((b, 1024, 16, 8, 128, FP8) for b in (1, 64, 256)),
            (256, 560, 32, 32, 128, FP8),
            *((256, 560, heads, kv, 128, DTYPE, True) for heads, kv in ((16, 8), (32, 32))),
        ],
        [(1, 2048, 16, 8, 128), (64, 2048, 16, 8, 128), (256, 2048, 16, 8, 128)],
    ),
    "extend": (
        extend_case,
        [
            *((n, 0, 32, 8, 128) for n in (1024, 2048, 4096, 8192, 16384)),
            *((n, 0, 16, 8, 128) for n in (1024, 4096, 16384)),
            (512, 0, 16, 8, 128, 16),
            (2048, 8192, 32, 8, 128),
            (128, 8192, 32, 8, 128),
            (16, 4096, 32, 8, 128),
            (16, 4096, 32, 8, 128, 32),
            (4096, 0, 32, 8, 64),
        ],
        [(4096, 0, 32, 8, 128), (16384, 0, 32, 8, 128)],
    ),
    "norm": (
        norm_case,
        [*itertools.product((1, 64, 256, 4096, 16384), (1024, 4096))],
        [(1, 1024), (256, 1024), (4096, 4096)],
    ),
    "rope": (
        rope_case,
        [(t, 16, 8, 128) for t in (1, 64, 256, 4096, 16384)],
        [(1, 16, 8, 128), (4096, 16, 8, 128)],
    ),
    "silu": (
        silu_case,
        [*itertools.product((1, 64, 256, 4096, 16384), (3072,)), (4096, 12288)],
        [(1, 3072), (4096, 3072)],
    ),
    "gemv": (
        gemv_case,
        [
            (*shape, tokens, kind)
            for *shape, kind in (
                (4096, 1024, "norm"),
                (1024, 2048, "plain"),
                (6144, 1024, "gated"),
                (1024, 3072, "plain"),
                (12288, 4096, "norm"),
                (4096, 4096, "plain"),
                (22016, 4096, "gated"),
                (4096, 11008, "plain"),
                (151936, 1024, "plain"),
            )
            for tokens in (1, 4, 8)
        ],
        [(4096, 1024, 1, "norm"), (22016, 4096, 1, "gated")],
    ),
    "sampling": (
        sampling_case,
        [
            *itertools.product(
                (1, 16, 64, 256), ("greedy", "temperature", "top-p", "top-k", "top-k-p")
            )
        ],
        [*itertools.product((1, 256), ("greedy", "temperature", "top-p"))],
    ),
}
