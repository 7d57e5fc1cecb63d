"""A model worker process: plans in, sampled tokens out."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue

import torch

from sglang.addresses import Addresses, Link, connect
from sglang.messages import Decoder, StartProfile, StopProfile, ToWorker, WorkerReady, encode
from sglang.model_config import ModelConfig
from sglang.processes import start_heartbeat
from sglang.server_args import ServerArgs
from sglang.spans import Lane, Recorder
from sglang.worker.gpu_spans import GPUSpans
from sglang.worker.parallel import TensorParallel
from sglang.worker.runner import ModelRunner, PendingStep

IDLE_SECONDS = 1.0


class Replies:
    """The reply thread: waits for each step's tokens and sends them, while the launch thread is
    already at the next step, and reads what the router sends whatever happens here.

    A rank that says nothing waits too: it would not notice otherwise what went wrong on its GPU,
    and the others would wait for it for ever."""

    def __init__(
        self,
        device: torch.device,
        link: Link | None,
        lane: Lane,
        gpu_spans: GPUSpans | None,
    ) -> None:
        """link: None on the ranks that say nothing. gpu_spans: None on a CPU."""
        self._steps: SimpleQueue[PendingStep] = SimpleQueue()
        self._link, self._lane, self._gpu_spans = link, lane, gpu_spans
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(device,), name="reply", daemon=True)
        self._thread.start()

    def put(self, step: PendingStep) -> None:
        self._steps.put(step)

    def check(self) -> None:
        """Raises, on the launch thread, what ended the reply thread."""
        if self._failure is not None:
            raise self._failure

    def _run(self, device: torch.device) -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # of this thread: it would be the first GPU
            while True:
                step = self._steps.get()
                self._lane.skip()
                result = step.wait()
                self._lane.lap("wait", step.step)
                if self._link is not None:
                    self._link.send_bytes(encode(result))
                self._lane.lap("reply", step.step)
                if self._gpu_spans is not None:
                    self._gpu_spans.tell(step.step)
        except BaseException as failure:
            self._failure = failure


def run_worker(args: ServerArgs, config: ModelConfig, addresses: Addresses, rank: int) -> None:
    """Serves until its process is ended. Rank 0 speaks for all."""
    device = torch.device(config.device, rank if config.device == "cuda" else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(len(os.sched_getaffinity(0)) // args.tp_size, 1))
    rendezvous = os.path.join(addresses.folder, "ranks")
    custom = not args.disable_custom_all_reduce
    tp = TensorParallel.join(rank, args.tp_size, rendezvous, device, custom)
    runner = ModelRunner(args, config, tp)
    recorder = Recorder(f"model worker {rank}", 2 + rank, addresses.folder)
    lane, gpu_spans, timed = recorder.lane("launch"), None, contextlib.nullcontext
    if device.type == "cuda":
        gpu_spans = GPUSpans(recorder.lane("GPU"))
        timed = gpu_spans.step
    link = connect(addresses.workers)
    link.spins = device.type == "cuda"
    replies = Replies(device, link if rank == 0 else None, recorder.lane("reply"), gpu_spans)
    ready = WorkerReady(rank, runner.kv_cache.num_slots, runner.rows.num_rows, runner.chunk_size)
    link.send_bytes(encode(ready))

    start_heartbeat()
    _serve(runner, link, replies, recorder, lane, timed)


@torch.inference_mode()  # once: to enter it takes longer than much of what a step does
def _serve(
    runner: ModelRunner,
    link: Link,
    replies: Replies,
    recorder: Recorder,
    lane: Lane,
    timed: Callable[[int], contextlib.AbstractContextManager],
) -> None:
    """The launch thread's loop."""
    decoder = Decoder(ToWorker)
    while True:
        while not link.poll(IDLE_SECONDS):
            replies.check()
        lane.skip()
        message = decoder.decode(link.recv_bytes())
        if isinstance(message, StartProfile | StopProfile):
            recorder.handle(message)
            continue
        payload = link.recv_bytes()
        lane.lap("receive", message.step)
        with timed(message.step):
            lane.skip()
            step = runner.launch(message, payload)
            lane.lap("launch", message.step)
        replies.put(step)
