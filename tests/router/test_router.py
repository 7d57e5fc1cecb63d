"""The router's loop, over real sockets: the tests are its neighbours."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import zmq

from sglang.addresses import Addresses, bind_inbox, connect, connect_outbox
from sglang.messages import (
    Decoder,
    GenerateRequest,
    GetStats,
    Stats,
    StepPlan,
    StepResult,
    StreamFinished,
    TokenBatch,
    ToRouter,
    WorkerReady,
    encode,
    pack,
    unpack,
)
from sglang.router.grammar import Grammars
from sglang.router.router import BYTES_AT_A_TIME, Router, Workers
from sglang.router.scheduler import Scheduler
from sglang.sampling_params import SamplingParams

DEPTH = 2
SECONDS = 5
"""So long a test waits for a message."""
PROMPT_LEN = 1024
AT_A_TIME = BYTES_AT_A_TIME // (4 * PROMPT_LEN)
"""Prompts that the router takes in at a time."""
NUM_PROMPTS = 15 * AT_A_TIME
NUM_FIRST = 11 * AT_A_TIME
"""The others are more than a Unix socket's buffer holds."""


def run_router(addresses: Addresses) -> None:
    """As in sglang/router/router.py, without a model."""
    workers = Workers(addresses, num_ranks=1, spin=False)
    ready = workers.wait_ready()
    scheduler = Scheduler(
        num_slots=ready.num_slots,
        num_rows=ready.max_running_requests,
        max_len=2 * PROMPT_LEN,
        chunk_size=ready.chunked_prefill_size,
    )
    grammars = Grammars(lambda: pytest.fail("nothing here has a grammar"))
    Router(zmq.Context(), addresses, workers, scheduler, grammars, DEPTH).run()


class Neighbours:
    """Tokenizer manager, model worker and detokenizer of a router that runs in a thread. Its loop
    begins when the detokenizer connects."""

    def __init__(self, folder: str, chunk_size: int) -> None:
        self._addresses = Addresses(folder)
        self._inbox = bind_inbox(zmq.Context(), self._addresses.tokenizer_manager)
        threading.Thread(target=run_router, args=(self._addresses,), daemon=True).start()
        self._worker = connect(self._addresses.workers)
        num_slots = NUM_PROMPTS * 2 * PROMPT_LEN
        self._worker.send_bytes(encode(WorkerReady(0, num_slots, NUM_PROMPTS, chunk_size)))

    def send(self, *messages: ToRouter) -> None:
        """As the tokenizer manager. When it returns, the router's inbox has them, but for what a
        socket's buffer holds."""
        with zmq.Context() as context, connect_outbox(context, self._addresses.router) as outbox:
            outbox.linger = -1
            for message in messages:
                outbox.send(encode(message))

    def waits_for_stats(self) -> bool:
        return bool(self._inbox.poll(1000 * SECONDS))

    def receive_stats(self) -> Stats:
        assert self.waits_for_stats(), "no stats came"
        return Decoder(Stats).decode(self._inbox.recv())

    def receive_plan(self) -> tuple[StepPlan, int]:
        """And how many rows sample."""
        assert self._worker.poll(SECONDS), "no plan came"
        plan = Decoder(StepPlan).decode(self._worker.recv_bytes())
        num_prefill = plan.num_rows - plan.num_decode
        samples = unpack(self._worker.recv_bytes())[plan.num_rows + num_prefill :][:num_prefill]
        return plan, plan.num_decode + int(samples.sum())

    def reply(self, step: int, num_tokens: int) -> None:
        """Every token is the step's number."""
        self._worker.send_bytes(encode(StepResult(step, pack([step] * num_tokens))))

    def connect_detokenizer(self) -> None:
        self._detokenizer = connect(self._addresses.detokenizer)

    def receive_news(self) -> TokenBatch:
        assert self._detokenizer.poll(SECONDS), "no news came"
        return Decoder(TokenBatch).decode(self._detokenizer.recv_bytes())

    def receive_ends(self, count: int) -> list[StreamFinished]:
        ends: list[StreamFinished] = []
        while len(ends) < count:
            ends += self.receive_news().finished
        return ends


def send_burst(neighbours: Neighbours) -> None:
    """All of it before the loop begins. The first prompts have been taken in when stats come."""
    ids = np.arange(NUM_PROMPTS * PROMPT_LEN).reshape(NUM_PROMPTS, PROMPT_LEN)
    params = SamplingParams(max_new_tokens=1)
    requests = [GenerateRequest(handle, pack(ids[handle]), params) for handle in range(NUM_PROMPTS)]
    neighbours.send(*requests[:NUM_FIRST], GetStats(), *requests[NUM_FIRST:])
    neighbours.connect_detokenizer()


def test_what_has_arrived_is_taken_in_beside_a_step_and_fills_the_next_ones(tmp_path):
    # More than what is taken in twice: so often the loop comes by the inbox between two steps.
    chunk_size = 3 * AT_A_TIME * PROMPT_LEN
    neighbours = Neighbours(str(tmp_path), chunk_size)
    send_burst(neighbours)
    steps = [neighbours.receive_plan() for _ in range(DEPTH)]
    neighbours.waits_for_stats()  # if they do not come, the sizes say why
    sizes = [plan.num_prefill_tokens for plan, _ in steps]
    while sum(sizes) < NUM_PROMPTS * PROMPT_LEN:
        plan, num_tokens = steps[-DEPTH]
        neighbours.reply(plan.step, num_tokens)
        steps.append(neighbours.receive_plan())
        sizes.append(steps[-1][0].num_prefill_tokens)
    for plan, num_tokens in steps[-DEPTH:]:
        neighbours.reply(plan.step, num_tokens)
    ends = neighbours.receive_ends(NUM_PROMPTS)
    assert {(end.handle, end.reason) for end in ends} == {(i, "length") for i in range(NUM_PROMPTS)}
    assert set(sizes[DEPTH:-1]) == {chunk_size}, f"steps have {sizes} tokens"


def test_a_result_does_not_wait_until_all_that_has_arrived_is_taken_in(tmp_path):
    neighbours = Neighbours(str(tmp_path), chunk_size=PROMPT_LEN)
    for step in range(NUM_PROMPTS):
        neighbours.reply(step, 1)
    send_burst(neighbours)
    assert neighbours.receive_stats().steps > DEPTH
    for _ in range(NUM_PROMPTS):
        neighbours.receive_plan()
    neighbours.receive_ends(NUM_PROMPTS)


def test_a_detokenizer_that_is_behind_holds_up_no_step_and_gets_all_news_in_one(tmp_path):
    num_tokens = 20
    neighbours = Neighbours(str(tmp_path), chunk_size=PROMPT_LEN)
    neighbours.connect_detokenizer()
    params = SamplingParams(max_new_tokens=num_tokens, stop=["x" * (1 << 20)])
    neighbours.send(GenerateRequest(7, pack([1, 2, 3]), params))
    for step in range(num_tokens):
        plan, count = neighbours.receive_plan()
        assert (plan.step, count) == (step, 1)
        neighbours.reply(step, 1)
    neighbours.send(GetStats())
    while neighbours.receive_stats().generated_tokens < num_tokens:
        time.sleep(0.001)
        neighbours.send(GetStats())
    first, second = neighbours.receive_news(), neighbours.receive_news()
    assert unpack(first.tokens).tolist() == [0]
    assert unpack(second.tokens).tolist() == list(range(1, num_tokens))
    assert [end.handle for end in second.finished] == [7]
