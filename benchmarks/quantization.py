"""Quantized products beside cuBLAS in bfloat16: python benchmarks/quantization.py [--sweep]

Times are of CUDA graphs whose calls rotate over more weights than the L2 holds, and include the
quantization of activations. --sweep times candidate launch configurations, compiled beforehand by
several processes; this is how the defaults were chosen.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch
import torch.nn.functional as F
import triton
from kernel_cases import copies
from kernels import seconds_per_call

from sglang.kernels import int4
from sglang.kernels import quant_w8a8 as w8a8

SHAPES = {  # [outputs, inputs]
    "Llama-2-7B": [(4096, 4096), (11008, 4096), (4096, 11008)],
    "Llama-3-8B": [(6144, 4096), (14336, 4096), (4096, 14336)],
}
TOKENS = (1, 8, 16, 64, 256, 4096)
FORMATS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
DTYPE = torch.bfloat16


def make_int4(n: int, k: int, group: int = 128) -> int4.Int4Weight:
    return int4.Int4Weight(
        torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda"),
        torch.rand(k // group, n, device="cuda"),
        torch.randint(0, 16, (k // group, n), device="cuda").float(),
        k,
        group,
    )


def make_w8(n: int, k: int, format: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda")
    if format != torch.int8:
        weight = weight.to(DTYPE).to(format)
    return weight, torch.rand(n, device="cuda")


def weights(method: str, n: int, k: int) -> list:
    if method == "bf16":
        return [torch.randn(n, k, dtype=DTYPE, device="cuda") for _ in range(copies(n * k * 2))]
    if method == "int4":
        return [make_int4(n, k) for _ in range(copies(n * k / 2))]
    return [make_w8(n, k, FORMATS[method]) for _ in range(copies(n * k))]


def call(method: str, x: torch.Tensor, weight, config=None) -> torch.Tensor:
    """With a configuration: the kernel that it is of. Without one: what a layer would do."""
    if method == "bf16":
        return F.linear(x, weight)
    if method == "int4":
        run = (
            int4.int4_linear if config is None else partial(int4.int4_linear_triton, config=config)
        )
        return run(x, weight)
    if config is None:
        return w8a8.w8a8_linear(x, *weight)
    x_q, x_scales = w8a8.quantize_tokens(x, weight[0].dtype)
    if config == "library":
        return w8a8.scaled_matmul_library(x_q, x_scales, *weight, x.dtype)
    return w8a8.scaled_matmul_triton(x_q, x_scales, *weight, x.dtype, None, config)


def candidates(method: str, tokens: int) -> list:
    if method == "int4":
        found = []
        if tokens <= 8:
            found += [
                int4.GemvConfig(n, k, w)
                for n, k, w in (
                    (2, 4096, 4),
                    (4, 4096, 4),
                    (4, 4096, 8),
                    (8, 2048, 4),
                    (8, 1024, 4),
                )
            ]
        block_m = max(16, min(128, triton.next_power_of_2(tokens)))
        tiles = [(64, 4), (128, 4), (128, 8)] if block_m <= 64 else [(128, 8), (64, 4), (128, 4)]
        splits = (4, 8, 16) if tokens <= 16 else (1, 2, 4) if tokens <= 64 else (1, 2)
        stages = (2, 3)
        return found + [
            int4.DotConfig(block_m, n, s, w, stage)
            for (n, w), s, stage in itertools.product(tiles, splits, stages)
        ]
    block_m = max(16, min(128, triton.next_power_of_2(tokens)))
    splits = (1, 2, 4, 8) if tokens <= 16 else (1, 2, 4) if tokens <= 64 else (1,)
    tiles = [(64, 128, 4), (128, 128, 4), (64, 256, 4)] if block_m <= 64 else [(128, 128, 8)]
    found = [
        w8a8.W8A8Config(block_m, n, k, s, w, 4)
        for (n, k, w), s in itertools.product(tiles, splits)
    ]  # fmt: skip
    return found + (["library"] if tokens > 16 else [])


def compile_one(case: tuple) -> str:
    """In a process of its own, which leaves the kernel in Triton's cache."""
    method, n, k, tokens, config = case
    try:
        weight = make_int4(n, k) if method == "int4" else make_w8(n, k, FORMATS[method])
        call(method, torch.randn(tokens, k, dtype=DTYPE, device="cuda"), weight, config)
        torch.cuda.synchronize()
    except Exception as error:
        return str(error).strip().split("\n")[0][:100]
    return ""


