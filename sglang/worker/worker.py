"""A model worker process: plans in, sampled tokens out."""

from __future__ import annotations

import contextlib
import os
import threading
from queue import SimpleQueue

import torch
import zmq

from sglang.addresses import Addresses, bind_inbox, connect_outbox
from sglang.messages import (
    Decoder,
    Shutdown,
    StartProfile,
    StopProfile,
    ToWorker,
    WorkerReady,
    encode,
)
from sglang.model_config import ModelConfig
from sglang.processes import start_heartbeat
from sglang.server_args import ServerArgs
from sglang.spans import Lane, Recorder
from sglang.worker.gpu_spans import GPUSpans
from sglang.worker.parallel import TensorParallel
from sglang.worker.runner import ModelRunner, PendingStep

IDLE_POLL_MS = 1000


class Replies:
    """The reply thread: waits for each step's tokens and sends them, while the launch thread is
    already at the next step. A socket belongs to one thread, so it is made there.

    A rank that says nothing waits too: it would not notice otherwise what went wrong on its GPU,
    and the others would wait for it for ever."""

    def __init__(
        self,
        device: torch.device,
        context: zmq.Context,
        address: str | None,
        lane: Lane,
        gpu_spans: GPUSpans,
    ) -> None:
        """address: None on the ranks that say nothing."""
        self._steps: SimpleQueue[PendingStep] = SimpleQueue()
        self._lane, self._gpu_spans = lane, gpu_spans
        self._failure: BaseException | None = None
        args = (device, context, address)
        self._thread = threading.Thread(target=self._run, args=args, name="reply", daemon=True)
        self._thread.start()

    def put(self, step: PendingStep) -> None:
        self._steps.put(step)

    def check(self) -> None:
        """Raises, on the launch thread, what ended the reply thread."""
        if self._failure is not None:
            raise self._failure

    def _run(self, device: torch.device, context: zmq.Context, address: str | None) -> None:
        try:
            torch.cuda.set_device(device)  # of this thread: it would be the first GPU
            socket = None if address is None else connect_outbox(context, address)
            while True:
                step = self._steps.get()
                self._lane.skip()
                result = step.wait()
                self._lane.lap("wait", step.step)
                if socket is not None:
                    socket.send(encode(result))
                self._lane.lap("reply", step.step)
                self._gpu_spans.tell(step.step)
        except BaseException as failure:
            self._failure = failure


def run_worker(args: ServerArgs, config: ModelConfig, addresses: Addresses, rank: int) -> None:
    """Serves until it is told to shut down. Rank 0 speaks for all."""
    device = torch.device(config.device, rank if config.device == "cuda" else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(len(os.sched_getaffinity(0)) // args.tp_size, 1))
    context = zmq.Context()
    inbox = bind_inbox(context, addresses.worker(rank))
    results = connect_outbox(context, addresses.results) if rank == 0 else None
    rendezvous = os.path.join(addresses.folder, "ranks")
    custom = not args.disable_custom_all_reduce
    tp = TensorParallel.join(rank, args.tp_size, rendezvous, device, custom)
    runner = ModelRunner(args, config, tp)
    recorder = Recorder(f"model worker {rank}", 2 + rank, addresses.folder)
    lane, replies, timed = recorder.lane("launch"), None, contextlib.nullcontext
    if device.type == "cuda":
        gpu_spans, reply_lane = GPUSpans(recorder.lane("GPU")), recorder.lane("reply")
        address = addresses.results if rank == 0 else None
        replies = Replies(device, context, address, reply_lane, gpu_spans)
        timed = gpu_spans.step
    if results is not None:
        ready = WorkerReady(runner.kv_cache.num_slots, runner.rows.num_rows, runner.chunk_size)
        results.send(encode(ready))

    start_heartbeat()
    decoder = Decoder(ToWorker)
    while True:
        while not inbox.poll(IDLE_POLL_MS):
            if replies is not None:
                replies.check()
        lane.skip()
        header, *payload = inbox.recv_multipart()
        message = decoder.decode(header)
        if isinstance(message, Shutdown):
            return
        if isinstance(message, StartProfile | StopProfile):
            recorder.handle(message)
            continue
        lane.lap("receive", message.step)
        with timed(message.step):
            step = runner.launch(message, payload[0])
        if replies is not None:
            replies.put(step)
        lane.lap("launch", message.step)
        if replies is None and results is not None:
            results.send(encode(step.wait()))
            lane.lap("reply", message.step)
