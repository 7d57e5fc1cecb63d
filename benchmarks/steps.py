"""What a step's time on the GPU is made of, kernel by kernel:

    python benchmarks/steps.py --model qwen3-0.6b --decode 1x300,256x560 --prefill 1x512,8x1024
    python benchmarks/steps.py --model llama2-7b --decode 256x560 --kv-cache-dtype fp8_e4m3

`--decode RxN`: R requests that have N tokens each; `--prefill RxN`: R new prompts of N tokens. The
model is a worker's own, with random weights, in this process. A kernel that starts before the one
before it has ended (programmatic dependent launch) is charged from that one's end on, so that the
parts add up to the whole; a gap is when nothing ran.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from models import CONFIGS, DEMO, model_folder

from sglang.messages import StepPlan, pack
from sglang.model_config import ModelConfig
from sglang.server_args import parse_args as parse_flags
from sglang.worker.parallel import TensorParallel
from sglang.worker.runner import ModelRunner, PendingStep
from sglang.worker.warm_up import row_spec

TIMED, TRACED = 20, 6
"""Steps of which the whole time is taken, and steps whose kernels are."""


class Steps:
    """Plans for a runner, as a router would send them."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        for cache in (*runner.kv_cache.k, *runner.kv_cache.v):
            fill_randomly(cache)
        self._random = np.random.default_rng(0)
        self._free = np.empty(0, dtype=np.int64)

    def _slots(self, count: int) -> np.ndarray:
        """Scattered as in a pool long in use."""
        if len(self._free) < count:
            self._free = self._random.permutation(self._runner.kv_cache.num_slots)
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def prefill(self, rows: int, tokens: int, cached: int = 0) -> PendingStep:
        ids = self._random.integers(0, 10000, rows * tokens)
        parts = (
            np.arange(rows), [tokens] * rows, [1] * rows,
            self._slots(rows * tokens), self._slots(rows * cached), ids,
        )  # fmt: skip
        specs = [row_spec(row, temperature=0.0, cached_len=cached) for row in range(rows)]
        plan = StepPlan(0, specs, rows, 0, rows * tokens)
        return self._runner.launch(plan, pack(np.concatenate(parts)))

    def decode(self, rows: int) -> PendingStep:
        payload = pack(np.concatenate((np.arange(rows), self._slots(rows))))
        return self._runner.launch(StepPlan(0, [], rows, rows, 0), payload)


def fill_randomly(cache: torch.Tensor, piece: int = 1 << 14) -> None:
    """Zeros would take less power than what a cache holds."""
    some = torch.randn(piece, *cache.shape[1:], device=cache.device).to(cache.dtype)
    for part in cache.split(piece):
        part.copy_(some[: len(part)])


@dataclass
class Share:
    """Of one kernel in a step."""

    calls: float = 0.0
    us: float = 0.0


def whole(step: Callable[[], PendingStep]) -> float:
    """Microseconds of a step, the GPU never waiting for the host if that can be."""
    for _ in range(3):
        step().wait()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    step()  # under way while the first timed one is launched
    start.record()
    for _ in range(TIMED):
        pending = step()
    end.record()
    pending.wait()
    torch.cuda.synchronize()
    return 1e3 * start.elapsed_time(end) / TIMED


def shares(step: Callable[[], PendingStep]) -> dict[str, Share]:
    """By the kernels' names, and "gaps"."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(TRACED):
            pending = step()
        pending.wait()
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profile.events() or []
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    found: dict[str, Share] = defaultdict(Share)
    clock = spans[0][0]
    for start, end, name in spans:
        share = found[name]
        share.calls += 1 / TRACED
        share.us += max(end - max(start, clock), 0.0) / TRACED
        found["gaps"].us += max(start - clock, 0.0) / TRACED
        clock = max(clock, end)
    return found


def sizes(text: str) -> list[tuple[int, int]]:
    try:
        return [(int(r), int(n)) for r, n in (part.split("x") for part in text.split(",") if part)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 1x300,256x560") from None


def main() -> None:
    lines = __doc__.splitlines()
    parser = argparse.ArgumentParser(
        description=lines[0],
        epilog="\n".join(lines[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", default="qwen3-0.6b", help=", ".join([DEMO, *CONFIGS]))
    parser.add_argument("--decode", type=sizes, default=[])
    parser.add_argument("--prefill", type=sizes, default=[])
    parser.add_argument("--lines", type=int, default=14, help="kernels shown at most (default: 14)")
    parser.add_argument("--json", help="write the figures here")
    args, flags = parser.parse_known_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    if not args.decode and not args.prefill:
        parser.error("say --decode or --prefill")

    path = [] if args.model == DEMO else ["--model-path", model_folder(args.model)]
    ours = ["--load-format", "dummy", "--context-length", "4096", "--mem-fraction-static", "0.85"]
    server = parse_flags([*path, *ours, *flags])
    runner = ModelRunner(server, ModelConfig.load(server), TensorParallel())
    steps, figures = Steps(runner), {}

    def show(name: str, step: Callable[[], PendingStep]) -> None:
        total, found = whole(step), shares(step)
        ranked = sorted(found.items(), key=lambda item: -item[1].us)
        figures[name] = {"us": total, "shares": {n: [s.calls, s.us] for n, s in ranked}}
        traced = sum(share.us for share in found.values())
        print(f"\n{args.model} {name}: {total:,.0f} us a step ({traced:,.0f} while traced)")
        for kernel, share in ranked[: args.lines]:
            each = f"{share.calls:6.1f} x {share.us / share.calls:7.1f}" if share.calls else ""
            print(f"{share.us:9.1f} us {share.us / traced:6.1%}  {each:16}  {kernel[:90]}")

    for rows, tokens in args.decode:
        steps.prefill(rows, 1, cached=tokens - 1).wait()
        show(f"decode {rows}x{tokens}", lambda rows=rows: steps.decode(rows))
    for rows, tokens in args.prefill:
        show(f"prefill {rows}x{tokens}", lambda r=rows, n=tokens: steps.prefill(r, n))
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