def sweep(methods: list[str], tokens: list[int], deadline: float) -> None:
    shapes = [(4096, 4096), (4096, 11008), (22016, 4096)]
    kinds = [(m, t, c) for m in methods if m != "bf16" for t in tokens for c in candidates(m, t)]
    # Compiled kernels depend on the configuration, not on the shape.
    cases = [(m, *shapes[0], t, c) for m, t, c in kinds]
    workers = max(min(os.cpu_count() or 1, 14), 1)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        errors = dict(zip(kinds, pool.map(compile_one, cases, chunksize=1), strict=True))
    print(f"compiled in {time.monotonic() - START:.0f} s", flush=True)
    for (m, t, c), error in errors.items():
        if error:
            print(f"{m} M={t} {c} FAILED: {error}", flush=True)
    for n, k in shapes:
        sets = {m: weights(m, n, k) for m in {*methods, "bf16"}}
        for t in tokens:
            x = torch.randn(t, k, dtype=DTYPE, device="cuda")
            base = seconds_per_call([partial(call, "bf16", x, w) for w in sets["bf16"]], 0.01)
            print(f"{n}x{k} M={t}: cuBLAS bf16 {base * 1e6:.1f} us", flush=True)
            for m in methods:
                results = []
                for config in candidates(m, t):
                    if errors[m, t, config] or time.monotonic() > deadline:
                        continue
                    try:
                        each = [partial(call, m, x, w, config) for w in sets[m]]
                        results.append((seconds_per_call(each, 0.005), config))
                    except Exception as error:
                        print(f"{m} M={t} {config} FAILED: {str(error)[:100]}", flush=True)
                for took, config in sorted(results, key=lambda result: result[0])[:5]:
                    print(f"    {m} {base / took:5.2f}x {took * 1e6:8.1f} us  {config}", flush=True)


def compare(methods: list[str], tokens: list[int], models: list[str], deadline: float) -> None:
    shapes = dict.fromkeys(shape for model in models for shape in SHAPES[model])
    for n, k in shapes:
        base: dict[int, float] = {}
        for m in dict.fromkeys(["bf16", *methods]):
            made = weights(m, n, k)
            cells = []
            for t in tokens:
                if time.monotonic() > deadline:
                    print("out of time")
                    return
                x = torch.randn(t, k, dtype=DTYPE, device="cuda")
                took = attempt([partial(call, m, x, w) for w in made])
                base.setdefault(t, took)
                cells.append(f"M={t}: {took * 1e6:7.1f} us {base[t] / took:5.2f}x")
            print(f"{n:5}x{k:<5} {m:5} " + "  ".join(cells), flush=True)
            del made
            torch.cuda.empty_cache()


def attempt(calls: list[Callable[[], object]]) -> float:
    try:
        return seconds_per_call(calls, 0.01)
    except Exception as error:
        print(f"FAILED: {str(error)[:300]}", flush=True)
        return float("nan")


START = time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true", help="time candidate configurations")
    parser.add_argument("--only", default="int4,int8,fp8", help="methods, comma-separated")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="M, comma-separated")
    parser.add_argument("--models", default=",".join(SHAPES), help="whose shapes")
    parser.add_argument("--budget", type=float, default=80, help="seconds, then no new case")
    args = parser.parse_args()
    deadline = START + args.budget
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    methods, tokens = args.only.split(","), [int(t) for t in args.tokens.split(",")]
    if args.sweep:
        sweep(methods, tokens, deadline)
    else:
        compare(methods, tokens, args.models.split(","), deadline)


if __name__ == "__main__":
    main()
