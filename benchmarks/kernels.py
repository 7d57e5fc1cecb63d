"""How near each kernel is to what the GPU can do: python benchmarks/kernels.py [--quick] [--sweep]

Every case is timed inside a CUDA graph, as the engine runs it, and on cold data: the calls of a
graph rotate over more memory than the L2 holds. Percentages are of a pure read (or a bf16 matrix
product, for prefill) measured on the same GPU. Where flashinfer is installed, it is beside.
--sweep times candidate launch configurations instead, which is how the defaults were chosen.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from kernel_cases import CASES, DTYPE, FP8, Call, Timed, randn

from sglang.kernels import decode_attention, extend_attention, gemv
from sglang.kernels.launch import multiprocessors


def seconds_per_call(calls: list[Call], budget: float = 0.03) -> float:
    """The best of several replays of a CUDA graph of all the calls."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    best, spent = float("inf"), 0.0
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        took = start.elapsed_time(end) / 1e3
        best, spent = min(best, took), spent + took
        if spent > budget and _ >= 2:
            break
    return best / len(calls)


# -- The ceilings -----------------------------------------------------------------------------


@triton.jit
def _read_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr, TILES: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    base = tl.program_id(0).to(tl.int64) * BLOCK * TILES
    for i in tl.static_range(TILES):
        total += tl.load(x_ptr + base + i * BLOCK + tl.arange(0, BLOCK))
    if tl.sum(total, 0) == 12345.0:  # never, but the compiler does not know
        tl.store(out_ptr, 1.0)


