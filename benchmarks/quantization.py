"""Quantized products beside cuBLAS in bfloat16: python benchmarks/quantization.py [--sweep]

Times are of CUDA graphs whose calls rotate over more weights than the L2 holds, and every result is
compared with the naive twin's. One token goes through the fused kernels, as in a decoder: norm and
quantization of the token are in the time. With more tokens 8-bit products get theirs quantized, for
which a decoder's norm and gate kernels have seen to.

--sweep times candidate launch configurations at the shapes of a decoder's fused layers, compiled
beforehand by several processes; this is how the defaults were chosen.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
from kernel_cases import copies
from kernels import seconds_per_call

from sglang.kernels import int4, int4_gemv, int4_hopper, linear_hopper, one_token, w8a8_gemv
from sglang.kernels import quant_w8a8 as w8a8
from sglang.kernels.hopper import multiprocessors
from sglang.kernels.hopper_split_k import Split, possible_splits
from sglang.kernels.int4_weight import Int4Weight, pack_scales
from sglang.kernels.quant_tokens import quantize_tokens, quantize_tokens_naive


@dataclass(frozen=True)
class Shape:
    n: int
    k: int
    kind: str = ""
    """"normed": after a residual addition and a norm; "gated": before SwiGLU besides."""

    def __str__(self) -> str:
        return f"{self.n}x{self.k}{self.kind and ' ' + self.kind}"


SHAPES = {
    "Llama-2-7B": [Shape(4096, 4096), Shape(11008, 4096), Shape(4096, 11008)],
    "Llama-3-8B": [Shape(6144, 4096), Shape(14336, 4096), Shape(4096, 14336)],
}
FUSED = {
    "Llama-2-7B": [
        Shape(12288, 4096, "normed"), Shape(4096, 4096), Shape(22016, 4096, "gated"),
        Shape(4096, 11008),
    ],
    "Llama-3-8B": [
        Shape(6144, 4096, "normed"), Shape(28672, 4096, "gated"), Shape(4096, 14336),
    ],
}  # fmt: skip
TOKENS = (1, 8, 16, 64, 128, 256, 4096)
FORMATS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
DTYPE = torch.bfloat16


def make(method: str, n: int, k: int):
    if method == "bf16":
        return torch.randn(n, k, dtype=DTYPE, device="cuda") / k**0.5
    if method == "int4":
        groups = k // 128
        packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
        zeros = torch.randint(0, 16, (groups, n), device="cuda")
        scales = torch.rand(groups, n, device="cuda") / 100
        return Int4Weight(packed, pack_scales(scales, zeros), k, 128)
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda")
    weight = weight if method == "int8" else weight.to(DTYPE).to(FORMATS[method])
    return weight, torch.rand(n, device="cuda") / 1000


def make_many(method: str, shape: Shape) -> list:
    size = {"bf16": 2, "int4": 0.5}.get(method, 1)
    return [make(method, shape.n, shape.k) for _ in range(copies(shape.n * shape.k * size))]


class Case:
    """Tokens before a layer of one shape."""

    def __init__(self, method: str, shape: Shape, tokens: int) -> None:
        x = torch.randn(tokens, shape.k, dtype=DTYPE, device="cuda")
        self.method, self.x = method, x
        self.around: tuple = ()
        if shape.kind and tokens == 1:
            norm = torch.rand(shape.k, device="cuda").to(DTYPE) + 0.5
            self.around = (None, torch.randn_like(x), norm, 1e-5, shape.kind == "gated")
        if method in FORMATS:
            self.quantized = quantize_tokens(x, FORMATS[method])

    def run(self, weight, config=None) -> torch.Tensor:
        """With a configuration, the kernel that it is of; without one, what a layer would do."""
        x, method = self.x, self.method
        if method == "bf16":
            return F.linear(x, weight)
        if method == "int4":
            if config == "dequantize":
                return F.linear(x, int4.dequantize_int4_triton(weight, x.dtype))
            if isinstance(config, int4.DotConfig):
                return int4.int4_dot_triton(x, weight, None, config)
            if isinstance(config, Split):
                return int4_hopper.int4_hopper_linear(x, weight, None, config)
            if config is None and not self.around:
                return int4.int4_linear(x, weight)
            around = self.around or (None, None, None, 0.0, False)
            return int4_gemv.int4_fused_linear_triton(x, weight, *around, config)[0]
        if config == "library":
            return w8a8.scaled_matmul_library(*self.quantized, *weight, DTYPE)
        if isinstance(config, Split):
            return linear_hopper.w8a8_hopper(*self.quantized, *weight, DTYPE, None, config)
        if isinstance(config, w8a8.W8A8Config):
            return w8a8.scaled_matmul_triton(*self.quantized, *weight, DTYPE, None, config)
        if config is None and not w8a8_gemv.is_few(x, weight[0]):
            return w8a8.scaled_matmul(*self.quantized, *weight, DTYPE)
        around = self.around or (None, None, None, 0.0, False)
        return w8a8_gemv.w8a8_fused_linear_triton(x, *weight, *around, config)[0]

    def expected(self, weight) -> torch.Tensor:
        if self.method == "int4":
            around = [t.float() if isinstance(t, torch.Tensor) else t for t in self.around]
            return int4_gemv.int4_fused_linear_naive(self.x.float(), weight, *around)[0]
        if self.around:
            return w8a8_gemv.w8a8_fused_linear_naive(self.x, *weight, *self.around)[0]
        quantized = quantize_tokens_naive(self.x, weight[0].dtype)
        return w8a8.scaled_matmul_naive(*quantized, *weight, torch.float32)

    def error(self, out: torch.Tensor, expected: torch.Tensor) -> float:
        """Root mean square, relative."""
        difference = out.float() - expected.float()
        return float(difference.square().mean().sqrt() / expected.float().square().mean().sqrt())


def candidates(method: str, shape: Shape, tokens: int) -> list:
    found: list = [None]
    processors = multiprocessors(torch.device("cuda"))
    if processors and tokens > 1:
        tiles = (int4_hopper if method == "int4" else linear_hopper).TILES
        found += possible_splits(tiles, tokens, shape.n, shape.k, processors)
        others = {"int4": ["dequantize"], "fp8": ["library"]} if tokens >= 64 else {}
        return found + others.get(method, [])
    if method == "int4":
        if tokens == 1:
            found += [
                one_token.OneTokenConfig(rows, warps, per_sm)
                for rows, warps, per_sm in (
                    [(4, 4, 4), (4, 4, 3), (4, 4, 2), (2, 4, 4), (2, 4, 3), (4, 2, 6)]
                    if shape.k <= 8192
                    else [(2, 4, 3), (2, 4, 2), (2, 8, 1), (1, 4, 4), (1, 8, 2)]
                )
            ]
        tiles = {
            1: [] if shape.kind else [(8, 64, 4, 3), (8, 128, 4, 3)],
            8: [(8, 64, 4, 3), (8, 128, 4, 3), (8, 64, 2, 4), (8, 64, 4, 5), (16, 64, 4, 3)],
            16: [(16, 64, 4, 3), (16, 64, 2, 4), (16, 32, 4, 4), (16, 128, 8, 3), (16, 128, 4, 3)],
            64: [(64, 128, 8, 4), (64, 64, 4, 3), (64, 128, 4, 3), (32, 128, 8, 3)],
            128: [(128, 64, 4, 3), (64, 128, 8, 4), (64, 64, 4, 3)],
            256: [(128, 128, 8, 3), (128, 64, 4, 3), (64, 128, 8, 4), (64, 64, 4, 3)],
            4096: [(128, 128, 8, 3)],
        }[tokens]
        splits = (4, 8, 16) if tokens <= 16 else (1, 2, 4) if tokens <= 64 else (1, 2)
        found += [int4.DotConfig(m, n, s, w, st) for (m, n, w, st) in tiles for s in splits]
        return found + (["dequantize"] if tokens >= 64 else [])
    if tokens == 1:
        found += [
            one_token.OneTokenConfig(rows, warps, per_sm)
            for rows, warps, per_sm in [(4, 8, 2), (4, 8, 3), (4, 4, 4), (2, 8, 4), (2, 8, 2)]
        ]
    tiles = {
        1: [],
        8: [(16, 64, 128, 4, 4), (8, 64, 128, 4, 4), (16, 64, 256, 4, 4), (16, 128, 128, 4, 4)],
        16: [(16, 64, 128, 4, 4), (16, 64, 256, 4, 4), (16, 128, 128, 4, 4), (16, 128, 256, 8, 3)],
        64: [(64, 64, 128, 4, 4), (64, 128, 128, 4, 4), (64, 128, 128, 8, 4), (64, 64, 256, 4, 3)],
        128: [(128, 64, 128, 4, 4), (64, 128, 128, 4, 4)],
        256: [(128, 128, 128, 8, 4), (128, 64, 128, 4, 4), (64, 128, 128, 4, 4)],
        4096: [(128, 256, 128, 8, 3), (256, 128, 128, 8, 3), (128, 128, 128, 8, 4),
               (128, 128, 128, 4, 4)],
    }[tokens]  # fmt: skip
    splits = (1, 2, 4, 8) if tokens <= 16 else (1, 2, 4) if tokens <= 64 else (1,)
    found += [w8a8.W8A8Config(m, n, k, s, w, st) for (m, n, k, w, st) in tiles for s in splits]
    return found + (["library"] if tokens > 16 and method == "fp8" else [])


def compile_one(case: tuple) -> str:
    """In a process of its own, which leaves the kernel in Triton's cache."""
    method, shape, tokens, config = case
    try:
        Case(method, shape, tokens).run(make(method, shape.n, shape.k), config)
        torch.cuda.synchronize()
    except Exception as error:
        return str(error).strip().split("\n")[0][:100]
    return ""


