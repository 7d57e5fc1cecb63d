"""The clients of benchmarks/serving.py: processes that send requests and note when tokens come.

One Python process reads some 20,000 events a second, which is less than a good server writes: so
there are several, each with its share of the requests, and no event but the last is parsed.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import random
import time
from dataclasses import dataclass, field

import aiohttp


@dataclass
class Planned:
    """A request to send."""

    prompt: list[int]
    max_tokens: int
    at: float | None = None
    """Seconds after the start; None (closed loop): when a stream is free."""


@dataclass
class Outcome:
    """What became of it. Times are in seconds after the start of the load."""

    scheduled: float
    """When it should have been sent. A late client counts as waiting, as a user would."""
    sent: float
    times: list[float] = field(default_factory=list)
    """When each chunk of text came."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    error: str = ""

    @property
    def ttft(self) -> float:
        return self.times[0] - self.scheduled

    @property
    def latency(self) -> float:
        return self.times[-1] - self.scheduled

    @property
    def tpot(self) -> float | None:
        """Seconds a token after the first."""
        if self.completion_tokens < 2:
            return None
        return (self.times[-1] - self.times[0]) / (self.completion_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


@dataclass
class Share:
    """What one client process does."""

    url: str
    model: str
    requests: list[Planned]
    streams: int
    """Requests under way at most; 0: as many as their times make."""
    temperature: float


def plan_requests(
    count: int,
    input_len: int,
    output_len: int,
    vary: float = 0.0,
    shared_prefix: int = 0,
    rate: float | None = None,
    seed: int = 0,
) -> list[Planned]:
    """Prompts of random token ids. Lengths are uniform within 1 +- vary times the given ones. With
    a rate, in requests per second, arrivals are a Poisson process."""
    rng = random.Random(seed)

    def length(mean: int) -> int:
        return max(1, round(mean * rng.uniform(1 - vary, 1 + vary)))

    prefix = rng.choices(range(100, 10000), k=shared_prefix)
    planned, at = [], 0.0
    for _ in range(count):
        own = max(length(input_len) - shared_prefix, 1)
        prompt = prefix + rng.choices(range(100, 10000), k=own)
        planned.append(Planned(prompt, length(output_len), at if rate else None))
        at += rng.expovariate(rate) if rate else 0.0
    return planned


def run_load(
    url: str,
    model: str,
    requests: list[Planned],
    streams: int = 0,
    clients: int = 1,
    temperature: float = 0.0,
) -> list[Outcome]:
    """Sends them all, from that many processes; returns when all have ended. streams > 0: closed
    loop, so many requests under way at a time."""
    clients = min(clients, len(requests), streams or len(requests))
    shares = [
        Share(
            url,
            model,
            requests[i::clients],
            streams // clients + (i < streams % clients) if streams else 0,
            temperature,
        )
        for i in range(clients)
    ]
    spawn = multiprocessing.get_context("spawn")
    gate = spawn.Barrier(clients)
    with spawn.Pool(clients, initializer=_set_gate, initargs=(gate,)) as pool:
        return [outcome for part in pool.map(_client, shares, chunksize=1) for outcome in part]


def _set_gate(gate) -> None:
    global _gate
    _gate = gate


def _client(share: Share) -> list[Outcome]:
    """In a process of its own."""
    try:
        from uvloop import run
    except ImportError:
        from asyncio import run
    return run(_load(share))


async def _load(share: Share) -> list[Outcome]:
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(
        share.url, timeout=timeout, connector=connector, read_bufsize=1 << 20
    ) as session:
        bodies = [_body(share, request) for request in share.requests]
        _gate.wait()  # all clients are ready
        start = time.perf_counter()
        if not share.streams:
            return await asyncio.gather(
                *(
                    _open_loop(session, body, request.at or 0.0, start)
                    for body, request in zip(bodies, share.requests, strict=True)
                )
            )
        queue = iter(bodies)

        async def stream() -> list[Outcome]:
            return [await _send(session, body, None, start) for body in queue]

        parts = await asyncio.gather(*(stream() for _ in range(share.streams)))
        return [outcome for part in parts for outcome in part]


def _body(share: Share, request: Planned) -> bytes:
    return json.dumps(
        {
            "model": share.model,
            "prompt": request.prompt,
            "max_tokens": request.max_tokens,
            "temperature": share.temperature,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()


async def _open_loop(
    session: aiohttp.ClientSession, body: bytes, at: float, start: float
) -> Outcome:
    await asyncio.sleep(max(at - (time.perf_counter() - start), 0.0))
    return await _send(session, body, at, start)


async def _send(
    session: aiohttp.ClientSession, body: bytes, scheduled: float | None, start: float
) -> Outcome:
    now = time.perf_counter() - start
    outcome = Outcome(now if scheduled is None else scheduled, now)
    headers = {"Content-Type": "application/json"}
    try:
        async with session.post("/v1/completions", data=body, headers=headers) as reply:
            if reply.status != 200:
                outcome.error = f"{reply.status}: {(await reply.text())[:200]}"
                return outcome
            await _read(reply, outcome, start)
    except (aiohttp.ClientError, OSError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    return outcome


async def _read(reply: aiohttp.ClientResponse, outcome: Outcome, start: float) -> None:
    """Server-sent events, each ended by an empty line; a read may end within one."""
    rest = b""
    async for data in reply.content.iter_any():
        now = time.perf_counter() - start
        *events, rest = (rest + data).split(b"\n\n")
        for event in events:
            if b'"completion_tokens"' in event:
                _read_usage(event, outcome)
                if b'"choices":[]' not in event.replace(b" ", b""):
                    outcome.times.append(now)
            elif event.startswith(b'data: {"error"'):
                outcome.error = event.decode(errors="replace")[:200]
            elif event.startswith(b"data: {"):
                outcome.times.append(now)
    if not outcome.error and not (outcome.times and outcome.completion_tokens):
        outcome.error = "the stream ended before its usage"


def _read_usage(event: bytes, outcome: Outcome) -> None:
    usage = json.loads(event.removeprefix(b"data: "))["usage"]
    outcome.prompt_tokens = usage["prompt_tokens"]
    outcome.completion_tokens = usage["completion_tokens"]
    outcome.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
