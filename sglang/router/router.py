"""The router process: requests in, plans to the workers, tokens to the detokenizer."""

from __future__ import annotations

import time

import zmq

from sglang.addresses import (
    SPIN_SECONDS,
    Addresses,
    Link,
    bind_inbox,
    connect_outbox,
    listen,
    stay_awake,
)
from sglang.messages import (
    AbortRequest,
    Decoder,
    EngineReady,
    FlushCache,
    FlushCacheReply,
    FromWorker,
    GenerateRequest,
    GetStats,
    StartProfile,
    StepPlan,
    StepResult,
    StopProfile,
    ToRouter,
    WorkerReady,
    encode,
)
from sglang.model_config import ModelConfig
from sglang.processes import start_heartbeat
from sglang.router.grammar import Grammars, grammar_kind, load_tokenizer
from sglang.router.scheduler import Scheduler
from sglang.server_args import ServerArgs
from sglang.spans import Recorder

POLL_MS = 2
BYTES_AT_A_TIME = 1 << 16
"""Of messages, taken in before there is another plan: some 300 short prompts, or 16,384 tokens."""


class Workers:
    """The model workers, all ranks, as the router sees them: plans go out, results come back."""

    def __init__(self, addresses: Addresses, num_ranks: int, spin: bool) -> None:
        """spin: stay awake while they compute."""
        self._address = addresses.workers
        self._num_ranks = num_ranks
        self.spins = spin
        self._links: list[Link] = []  # by rank
        self._decoder = Decoder(FromWorker)

    def wait_ready(self) -> WorkerReady:
        """All of them; what they say of themselves is the same."""
        arriving = listen(self._address)
        links: dict[int, Link] = {}
        while True:
            link = next(arriving)
            ready = self._decoder.decode(link.recv_bytes())
            assert isinstance(ready, WorkerReady)
            links[ready.rank] = link
            if len(links) == self._num_ranks:
                self._links = [links[rank] for rank in range(self._num_ranks)]
                self._links[0].spins = self.spins
                return ready

    def send(self, plan: StepPlan, payload: bytes) -> None:
        """The same bytes to every rank."""
        header = encode(plan)
        for link in self._links:
            link.send_bytes(header, payload)

    def tell(self, message: StartProfile | StopProfile) -> None:
        for link in self._links:
            link.send_bytes(encode(message))

    def has_result(self) -> bool:
        return self._links[0].poll()

    def recv(self) -> StepResult:
        result = self._decoder.decode(self._links[0].recv_bytes())
        assert isinstance(result, StepResult)
        return result


