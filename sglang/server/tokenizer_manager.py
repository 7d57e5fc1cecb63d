"""The tokenizer manager: requests to the router, text to whoever reads it.

It lives in the HTTP server's event loop. On the way back there is one message a step; each delta in
it is added to its sequence, and a reader that waits is woken. A reader that is slow finds several
tokens' text in one piece: nothing queues.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import zmq

from sglang.addresses import Addresses, bind_inbox, connect_outbox
from sglang.messages import (
    AbortRequest,
    Decoder,
    EngineReady,
    FlushCache,
    FlushCacheReply,
    GetStats,
    Pooling,
    PromptLogprobs,
    Stats,
    StreamDelta,
    StreamEnd,
    TextBatch,
    TokenLogprob,
    ToTokenizerManager,
    encode,
    unpack,
)
from sglang.sampling_params import SamplingParams
from sglang.server.limits import NO_LOGPROBS, Limits, LogprobsWanted
from sglang.server.metrics import Metrics
from sglang.spans import Profile

logger = logging.getLogger(__name__)
T = TypeVar("T")


class GenerationClosed(Exception):
    """Its reader has gone."""


class Sequence:
    """One sequence of a generation: what it has said that its reader has not taken yet."""

    __slots__ = (
        "cached_tokens", "embedding", "end", "first_at", "generation", "handle", "ids", "index",
        "is_news", "last_at", "logprobs", "num_taken", "prompt_logprobs", "prompt_tokens", "rid",
        "text",
    )  # fmt: skip

    def __init__(
        self, generation: Generation, rid: str, index: int, handle: int, prompt_len: int
    ) -> None:
        self.generation = generation
        self.rid = rid
        """The generation's, or its prompt's own."""
        self.index = index
        self.handle = handle
        self.text = ""
        self.ids = bytearray()
        """int32 tokens, packed."""
        self.logprobs: list[TokenLogprob] = []
        """Of all tokens, if the request wants them..."""
        self.num_taken = 0
        """...and of how many `take_logprobs` has told."""
        self.prompt_logprobs: list[PromptLogprobs] = []
        self.embedding = b""
        """float32[hidden_size], packed, if the request wants one."""
        self.prompt_tokens = prompt_len
        self.cached_tokens = 0
        self.first_at = self.last_at = 0.0
        """When its first token came, and its latest."""
        self.end: StreamEnd | None = None
        self.is_news = False

    def take_text(self) -> str:
        text, self.text = self.text, ""
        return text

    def take_logprobs(self, keep_stop: bool = False) -> list[tuple[int, TokenLogprob]]:
        """The tokens since the last call, with their logprobs. keep_stop: also the stop token."""
        end = len(self.logprobs)
        if self.end is not None and isinstance(self.end.matched, int) and not keep_stop:
            end -= 1
        start, self.num_taken = self.num_taken, max(end, self.num_taken)
        ids = unpack(self.ids)[start:end].tolist()
        return list(zip(ids, self.logprobs[start:end], strict=True))


class Generation:
    """The sequences of one request, and its reader's place to wait."""

    def __init__(self, manager: TokenizerManager, rid: str, wants_deltas: bool) -> None:
        self.rid = rid
        self.sequences: list[Sequence] = []
        self.start = time.monotonic()
        self._manager = manager
        self._wants_deltas = wants_deltas
        self._open = 0
        self._news: list[Sequence] = []
        self._waiter: asyncio.Future[None] | None = None
        self._closed = False
        self._timer: asyncio.TimerHandle | None = None
        self.timed_out = False
        self.is_counted = True
        """In the metrics."""
        self.on_close: Callable[[Generation], None] | None = None

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes it if it could not be answered; else whoever answers does."""
        if kind is not None:
            self.close()

    def expire_after(self, seconds: float) -> None:
        """Closes it then, as `timed_out`."""
        self._timer = asyncio.get_running_loop().call_later(seconds, self._expire)

    def _expire(self) -> None:
        if self._open:
            self.timed_out = True
            self.close()

    @property
    def is_open(self) -> bool:
        return self._open > 0

    @property
    def rids(self) -> set[str]:
        return {self.rid, *(sequence.rid for sequence in self.sequences)}

    def add(self, rid: str, handle: int, prompt_len: int) -> Sequence:
        sequence = Sequence(self, rid, len(self.sequences), handle, prompt_len)
        self.sequences.append(sequence)
        self._open += 1
        return sequence

    async def news(self) -> list[Sequence]:
        """The sequences that have said something since the last call; waits for one.

        Raises GenerationClosed.
        """
        while not self._news:
            await self._wait()
        news, self._news = self._news, []
        for sequence in news:
            sequence.is_news = False
        return news

    async def finished(self) -> None:
        """Waits for the end of every sequence. Raises GenerationClosed."""
        while self._open:
            await self._wait()

    async def _wait(self) -> None:
        if self._closed:
            raise GenerationClosed
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
        if self._closed:
            raise GenerationClosed

    def close(self) -> None:
        """Nobody reads any more: what still runs is aborted. May be called at any time, twice."""
        if not self._closed:
            self._closed = True
            if self._timer is not None:
                self._timer.cancel()
            self._manager.forget(self)
            if self.on_close is not None:
                self.on_close(self)
            self._wake()

    def push(self, sequence: Sequence, delta: StreamDelta) -> None:
        """The token path."""
        sequence.text += delta.text
        sequence.ids += delta.token_ids
        if delta.prompt_tokens:  # the first one
            sequence.cached_tokens = delta.cached_tokens
            sequence.prompt_logprobs = delta.prompt_logprobs
        if delta.logprobs:
            sequence.logprobs += delta.logprobs
        if delta.end is not None:
            sequence.embedding = delta.embedding
            sequence.end = delta.end
            self._open -= 1
        if self._wants_deltas:
            if not sequence.is_news:
                sequence.is_news = True
                self._news.append(sequence)
            self._wake()
        elif not self._open:
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Inbox:
    """Calls `on_frame` for every message, within the running event loop.

    A ZeroMQ socket's descriptor says that something has happened, not that a message is there, so
    each time all that is there is received.
    """

    def __init__(self, socket: zmq.Socket, on_frame: Callable[[bytes], None]) -> None:
        self._socket, self._on_frame = socket, on_frame
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(socket.FD, self._drain)
        self._loop.call_soon(self._drain)  # what came before

    def _drain(self) -> None:
        while True:
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._on_frame(frame)
            except Exception:  # a bug, which must not leave what follows unread
                logger.exception("a message could not be handled")

    def close(self) -> None:
        self._loop.remove_reader(self._socket.FD)


class TokenizerManager:
    """Owns handles and per-request state. Made, and used, within a running event loop."""

    def __init__(self, addresses: Addresses, vocab_size: int, model_name: str = "") -> None:
        self._context = zmq.Context()
        self._router = connect_outbox(self._context, addresses.router)
        self._socket = bind_inbox(self._context, addresses.tokenizer_manager)
        self._decode = Decoder(ToTokenizerManager).decode
        self._inbox = Inbox(self._socket, self._receive)
        self._vocab_size = vocab_size
        self._limits: Limits | None = None
        self.metrics = Metrics(model_name)
        self._profile = Profile(addresses.folder)
        self._engine: asyncio.Future[EngineReady] = asyncio.get_running_loop().create_future()
        self._handles = itertools.count(1)
        self._sequences: dict[int, Sequence] = {}
        self.news_at = 0.0
        """When the engine last told of a token, on the monotonic clock."""
        self._generations: dict[str, Generation] = {}
        self._stats: deque[asyncio.Future[Stats]] = deque()
        self._flushes: deque[asyncio.Future[FlushCacheReply]] = deque()

    async def ready(self) -> EngineReady:
        """Waits until weights are loaded."""
        return await asyncio.shield(self._engine)

    @property
    def num_sequences(self) -> int:
        """Running or queued."""
        return len(self._sequences)

    @property
    def num_generations(self) -> int:
        return len(set(self._generations.values()))

    def generate(
        self,
        rid: str,
        prompts: list[tuple[list[int], SamplingParams]],
        wants_deltas: bool,
        logprobs: list[LogprobsWanted] | None = None,
        pooling: Pooling | None = None,
        rids: list[str] | None = None,
    ) -> Generation:
        """Sends the prompts to the router, if all of them are fit to be served. logprobs: of each
        prompt. rids: their own, with which each can be aborted; with `rid` all.

        Raises ValueError with a message that starts with the field's name ("prompt" for the ids).
        """
        assert self._limits is not None, "await ready() first"
        logprobs, rids = logprobs or [NO_LOGPROBS] * len(prompts), rids or [rid] * len(prompts)
        for name in (rid, *rids):
            if name in self._generations:
                raise ValueError(f"rid {name} is that of a running request")
        requests = [
            self._limits.request(self._next_handle(), ids, params, wanted, pooling)
            for (ids, params), wanted in zip(prompts, logprobs, strict=True)
        ]
        frames = [encode(request) for request in requests]  # before anything is remembered of them
        generation = Generation(self, rid, wants_deltas)
        for own, request, frame in zip(rids, requests, frames, strict=True):
            sequence = generation.add(own, request.handle, len(request.input_ids) // 4)
            self._sequences[request.handle] = sequence
            self._router.send(frame)
        self._generations |= dict.fromkeys(generation.rids, generation)
        return generation

    def forget(self, generation: Generation) -> None:
        for rid in generation.rids:
            self._generations.pop(rid, None)
        handles = [s.handle for s in generation.sequences if s.end is None]
        for handle in handles:
            self._sequences.pop(handle, None)
        if handles:
            if generation.is_counted:
                self.metrics.forgotten(len(handles))
            self._router.send(encode(AbortRequest(handles)))

    def abort(self, rid: str) -> bool:
        """Ends a request, or one prompt of it, with reason "abort"; False if there is none of that
        id."""
        generation = self._generations.get(rid)
        if generation is None:
            return False
        meant = [s for s in generation.sequences if rid in (generation.rid, s.rid)]
        handles = [s.handle for s in meant if s.end is None]
        if handles:
            self._router.send(encode(AbortRequest(handles)))
        return True

    def abort_all(self) -> None:
        self._router.send(encode(AbortRequest([])))

    async def stats(self) -> Stats:
        return await self._ask(GetStats(), self._stats)

    async def flush_cache(self) -> bool:
        """False: requests are running."""
        return (await self._ask(FlushCache(), self._flushes)).ok

    def start_profile(self) -> None:
        """Raises ValueError if one is being taken."""
        self._router.send(encode(self._profile.start()))

    async def stop_profile(self, num_workers: int, path: Path) -> Path:
        """The trace, in this file or folder. Raises ValueError if no profile is being taken,
        OSError if it cannot be written."""
        self._router.send(encode(self._profile.stop()))
        while not self._profile.is_written(num_workers):
            await asyncio.sleep(0.02)
        return await asyncio.to_thread(self._profile.join, path)

    async def _ask(self, question: object, replies: deque[asyncio.Future[T]]) -> T:
        """The router answers in order."""
        reply: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        replies.append(reply)
        self._router.send(encode(question))
        return await reply

    def _next_handle(self) -> int:
        return next(self._handles) & 0x7FFFFFFF

    def _receive(self, frame: bytes) -> None:
        message = self._decode(frame)
        match message:
            case TextBatch():
                sequences, now = self._sequences, time.monotonic()
                self.news_at = now
                intervals: list[float] = []
                for delta in message.deltas:
                    sequence = sequences.get(delta.handle)
                    if sequence is None:
                        continue  # its reader has gone
                    if delta.token_ids:
                        if sequence.first_at:
                            intervals.append(now - sequence.last_at)
                        else:
                            sequence.first_at = now
                        sequence.last_at = now
                    if delta.end is not None:
                        del sequences[delta.handle]
                        self._observe(sequence, delta.end)
                    sequence.generation.push(sequence, delta)
                self.metrics.token_intervals.add(intervals)
            case Stats():
                _answer(self._stats, message)
            case FlushCacheReply():
                _answer(self._flushes, message)
            case EngineReady():
                self._limits = Limits(
                    self._vocab_size, message.context_len, message.max_total_tokens
                )
                self._engine.set_result(message)

    def _observe(self, sequence: Sequence, end: StreamEnd) -> None:
        if not sequence.generation.is_counted:
            return
        start, first = sequence.generation.start, sequence.first_at
        last = sequence.last_at or time.monotonic()
        self.metrics.observe(end.reason, start, first, last, end.completion_tokens)

    def close(self) -> None:
        self._inbox.close()
        self._context.destroy(linger=0)


def _answer(replies: deque[asyncio.Future[T]], reply: T) -> None:
    future = replies.popleft()
    if not future.done():  # its reader may have gone
        future.set_result(reply)