def measure_ceilings() -> dict[str, float]:
    """{"copy", "read": bytes/s, "gemm": FLOP/s}."""
    n = 8192
    a, b = randn(n, n), randn(n, n)
    gemm = 2 * n**3 / seconds_per_call([lambda: torch.mm(a, b)] * 4)
    x = torch.zeros(1 << 29, dtype=torch.float32, device="cuda")  # 2 GiB
    y = torch.empty_like(x)
    copy = 2 * x.nbytes / seconds_per_call([lambda: y.copy_(x)] * 2)
    grid = (x.numel() // (4096 * 4),)
    read = x.nbytes / seconds_per_call([lambda: _read_kernel[grid](x, y, BLOCK=4096, TILES=4)] * 2)
    return {"copy": copy, "read": max(read, copy), "gemm": gemm}


# -- Sweeps: candidates for each kernel, at the shapes that decide ------------------------------


def sweep_candidates(section: str) -> Iterator[tuple[tuple, list[tuple[str, dict]]]]:
    """(case arguments, [(label, keyword arguments of `timed`)])."""
    if section == "decode":
        Config = decode_attention.DecodeConfig
        sms = multiprocessors(torch.device("cuda", torch.cuda.current_device()))
        tiles = [(32, 1, 2), (32, 1, 3), (32, 2, 3), (64, 2, 2), (64, 2, 3)]
        for shape in (
            (1, 300, 16, 8, 128), (1, 4096, 16, 8, 128), (1, 300, 32, 32, 128),
            (8, 2048, 16, 8, 128), (16, 500, 32, 32, 128),
            (256, 560, 16, 8, 128), (256, 24, 16, 8, 128), (64, 1427, 16, 8, 128, DTYPE, True),
            (256, 560, 32, 32, 128), (256, 24, 32, 32, 128), (64, 1427, 32, 32, 128, DTYPE, True),
            (256, 560, 16, 8, 128, FP8), (256, 560, 32, 32, 128, FP8),
            (64, 1427, 32, 32, 128, FP8, True),
        ):  # fmt: skip
            each = itertools.product(tiles, (4, 6, 8), (32, 64) if shape[0] == 1 else (64,))
            yield (
                shape,
                [
                    (f"{tile} {n} an SM, {least} tokens", {"config": Config(*tile, n * sms, least)})
                    for tile, n, least in each
                ],
            )
    elif section == "extend":
        Config = extend_attention.ExtendConfig
        long = [
            (128, 64, 4, 2), (128, 128, 8, 2), (64, 64, 4, 2), (64, 128, 4, 2), (128, 64, 8, 3),
        ]  # fmt: skip
        for shape in (
            (4096, 0, 32, 8, 128), (4096, 0, 16, 8, 128), (8192, 0, 32, 32, 128),
            (512, 0, 16, 8, 128), (1024, 0, 16, 8, 128, 8), (128, 0, 16, 8, 128),
            (64, 2048, 16, 8, 128, 64), (512, 2048, 32, 32, 128, 4),
        ):  # fmt: skip
            pack = shape[2] > shape[3]
            yield shape, [(f"{tile}", {"config": Config(*tile, pack=pack)}) for tile in long]
        short = [(16, 64, 4, 2), (32, 64, 4, 2), (64, 64, 4, 2)]
        for shape in ((128, 8192, 32, 8, 128), (16, 4096, 32, 8, 128, 32)):
            yield (
                shape,
                [
                    (f"{tile} splits {m} of {t}", {"config": Config(*tile, True, m, t)})
                    for tile in short
                    for m, t in ((1, 512), (4, 512), (8, 256))
                ],
            )
    elif section == "gemv":
        for *shape, kind in (
            (22016, 4096, "gated"), (4096, 11008, "plain"), (12288, 4096, "norm"),
            (4096, 4096, "plain"), (151936, 1024, "plain"), (4096, 1024, "norm"),
            (1024, 2048, "plain"), (6144, 1024, "gated"), (1024, 3072, "plain"),
        ):  # fmt: skip
            for tokens in (1, 4):
                yield (
                    (*shape, tokens, kind),
                    [
                        (f"n{n} w{w}", {"config": gemv.GemvConfig(n, w)})
                        for n, w in itertools.product((1, 2, 4, 8, 16), (2, 4, 8, 16))
                        if 32 <= n * shape[1] * (1 + (kind == "gated")) // (32 * w) <= 170
                    ],
                )
    elif section == "norm":
        for shape in ((1, 1024), (256, 1024), (256, 4096), (4096, 4096)):
            yield shape, [(f"w{w}", {"num_warps": w}) for w in (1, 2, 4, 8, 16)]
    elif section == "rope":
        for shape in ((1, 16, 8, 128), (256, 16, 8, 128), (4096, 16, 8, 128)):
            yield (
                shape,
                [
                    (f"h{h} w{w}", {"block_kv": h, "num_warps": w})
                    for h, w in itertools.product((1, 2, 4, 8), (1, 2, 4))
                ],
            )
    elif section == "silu":
        for shape in ((1, 3072), (256, 3072), (4096, 3072)):
            yield (
                shape,
                [
                    (f"b{b} w{w}", {"block": b, "num_warps": w})
                    for b, w in itertools.product((512, 1024, 2048, 4096), (2, 4, 8))
                ],
            )
    elif section == "sampling":
        for shape in ((1, "top-p"), (64, "top-p"), (1, "temperature"), (256, "temperature")):
            yield (
                shape,
                [
                    (f"chunk{c} b{b} w{w}", {"chunk": c, "block": b, "num_warps": w})
                    for c, (b, w) in itertools.product(
                        (1024, 2048, 4096), ((1024, 4), (2048, 8), (4096, 16), (4096, 32))
                    )
                ],
            )


# -- Running ----------------------------------------------------------------------------------


class Report:
    def __init__(self, ceilings: dict[str, float], deadline: float) -> None:
        self.ceilings = ceilings
        self.deadline = deadline
        self.results: list[dict] = []

    def run(self, section: str, shape: tuple, timed: Timed) -> None:
        name, calls, num_bytes, flops = timed
        seconds = seconds_per_call(calls)
        result = {"section": section, "shape": shape, "name": name, "us": seconds * 1e6}
        rate = num_bytes / seconds
        result.update(tb_s=rate / 1e12, percent=100 * rate / self.ceilings["read"])
        speed = f"{rate / 1e12:7.3f} TB/s  {result['percent']:5.1f}% of read"
        if flops:
            rate = flops / seconds
            result.update(tflop_s=rate / 1e12, percent_of_gemm=100 * rate / self.ceilings["gemm"])
            speed = f"{rate / 1e12:7.1f} TFLOP/s {result['percent_of_gemm']:5.1f}% of GEMM"
        self.results.append(result)
        print(f"{section:9} {shape!s:32} {name:28} {result['us']:9.1f} us {speed}", flush=True)

    def attempt(self, section: str, shape: tuple, make: Callable[[], Timed]) -> None:
        if time.monotonic() > self.deadline:
            print(f"{section:9} {shape!s:32} left out: out of time", flush=True)
            return
        try:
            self.run(section, shape, make())
        except Exception:
            print(f"{section:9} {shape!s:32} FAILED", flush=True)
            print("    " + "\n    ".join(traceback.format_exc().splitlines()[-6:]), flush=True)


def compare(report: Report, sections: list[str], quick: bool, flashinfer) -> None:
    for section in sections:
        make_case, shapes, few = CASES[section]
        for shape in few if quick else shapes:
            try:
                timed, theirs = make_case(*shape)
            except Exception:
                traceback.print_exc()
                continue
            report.attempt(section, shape, partial(timed, "ours"))
            if theirs is not None and (flashinfer is not None or section == "gemv"):
                report.attempt(section, shape, partial(theirs, flashinfer))
        torch.cuda.empty_cache()


def sweep(report: Report, sections: list[str]) -> None:
    for section in sections:
        for shape, candidates in sweep_candidates(section):
            try:
                timed, _ = CASES[section][0](*shape)
            except Exception:
                traceback.print_exc()
                continue
            first = len(report.results)
            for label, config in candidates:
                report.attempt(section, shape, partial(timed, label, **config))
            best = sorted(report.results[first:], key=lambda result: result["us"])[:4]
            names = ", ".join(f"{result['name']} {result['us']:.1f}" for result in best)
            print(f"--> {section} {shape}: {names}", flush=True)
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few shapes of each kernel")
    parser.add_argument("--sweep", action="store_true", help="time candidate configurations")
    parser.add_argument("--only", default=",".join(CASES), help="sections, comma-separated")
    parser.add_argument("--no-flashinfer", action="store_true")
    parser.add_argument("--budget", type=float, default=280, help="seconds, then no new case")
    parser.add_argument("--json", help="write the results here")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    deadline = time.monotonic() + args.budget

    flashinfer = None
    if not (args.sweep or args.no_flashinfer):
        try:
            import flashinfer
        except ImportError:
            print("flashinfer is not installed: without comparison")
    torch.manual_seed(0)
    ceilings = measure_ceilings()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print(
        f"copy {ceilings['copy'] / 1e12:.2f} TB/s, read {ceilings['read'] / 1e12:.2f} TB/s, "
        f"bf16 GEMM {ceilings['gemm'] / 1e12:.0f} TFLOP/s",
        flush=True,
    )
    report = Report(ceilings, deadline)
    sections = args.only.split(",")
    if args.sweep:
        sweep(report, sections)
    else:
        compare(report, sections, args.quick, flashinfer)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"ceilings": ceilings, "results": report.results}, file, indent=1)


if __name__ == "__main__":
    main()
