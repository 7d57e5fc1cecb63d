"""What a steady decode step costs beside the model, in microseconds of one CPU core:

    python benchmarks/seam.py --rows 256
    python benchmarks/seam.py --engine qwen3-0.6b                  (and a server's flags)

The router's side (plan, encode, commit, news for the detokenizer), the worker's side up to the copy
to the device (decode, row arithmetic), and a round trip between two processes. Everything there is
NumPy and msgpack, so no GPU is needed to measure it. With --engine also a real engine, by its
profile: the router, and the launch thread with all that it does to keep the GPU at work. Medians.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from engines import make_engine
from models import CONFIGS

from sglang.addresses import connect, listen
from sglang.messages import (
    Decoder,
    FromWorker,
    GenerateRequest,
    StepResult,
    TokenBatch,
    ToWorker,
    encode,
    pack,
    unpack,
)
from sglang.router.scheduler import Scheduler
from sglang.sampling_params import SamplingParams
from sglang.worker.rows import RowState

ROUTER_US, LAUNCH_US = 500.0, 200.0
"""What a step of 256 rows should cost at most."""


class Clock:
    """Collects how long each named part took."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}
        self._last = 0.0

    def start(self) -> None:
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.times.setdefault(name, []).append(1e6 * (now - self._last))
        self._last = time.perf_counter()

    def medians(self) -> dict[str, float]:
        return {name: statistics.median(times) for name, times in self.times.items()}


def decode_steps(num_rows: int, context: int, steps: int) -> tuple[dict[str, float], int]:
    """(µs of each part of a step in which every row decodes, bytes of its plan)."""
    max_len = context + steps + 16
    scheduler = Scheduler(
        num_slots=num_rows * max_len, num_rows=num_rows, max_len=max_len, chunk_size=1 << 30
    )
    rows = RowState(num_rows, max_len, torch.device("cpu"))
    rng = np.random.default_rng(0)
    params = SamplingParams(max_new_tokens=steps + 8, temperature=0.0, ignore_eos=True)
    for handle in range(num_rows):
        prompt = rng.integers(0, 10000, context)
        scheduler.add(GenerateRequest(handle, pack(prompt), params))
    decode_plan, decode_result = Decoder(ToWorker).decode, Decoder(FromWorker).decode
    decode_news = Decoder(TokenBatch).decode

    clock, size = Clock(), 0
    for step in range(steps + 1):
        clock.start()
        planned = scheduler.plan()
        assert planned is not None
        plan, payload = planned
        clock.lap("router: plan")
        header = encode(plan)
        clock.lap("router: encode the plan")
        message = decode_plan(header)
        clock.lap("worker: decode the plan")
        arrays = rows.advance(message, payload)  # type: ignore[arg-type]
        clock.lap("worker: row arithmetic")
        result = encode(StepResult(plan.step, pack(rng.integers(0, 10000, len(arrays.rows)))))
        clock.start()
        reply = decode_result(result)
        scheduler.commit(reply)  # type: ignore[arg-type]
        clock.lap("router: commit")
        news = scheduler.take_outbox()
        frame = encode(news)
        clock.lap("router: encode the news")
        batch = decode_news(frame)
        unpack(batch.handles), unpack(batch.tokens)
        clock.lap("detokenizer: decode the news")
        if step == 0:  # the prefill
            assert plan.num_decode == 0 and plan.num_rows == num_rows
            clock.times.clear()
        else:
            assert plan.num_decode == num_rows
            size = len(header) + len(payload)
    return clock.medians(), size


def _echo(path: str) -> None:
    link = connect(path)
    while (message := link.recv_bytes()) != b"end":
        link.send_bytes(message)


def round_trip(size: int, times: int = 500) -> float:
    """µs for a message of that size to another process and back, as between router and worker."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/workers"
        process = multiprocessing.get_context("spawn").Process(target=_echo, args=(path,))
        process.start()
        link = next(listen(path))
        clock = Clock()
        for _ in range(times):
            clock.start()
            link.send_bytes(bytes(size))
            link.recv_bytes()
            clock.lap("there and back")
        link.send_bytes(b"end")
        process.join()
    return clock.medians()["there and back"]


def profile(model: str, num_rows: int, context: int, steps: int, flags: list[str]) -> dict:
    """µs of each part of a real engine's step, by "lane: what"."""
    engine = make_engine("sglang", model, model in CONFIGS, flags)
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, 10000, (num_rows, context)).tolist()
    try:
        engine.generate(prompts, [8] * num_rows, 0.0)
        engine.llm.start_profile()
        engine.generate(prompts, [steps] * num_rows, 0.0)
        with tempfile.TemporaryDirectory() as folder:
            events = json.loads(Path(engine.llm.stop_profile(folder)).read_text())["traceEvents"]
    finally:
        engine.close()
    lanes = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in events
        if event["name"] == "thread_name"
    }
    times: dict[str, list[float]] = {}
    for event in events:
        if event["ph"] == "X":
            lane = lanes[event["pid"], event["tid"]]
            times.setdefault(f"{lane}: {event['name']}", []).append(event["dur"])
    return {name: statistics.median(us) for name, us in times.items()}


def show(figures: dict[str, float], side: str, limit: float | None = None) -> None:
    """The parts of one side, and their sum beside what it should be at most."""
    parts = {name: us for name, us in figures.items() if name.startswith(f"{side}:")}
    for name, us in parts.items():
        print(f"{name:32} {us:8.1f} us")
    if len(parts) > 1 or limit is not None:
        total = sum(parts.values())
        verdict = "" if limit is None else f"   {'under' if total < limit else 'OVER'} {limit:.0f}"
        print(f"{side + ', together':32} {total:8.1f} us{verdict}")


def main() -> None:
    lines = __doc__.splitlines()
    parser = argparse.ArgumentParser(
        description=lines[0],
        epilog="\n".join(lines[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--engine", help="a model, as in benchmarks/offline.py")
    parser.add_argument("--rows", type=int, default=256, help="requests that decode (default: 256)")
    parser.add_argument("--context", type=int, default=500, help="their length (default: 500)")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--json", help="write the figures here")
    args, flags = parser.parse_known_args()
    if flags and not args.engine:
        parser.error(f"unknown argument {flags[0]}, unless there is an --engine")
    torch.set_num_threads(1)
    figures, size = decode_steps(args.rows, args.context, args.steps)
    show(figures, "router", ROUTER_US)
    show(figures, "worker")
    show(figures, "detokenizer")
    figures["round trip"] = round_trip(size)
    print(f"{f'round trip of {size} bytes':32} {figures['round trip']:8.1f} us")
    if args.engine:
        print(f"\nin an engine ({args.engine}), {args.rows} requests:")
        measured = profile(args.engine, args.rows, args.context, args.steps, flags)
        show(measured, "router", ROUTER_US)
        on_gpu = any(name.startswith("GPU:") for name in measured)
        show(measured, "launch", LAUNCH_US if on_gpu else None)  # a CPU does the work there
        show(measured, "reply")
        show(measured, "GPU")
        figures |= {f"engine, {name}": us for name, us in measured.items()}
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
