"""A model worker process: plans in, sampled tokens out."""

from __future__ import annotations

import os
import threading
from queue import SimpleQueue

import torch
import zmq

from sglang.addresses import Addresses, bind_inbox, connect_outbox
from sglang.messages import Decoder, Shutdown, ToWorker, WorkerReady, encode
from sglang.model_config import ModelConfig
from sglang.processes import start_heartbeat
from sglang.server_args import ServerArgs
from sglang.worker.parallel import TensorParallel
from sglang.worker.runner import ModelRunner, PendingStep

IDLE_POLL_MS = 1000


class Replies:
    """The reply thread: waits for each step's tokens and sends them, while the launch thread is
    already at the next step. A socket belongs to one thread, so it is made there.

    A rank that says nothing waits too: it would not notice otherwise what went wrong on its GPU,
    and the others would wait for it for ever."""

    def __init__(self, device: torch.device, context: zmq.Context, address: str | None) -> None:
        """address: None on the ranks that say nothing."""
        self._steps: SimpleQueue[PendingStep] = SimpleQueue()
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
                result = self._steps.get().wait()
                if socket is not None:
                    socket.send(encode(result))
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
    replies = None
    if device.type == "cuda":
        replies = Replies(device, context, addresses.results if rank == 0 else None)
    if results is not None:
        ready = WorkerReady(runner.kv_cache.num_slots, runner.rows.num_rows, runner.chunk_size)
        results.send(encode(ready))

    start_heartbeat()
    decoder = Decoder(ToWorker)
    while True:
        while not inbox.poll(IDLE_POLL_MS):
            if replies is not None:
                replies.check()
        header, *payload = inbox.recv_multipart()
        message = decoder.decode(header)
        if isinstance(message, Shutdown):
            return
        step = runner.launch(message, payload[0])
        if replies is not None:
            replies.put(step)
        elif results is not None:
            results.send(encode(step.wait()))