def sweep(methods: list[str], tokens: list[int], shapes: list[Shape], deadline: float) -> list:
    # Triton's kernels for several tokens depend on the configuration and not on the shape.
    cases = [
        (m, shape, t, config)
        for m in methods for t in tokens for i, shape in enumerate(shapes) if t == 1 or i == 0
        for config in candidates(m, shape, t)
    ]  # fmt: skip
    workers = max(min(os.cpu_count() or 1, 14), 1)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        errors = dict(zip(cases, pool.map(compile_one, cases, chunksize=1), strict=True))
    print(f"{len(cases)} kernels compiled in {time.monotonic() - START:.0f} s", flush=True)
    for (m, shape, t, config), error in errors.items():
        if error:
            print(f"{m} {shape} M={t} {config} FAILED: {error}", flush=True)
    results: list[dict] = []
    for shape in shapes:
        measure(shape, methods, tokens, candidates, deadline, results)
    summary(results)
    return results


def measure(
    shape: Shape,
    methods: list[str],
    tokens: list[int],
    choices: Callable[[str, Shape, int], list],
    deadline: float,
    results: list[dict],
) -> None:
    base: dict[int, float] = {}
    for method in ["bf16", *methods]:
        made = make_many(method, shape)
        for t in tokens:
            if method == "bf16":
                case = Case(method, shape, t)
                base[t] = attempt(case, made, None)
                continue
            case = Case(method, shape, t)
            expected = case.expected(made[0])
            timed = []
            for config in choices(method, shape, t):
                if time.monotonic() > deadline:
                    print("out of time", flush=True)
                    break
                seconds = attempt(case, made, config, expected)
                results.append({
                    "shape": str(shape), "M": t, "method": method, "config": str(config),
                    "us": seconds * 1e6, "bf16_us": base[t] * 1e6, "speed": base[t] / seconds,
                })  # fmt: skip
                timed.append((seconds, config))
            best = sorted((s for s in timed if s[0] == s[0]), key=lambda s: s[0])[:4]
            print(
                f"{shape!s:18} {method:4} M={t:<4} bf16 {base[t] * 1e6:7.1f} us  "
                + "  ".join(f"{base[t] / s:5.2f}x {describe(config)}" for s, config in best),
                flush=True,
            )
        del made
        torch.cuda.empty_cache()


