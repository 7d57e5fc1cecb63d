"""A worker without a model, to test the scheduler against: it hashes what it reads.

A slot remembers which token was written there, at which position, and what its row had hashed to by
then. A sampled token is the hash of everything that the row reads through its slot table. So one
slot that is freed, shared or overwritten too early changes tokens, and `expected_tokens` tells.
"""

from __future__ import annotations

import random
from collections import deque

import numpy as np

from sglang.messages import AbortRequest, GenerateRequest, StepPlan, StepResult, pack, unpack
from sglang.router.grammar import Grammar
from sglang.router.scheduler import Scheduler
from sglang.sampling_params import SamplingParams

VOCABULARY = 50
EOS = 7


def sample(history: tuple[int, ...], allowed: list[int] | None = None) -> int:
    number = hash(history)
    return number % VOCABULARY if allowed is None else allowed[number % len(allowed)]


class Riddle(Grammar):
    """Some tokens are forbidden and some forced, by the hash of what has been said so far."""

    def __init__(self) -> None:
        self._said: list[int] = []

    def allowed(self) -> list[int]:
        number = hash((*self._said, 0))
        return [token for token in range(VOCABULARY) if (number >> token % 13) & 1] or [3]

    def mask(self) -> np.ndarray:
        bits = np.zeros(64, dtype=np.uint8)
        bits[self.allowed()] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)

    def accept(self, token: int, room: int) -> list[int]:
        assert token in self.allowed(), "the mask came late, or to another row"
        self._said.append(token)
        forced: list[int] = []
        while len(forced) < room and (number := hash((*self._said, 1))) % 3 == 0:
            forced.append(number // 3 % VOCABULARY)
            self._said.append(forced[-1])
        self.is_complete = hash((*self._said, 2)) % 10 == 0
        return forced


def expected_tokens(
    prompt: list[int], params: SamplingParams, grammar: Grammar | None = None
) -> list[int]:
    """What the request must yield, whatever runs beside it."""
    tokens = list(prompt)
    stops = {*params.stop_token_ids, *(() if params.ignore_eos else (EOS,))}
    limit = len(prompt) + params.max_new_tokens
    while len(tokens) < limit:
        tokens.append(sample(tuple(tokens), grammar.allowed() if grammar else None))
        if tokens[-1] in stops:
            break
        if grammar is not None:
            for token in grammar.accept(tokens[-1], limit - len(tokens)):
                tokens.append(token)
                if token in stops:
                    return tokens[len(prompt) :]
            if grammar.is_complete:
                break
    return tokens[len(prompt) :]


class HashingWorker:
    """Device state as in a model worker: slot table, lengths and last tokens by row; runs a plan
    when asked to, which may be well after it was sent."""

    def __init__(self, num_slots: int, num_rows: int, max_len: int) -> None:
        self.memory: list[int | None] = [None] * num_slots
        self.slot_table = np.full((num_rows, max_len), -1)
        self.seq_len = np.zeros(num_rows, dtype=int)
        self.last_token = np.zeros(num_rows, dtype=int)

    def run(self, plan: StepPlan, payload: bytes) -> StepResult:
        data = deque(unpack(payload).tolist())

        def take(n: int) -> list[int]:
            return [data.popleft() for _ in range(n)]

        num_prefill = plan.num_rows - plan.num_decode
        rows, q_lens, samples = take(plan.num_rows), take(num_prefill), take(num_prefill)
        slots = take(plan.num_decode + plan.num_prefill_tokens)
        for spec in plan.opened:
            self.slot_table[spec.row] = -1
            self.slot_table[spec.row, : spec.cached_len] = take(spec.cached_len)
            self.seq_len[spec.row] = spec.cached_len
        prefill_ids = take(plan.num_prefill_tokens)
        masks = {index: allowed_by(take(2)) for index in plan.masked}
        assert not data, "the payload is longer than its header says"

        work = [(row, 1, True) for row in rows[: plan.num_decode]]
        work += list(zip(rows[plan.num_decode :], q_lens, map(bool, samples), strict=True))
        work = [
            (row, [self.last_token[row]] if i < plan.num_decode else take_ids(prefill_ids, n), s)
            for i, (row, n, s) in enumerate(work)
        ]
        tokens = []
        for row, ids, _ in work:  # all write before any reads, as the kernels of a layer do
            for token in ids:
                self.slot_table[row, self.seq_len[row]] = slot = slots.pop(0)
                self.memory[slot] = int(token)
                self.seq_len[row] += 1
        for row, _, samples_now in work:
            if samples_now:
                slots = self.slot_table[row, : self.seq_len[row]]
                assert (slots >= 0).all(), "reads a position that was never given a slot"
                allowed = masks.get(len(tokens))
                self.last_token[row] = sample(tuple(self.memory[slot] for slot in slots), allowed)
                tokens.append(self.last_token[row])
        return StepResult(plan.step, pack(tokens))


def allowed_by(words: list[int]) -> list[int]:
    bits = np.unpackbits(np.array(words, dtype=np.int32).view(np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()


def take_ids(ids: list[int], n: int) -> list[int]:
    head, ids[:n] = ids[:n], []
    return head


class Simulation:
    """A random workload through a scheduler and a hashing worker, `depth` steps in flight.

    Requests share prefixes, some end early on a stop token, some are aborted, some have a grammar;
    results come back late. `run` checks every request's tokens and that nothing leaked.
    """

    def __init__(self, seed: int, depth: int, scheduler_class=Scheduler) -> None:
        rng = self.rng = random.Random(seed)
        random.seed(seed)  # the random policy's
        self.depth = depth
        num_rows = rng.choice([1, 2, 4, 8])
        self.max_len = 64
        num_slots = rng.choice([64, 64, 72, 80, 96, 128, 512])
        self.scheduler = scheduler_class(
            num_slots=num_slots,
            num_rows=num_rows,
            max_len=self.max_len,
            chunk_size=rng.choice([1, 5, 16, 200]),
            policy=rng.choice(["lpm", "weight", "random", "fcfs"]),
            conservativeness=rng.choice([0.0, 0.0, 0.0, 1.0]),
            eos=(EOS,),
            disable_radix_cache=rng.random() < 0.15,
        )
        self.scheduler.AT_A_TIME = 1
        self.worker = HashingWorker(num_slots, num_rows, self.max_len)
        self.outputs: dict[int, list[int]] = {}
        self.reasons: dict[int, str] = {}
        self.requests = [self._request(handle) for handle in range(rng.randint(3, 25))]
        self.constrained = {r.handle for r in self.requests if rng.random() < 0.2}

    def _request(self, handle: int) -> GenerateRequest:
        rng = self.rng
        prompt = []
        for _ in range(rng.randint(0, 2)):  # one of few shared beginnings, of few continuations
            prompt += [rng.randint(1, 2)] * rng.choice([3, 10])
        prompt += [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 12))]
        if rng.random() < 0.2 and handle:
            prompt = [*range(30), *prompt[:5]]
        params = SamplingParams(
            max_new_tokens=rng.choice([0, 1, rng.randint(2, 20), rng.randint(2, 64 - len(prompt))]),
            ignore_eos=rng.random() < 0.8,
            stop_token_ids=rng.sample(range(VOCABULARY), rng.choice([0, 0, 1, 6])),
        )
        return GenerateRequest(handle, pack(prompt), params)

    def run(self) -> None:
        scheduler, rng = self.scheduler, self.rng
        arriving = deque(self.requests)
        sent: deque = deque()
        aborted: set[int] = set()
        for _ in range(20_000):
            while arriving and (rng.random() < 0.3 or scheduler.is_idle()):
                request = arriving.popleft()
                scheduler.add(request, Riddle() if request.handle in self.constrained else None)
            if rng.random() < 0.02 and scheduler.requests:
                handle = rng.choice(list(scheduler.requests))
                aborted.add(handle)
                scheduler.abort(AbortRequest([handle]).handles, silent=False)
            if len(scheduler.flying) < self.depth and (step := scheduler.plan()) is not None:
                sent.append(step)
            elif scheduler.flying:
                flight = scheduler.take_in(self.worker.run(*sent.popleft()))
                for _ in scheduler.put_away(flight):
                    self._read_outbox()
                    if rng.random() < 0.5 and (step := scheduler.plan()) is not None:
                        sent.append(step)
            self._read_outbox()
            if scheduler.is_idle() and not arriving:
                break
        else:
            raise AssertionError("no end: some request makes no progress")
        self._check_tokens(aborted)
        self._check_nothing_leaked()

    def _read_outbox(self) -> None:
        if (news := self.scheduler.take_outbox()) is None:
            return
        for opened in news.opened:
            assert opened.handle not in self.outputs, "announced twice"
            self.outputs[opened.handle] = []
        for handle, token in zip(unpack(news.handles), unpack(news.tokens), strict=True):
            assert handle not in self.reasons, "a token after the end"
            self.outputs[handle].append(int(token))
        for finished in news.finished:
            assert finished.handle not in self.reasons, "ended twice"
            self.reasons[finished.handle] = finished.reason

    def _check_tokens(self, aborted: set[int]) -> None:
        for request in self.requests:
            grammar = Riddle() if request.handle in self.constrained else None
            prompt = unpack(request.input_ids).tolist()
            expected = expected_tokens(prompt, request.params, grammar)
            got = self.outputs[request.handle]
            if self.reasons[request.handle] == "abort":
                assert request.handle in aborted
                assert got == expected[: len(got)]
            else:
                assert got == expected, f"request {request.handle}: wrong tokens"

    def _check_nothing_leaked(self) -> None:
        scheduler = self.scheduler
        assert scheduler.rows.num_free == scheduler.rows.num_rows, "a row leaked"
        cache, allocator = scheduler.cache, scheduler.allocator
        assert cache.num_evictable == cache.num_tokens, "a lock leaked"
        assert allocator.num_free + cache.num_tokens == allocator.num_slots, "a slot leaked"
        assert scheduler.flush_cache()
        assert allocator.num_free == allocator.num_slots
        assert len(set(allocator.alloc(allocator.num_slots))) == allocator.num_slots