class Router:
    """The loop. `depth` steps are in flight at most: 2 hides the round trip behind the running step
    (overlap scheduling), 1 is synchronous."""

    def __init__(
        self,
        context: zmq.Context,
        addresses: Addresses,
        workers: Workers,
        scheduler: Scheduler,
        grammars: Grammars,
        depth: int,
    ) -> None:
        self._requests = bind_inbox(context, addresses.router)
        self._readers = listen(addresses.detokenizer)
        self._tokenizer_manager = connect_outbox(context, addresses.tokenizer_manager)
        self._workers = workers
        self._scheduler = scheduler
        self._grammars = grammars
        self._depth = depth
        self._decoder = Decoder(ToRouter)
        self._recorder = Recorder("router", 1, addresses.folder)
        self._lane = self._recorder.lane("router")

    def announce(self, ready: EngineReady) -> None:
        self._tokenizer_manager.send(encode(ready))

    def run(self) -> None:
        scheduler, lane = self._scheduler, self._lane
        self._detokenizer = next(self._readers)
        while True:
            is_more = self._receive(wait=scheduler.is_idle())
            for request, grammar in self._grammars.done():
                scheduler.add(request, grammar)
                if grammar is None:
                    scheduler.abort([request.handle])
            lane.lap("receive")
            # While the workers compute, what else has arrived is taken in.
            is_time = not is_more or self._workers.has_result()
            if not self._plan() and scheduler.flying and is_time:
                self._finish_step()
            self._tell_detokenizer()

    def _finish_step(self) -> None:
        """Waits for the result of the oldest step in flight."""
        scheduler, lane = self._scheduler, self._lane
        if self._grammars.num_compiled:
            while not self._workers.has_result() and scheduler.follow_grammar():
                pass
        result = self._workers.recv()
        lane.skip()
        flight = scheduler.take_in(result)
        lane.lap("take in", result.step)
        self._tell_detokenizer()
        for _ in scheduler.put_away(flight):
            if not scheduler.flying:  # the workers wait
                self._plan()
        lane.lap("put away", result.step)

    def _plan(self) -> bool:
        """Sends the workers another step; False: there is none, or enough are in flight."""
        scheduler, lane = self._scheduler, self._lane
        if len(scheduler.flying) >= self._depth or (step := scheduler.plan()) is None:
            return False
        lane.lap("plan", step[0].step)
        self._workers.send(*step)
        lane.lap("send", step[0].step)
        return True

    def _tell_detokenizer(self) -> None:
        """Without waiting for it: if it has no room for more, it will get all the news in one."""
        self._detokenizer.flush()
        if self._detokenizer.is_behind:
            return
        if (news := self._scheduler.take_outbox()) is not None:
            self._detokenizer.post(encode(news))
            self._lane.lap("tell the detokenizer")

    def _wait(self) -> None:
        if self._grammars.num_pending or self._detokenizer.is_behind:
            self._requests.poll(POLL_MS)
            return
        end = time.perf_counter() + SPIN_SECONDS
        if not (self._workers.spins and stay_awake(lambda: self._requests.poll(0), end)):
            self._requests.poll()

    def _receive(self, wait: bool) -> bool:
        """Takes in what has arrived, BYTES_AT_A_TIME of it; whether there may be more. With `wait`,
        waits for something to arrive, a grammar that is being compiled, or room for news."""
        if wait:
            self._wait()
            self._lane.skip()
        num_bytes = 0
        while num_bytes < BYTES_AT_A_TIME:
            try:
                frame = self._requests.recv(zmq.NOBLOCK)
            except zmq.Again:
                return False
            num_bytes += len(frame)
            match self._decoder.decode(frame):
                case GenerateRequest() as request if grammar_kind(request.params) is not None:
                    self._grammars.submit(request)
                case GenerateRequest() as request:
                    self._scheduler.add(request)
                case AbortRequest() as abort:
                    for request in self._grammars.drop(abort.handles):
                        self._scheduler.add(request)
                    self._scheduler.abort(abort.handles, abort.silent)
                case FlushCache():
                    ok = self._scheduler.flush_cache()
                    self._tokenizer_manager.send(encode(FlushCacheReply(ok)))
                case GetStats():
                    stats = self._scheduler.stats()
                    stats.queued += self._grammars.num_pending
                    stats.grammars = self._grammars.num_compiled
                    stats.grammar_seconds = self._grammars.seconds
                    self._tokenizer_manager.send(encode(stats))
                case StartProfile() | StopProfile() as message:
                    self._workers.tell(message)
                    self._recorder.handle(message)
        return True


def run_router(args: ServerArgs, model: ModelConfig, addresses: Addresses) -> None:
    """Serves until its process is ended. It needs no more of the model than a few numbers."""
    context = zmq.Context()
    workers = Workers(addresses, args.tp_size, spin=model.device == "cuda")
    ready = workers.wait_ready()
    scheduler = Scheduler(
        num_slots=ready.num_slots,
        num_rows=ready.max_running_requests,
        max_len=model.context_len,
        chunk_size=ready.chunked_prefill_size,
        policy=args.schedule_policy,
        conservativeness=args.schedule_conservativeness,
        eos=model.eos_token_ids,
        disable_radix_cache=args.disable_radix_cache,
        seed=args.random_seed or 0,
    )
    grammars = Grammars(lambda: load_tokenizer(args, model))
    router = Router(context, addresses, workers, scheduler, grammars, args.overlap_depth)
    router.announce(EngineReady(ready.num_slots, ready.max_running_requests, model.context_len))
    start_heartbeat()
    if args.grammar_backend != "none" and not args.skip_tokenizer_init:
        grammars.prepare()
    router.run()