def describe(config) -> str:
    if config is None or isinstance(config, str):
        return config or "default"
    if isinstance(config, Split):
        tile = config.tile
        return f"{tile.block_m}x{tile.block_n}x{tile.per_sm}/{config.splits}"
    return f"{type(config).__name__[:-6]}{tuple(vars(config).values())}".replace(" ", "")


def attempt(case: Case, weights: list, config, expected: torch.Tensor | None = None) -> float:
    try:
        if expected is not None:
            error = case.error(case.run(weights[0], config), expected)
            if not error < 0.015:
                print(f"{case.method} {config} WRONG: error {error:.4f}", flush=True)
                return float("nan")
        return seconds_per_call([lambda w=w: case.run(w, config) for w in weights], 0.006)
    except Exception as error:
        print(f"{case.method} {config} FAILED: {str(error)[:200]}", flush=True)
        return float("nan")


def summary(results: list[dict]) -> None:
    """Speed over cuBLAS: the default's, and the best."""
    tokens = list(dict.fromkeys(r["M"] for r in results))
    print("\nspeed over cuBLAS in bfloat16, by the default (by the best configuration)")
    print(f"{'':24}" + "".join(f"M={t:<11}" for t in tokens))
    rows = itertools.groupby(results, key=lambda r: (r["shape"], r["method"]))
    for (shape, method), group in rows:
        cells = list(group)
        line = f"{shape:18} {method:4} "
        for t in tokens:
            speeds = {r["config"]: r["speed"] for r in cells if r["M"] == t}
            best = max((s for s in speeds.values() if s == s), default=float("nan"))
            line += f" {speeds.get('None', float('nan')):4.2f} ({best:4.2f}) "
        print(line, flush=True)


START = time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true", help="time candidate configurations")
    parser.add_argument("--only", default="int4,int8,fp8", help="methods, comma-separated")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="M, comma-separated")
    parser.add_argument("--models", default="Llama-2-7B", help="whose shapes, or all")
    parser.add_argument("--budget", type=float, default=150, help="seconds, then no new case")
    parser.add_argument("--json", help="write the figures here")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    deadline = START + args.budget
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    methods, tokens = args.only.split(","), [int(t) for t in args.tokens.split(",")]
    models = list(SHAPES) if args.models == "all" else args.models.split(",")
    table = FUSED if args.sweep else SHAPES
    shapes = list(dict.fromkeys(shape for model in models for shape in table[model]))
    if args.sweep:
        results = sweep(methods, tokens, shapes, deadline)
    else:
        results = []
        for shape in shapes:
            measure(shape, methods, tokens, lambda *_: [None], deadline, results)
        summary(results)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
