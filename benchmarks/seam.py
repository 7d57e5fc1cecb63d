"""What a steady decode step costs beside the model, in microseconds of one CPU core:

    python benchmarks/seam.py --rows 256

The router's side (plan, encode, commit, news for the detokenizer), the worker's side up to the copy
to the device (decode, row arithmetic), and a round trip between two processes. Everything here is
NumPy and msgpack, so no GPU is needed to measure it. Medians.
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
import zmq

from sglang.addresses import bind_inbox, connect_outbox
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


def _echo(folder: str) -> None:
    context = zmq.Context()
    inbox = bind_inbox(context, f"ipc://{folder}/there")
    outbox = connect_outbox(context, f"ipc://{folder}/back")
    while (frame := inbox.recv()) != b"end":
        outbox.send(frame)


def round_trip(size: int, times: int = 500) -> float:
    """µs for a message of that size to another process and back."""
    with tempfile.TemporaryDirectory() as folder:
        context = zmq.Context()
        inbox = bind_inbox(context, f"ipc://{folder}/back")
        outbox = connect_outbox(context, f"ipc://{folder}/there")
        process = multiprocessing.get_context("spawn").Process(target=_echo, args=(folder,))
        process.start()
        clock = Clock()
        for _ in range(times):
            clock.start()
            outbox.send(bytes(size))
            inbox.recv()
            clock.lap("there and back")
        outbox.send(b"end")
        process.join()
        context.destroy(linger=0)
    return clock.medians()["there and back"]


def main() -> None:
    lines = __doc__.splitlines()
    parser = argparse.ArgumentParser(
        description=lines[0],
        epilog="\n".join(lines[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=256, help="requests that decode (default: 256)")
    parser.add_argument("--context", type=int, default=500, help="their length (default: 500)")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--json", help="write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures, size = decode_steps(args.rows, args.context, args.steps)
    for side in ("router", "worker", "detokenizer"):
        parts = {name: us for name, us in figures.items() if name.startswith(side)}
        for name, us in parts.items():
            print(f"{name:32} {us:8.1f} us")
        if len(parts) > 1:
            print(f"{side + ', together':32} {sum(parts.values()):8.1f} us")
    figures["round trip"] = round_trip(size)
    print(f"{f'round trip of {size} bytes':32} {figures['round trip']:8.1f} us")
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
