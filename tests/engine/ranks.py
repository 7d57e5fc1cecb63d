"""Tensor-parallel ranks as processes, without a router's: each has a scheduler of its own, and as
these make the same plans, no rank can tell."""

from __future__ import annotations

import multiprocessing
import tempfile
from multiprocessing.connection import Connection

import torch

from sglang.sampling_params import SamplingParams
from sglang.server_args import ServerArgs
from sglang.worker.parallel import TensorParallel
from tests.engine.inprocess import InProcessEngine

NUM_TOKENS = 12
"""Of an answer."""


def params_of(i: int) -> SamplingParams:
    """Greedy, a draw from all tokens, a draw from some, and greedy with a memory: in turn."""
    kinds = [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": i},
        {"temperature": 1.0, "seed": i, "top_k": 20, "top_p": 0.9},
        {"temperature": 0.0, "frequency_penalty": 0.5},
    ]
    return SamplingParams(max_new_tokens=NUM_TOKENS, ignore_eos=True, **kinds[i % 4])


def outputs_of(path: str, prompts: list[list[int]], tp: TensorParallel) -> list[list[int]]:
    """The model's answers to prompts that are all there at once, come in chunks, and find slots for
    no more than half of them."""
    args = ServerArgs(
        model_path=path, device="cpu", dtype="float32", max_total_tokens=512, tp_size=tp.size,
        context_length=256, max_running_requests=16, check_ranks=True,
    )  # fmt: skip
    engine = InProcessEngine(args, tp=tp)
    num_slots = sum(len(prompt) + NUM_TOKENS for prompt in prompts) // 2
    scheduler = engine.scheduler(num_slots=num_slots, chunk_size=16, conservativeness=0.0)
    outputs = engine.generate(scheduler, prompts, [params_of(i) for i in range(len(prompts))])
    assert scheduler.stats().preemptions > 0
    return outputs


def outputs_of_ranks(size: int, work: list[tuple[str, list[list[int]]]]) -> list:
    """What outputs_of gives for each (path, prompts), on `size` ranks: of every rank a list."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(size):
            ours, theirs = context.Pipe(duplex=False)
            args = (rank, size, f"{folder}/rendezvous", work, theirs)
            process = context.Process(target=_run, args=args, daemon=True)
            process.start()
            theirs.close()
            ranks.append((process, ours))
        try:
            return [connection.recv() for _, connection in ranks]
        finally:
            for process, _ in ranks:
                process.kill()
                process.join()


def _run(rank: int, size: int, rendezvous: str, work: list, results: Connection) -> None:
    torch.set_num_threads(1)
    tp = TensorParallel.join(rank, size, rendezvous, torch.device("cpu"))
    results.send([outputs_of(path, prompts, tp) for path, prompts in work])
