"""The scheduler: which tokens of which requests the next step computes, and what became of them.

Three verbs. `plan` makes a step, without waiting for those in flight; `commit` takes in a step's
sampled tokens; `settle` gives back all that a request held. There are no prefill and decode phases:
every request catches up with its tokens, a chunk or a token at a time.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Iterator

import numpy as np

from sglang.messages import (
    FinishReason,
    GenerateRequest,
    Stats,
    StepPlan,
    StepResult,
    TokenBatch,
    unpack,
)
from sglang.router.constrained import ConstrainedRows
from sglang.router.future_tokens import FutureTokens
from sglang.router.grammar import Grammar
from sglang.router.outbox import Outbox
from sglang.router.plan import Chunk, Flight, PlanBuilder
from sglang.router.radix_cache import RadixCache
from sglang.router.request import Request, Rows
from sglang.router.slots import SlotAllocator
from sglang.router.waiting import Claims, WaitingQueue

GRAMMAR_SECONDS = 0.5e-3
"""So long a plan may wait for grammars while another step runs."""


class Scheduler:
    """Owns queue, rows, slots and radix tree. Not thread-safe; no I/O."""

    AT_A_TIME = 32
    """Requests that give back what they held, before others may take it: about a millisecond."""

    def __init__(
        self,
        *,
        num_slots: int,
        num_rows: int,
        max_len: int,
        chunk_size: int,
        policy: str = "lpm",
        conservativeness: float = 1.0,
        eos: tuple[int, ...] = (),
        disable_radix_cache: bool = False,
        seed: int = 0,
    ) -> None:
        self.allocator = SlotAllocator(num_slots)
        self.cache = RadixCache(self.allocator, disabled=disable_radix_cache)
        self.rows = Rows(num_rows, max_len)
        self.waiting = WaitingQueue(policy)
        self.flying: deque[Flight] = deque()
        self.requests: dict[int, Request] = {}
        self._prefilling: list[Request] = []  # prompt not planned to its end; in admission order
        self._constrained = ConstrainedRows(self.rows)
        self._chunk_size = chunk_size
        self._eos = eos
        self._future = FutureTokens(conservativeness)
        self._seeds = random.Random(seed)
        self._outbox = Outbox()
        self._steps = 0
        self._admissions = 0
        self._preemptions = 0
        self._prompt_tokens = 0
        self._hit_tokens = 0
        self._generated_tokens = 0
        self._forced_tokens = 0

    # --- requests come and go ----------------------------------------------------------------

    def add(self, message: GenerateRequest, grammar: Grammar | None = None) -> None:
        seed = message.params.seed
        if seed is None:
            seed = self._seeds.getrandbits(32)
        request = Request(message, self._eos, seed & 0xFFFFFFFF, grammar)
        assert request.limit <= min(self.rows.tokens.shape[1], self.allocator.num_slots)
        self.requests[request.handle] = request
        self.waiting.add(request)

    def abort(self, handles: list[int], silent: bool = False) -> None:
        """Unknown handles are ignored: they have just ended. No handles: every request."""
        for handle in handles or list(self.requests):
            request = self.requests.get(handle)
            if request is None or (request.row >= 0 and self.rows.ended[request.row]):
                continue
            if request.row < 0:
                self.waiting.remove(request)
                del self.requests[handle]
            else:
                self._leave(request, ended=True)
            if not silent:
                self._outbox.finish(request, "abort")

    def is_idle(self) -> bool:
        return not self.requests

    def flush_cache(self) -> bool:
        """Forgets every cached prefix; refuses (False) while requests run."""
        if self.requests:
            return False
        self.cache.clear()
        return True

    def take_outbox(self) -> TokenBatch | None:
        """What there is to tell the detokenizer since the last call."""
        return self._outbox.take()

    # --- plan --------------------------------------------------------------------------------

    def plan(self) -> tuple[StepPlan, bytes] | None:
        """The next step and its payload; None if there is nothing to do before a commit."""
        builder = PlanBuilder(self._steps)
        deadline = time.perf_counter() + GRAMMAR_SECONDS
        while (not self.flying or time.perf_counter() < deadline) and self.follow_grammar():
            pass
        self._plan_decode(builder)
        budget = self._plan_chunks(builder, self._prefilling, self._chunk_size)
        self._plan_chunks(builder, self._admit(builder, budget), budget)
        self._prefilling = [
            r for r in self._prefilling if self.rows.planned[r.row] < self.rows.prefill_len[r.row]
        ]
        if builder.is_empty():
            assert not builder.opened, "who is admitted has slots"
            stuck = not self.flying and not self.rows.leaving.any()
            if stuck and self._running_last() is not None:
                return self._restart_all()
            return None
        plan, payload, flight = builder.build(self.rows)
        self.flying.append(flight)
        self._steps += 1
        self._future.step()
        return plan, payload

    def _plan_decode(self, builder: PlanBuilder) -> None:
        """Every row whose prompt is done takes one slot and one step."""
        rows = self.rows
        ready = self._ready_rows()
        if len(ready) > self.allocator.num_free:
            self._make_room(len(ready))
            ready = self._ready_rows()  # preempted ones are out
            if len(ready) > self.allocator.num_free:  # the last admitted skip this step
                oldest = np.argsort(rows.admission[ready], kind="stable")
                ready = np.sort(ready[oldest[: self.allocator.num_free]])
        if len(ready):
            # Attention takes the rows in this order: what lasts longest begins first.
            ready = ready[np.argsort(-rows.planned[ready], kind="stable")]
            at = rows.planned[ready]
            slots = self.allocator.alloc(len(ready))
            rows.slots[ready, at] = slots
            rows.planned[ready] = at + 1
            rows.flying[ready] += 1
            builder.decode_rows, builder.decode_slots = ready, slots

    def _ready_rows(self) -> np.ndarray:
        rows = self.rows
        ready = (
            rows.running() & (rows.planned >= rows.prefill_len) & (rows.planned < rows.limit - 1)
        ) & ~(rows.constrained & ((rows.flying > 0) | rows.unread))
        return ready.nonzero()[0].astype(np.int32)

    def _plan_chunks(self, builder: PlanBuilder, requests: list[Request], budget: int) -> int:
        """Prefills up to `budget` tokens; returns what is left of it."""
        rows = self.rows
        for request in list(requests):
            row = request.row
            if row < 0 or rows.leaving[row]:
                continue
            start, length = int(rows.planned[row]), int(rows.prefill_len[row])
            wanted = min(length - start, budget)
            if wanted > self.allocator.num_free:
                self._make_room(wanted)
                if request.row < 0 or rows.leaving[row]:  # was itself the victim
                    continue
            count = min(wanted, self.allocator.num_free)
            if count == 0:
                break
            end = start + count
            slots = self.allocator.alloc(count)
            rows.slots[row, start:end] = slots
            rows.planned[row] = end
            rows.flying[row] += 1
            chunk = Chunk(request, row, start, end, samples=end == length)
            builder.prefill(chunk, rows.tokens[row, start:end], slots)
            budget -= count
        return budget

    # --- admission ---------------------------------------------------------------------------

    def _admit(self, builder: PlanBuilder, budget: int) -> list[Request]:
        """Opens rows for waiting requests while seats, slots and the step's `budget` last."""
        if not (len(self.waiting) and self.rows.num_free and budget > 0):
            return []
        claims = self._claims()
        forecast = self._future.forecast(self.rows)
        admitted: list[Request] = []
        for request in self.waiting.candidates(self.cache):
            if not self.rows.num_free or budget <= 0:
                break
            slots, node = self.cache.match(request.reusable())
            cached = len(slots)
            if not request.reads_prompt and claims.cover(request.tokens, cached):
                continue
            self.cache.lock(node)
            if not forecast.join(request, cached, self._num_available()):
                self.cache.unlock(node)
                break  # not the next smaller one instead: large requests must not starve
            budget -= len(request.tokens) - cached
            request.node, request.cached = node, cached
            if not self.cache.disabled:
                claims.add(request.tokens, cached)
            self._open(builder, request, slots)
            admitted.append(request)
        self.waiting.remove_admitted()
        return admitted

    def _claims(self) -> Claims:
        """Of running requests whose prompt is not wholly in the tree yet."""
        claims, rows = Claims(), self.rows
        if not self.cache.disabled:
            prefilling = rows.running() & (rows.known == rows.prefill_len)
            for row in prefilling.nonzero()[0].tolist():
                request = rows.request(row)
                claims.add(request.tokens, request.cached)
        return claims

    def _num_available(self) -> int:
        """Slots that are free, or can be made free by forgetting what no request uses."""
        return self.allocator.num_free + self.cache.num_evictable

    def _open(self, builder: PlanBuilder, request: Request, cached_slots: np.ndarray) -> None:
        row = self.rows.open_row(request, cached_slots)
        self._admissions += 1
        self.rows.admission[row] = self._admissions
        self._prefilling.append(request)
        if not request.announced:
            self._outbox.announce(request)
            self._prompt_tokens += request.prompt_len
            self._hit_tokens += request.cached
        builder.open(request.row_spec(), cached_slots)

    # --- running out of slots ----------------------------------------------------------------

    def _make_room(self, wanted: int) -> None:
        """Tries to have `wanted` slots free: evicts from the cache, then preempts the request that
        was admitted last. Its slots may come back only when its flying steps are committed; the
        caller takes what is there now."""
        while True:
            self.cache.evict(wanted - self.allocator.num_free)
            if self.allocator.num_free >= wanted or bool(self.rows.leaving.any()):
                return
            victim = self._running_last()
            if victim is None or int(self.rows.running().sum()) == 1:
                return
            self._preempt(victim)

    def _running_last(self) -> Request | None:
        """The running request that was admitted last."""
        rows = self.rows
        running = rows.running().nonzero()[0]
        if not len(running):
            return None
        return rows.requests[running[rows.admission[running].argmax()]]

    def _preempt(self, request: Request) -> None:
        self._preemptions += 1
        self._future.preempted()
        if self.rows.unread[request.row]:
            self._take_in_token(request)
        self._leave(request, ended=bool(self.rows.ended[request.row]))

    def _restart_all(self) -> tuple[StepPlan, bytes] | None:
        """Nothing flies and the running requests cannot go on: their private copies of what the
        tree holds too (see RadixCache.insert) fill the pool. Start them over from the tree."""
        while (request := self._running_last()) is not None:
            self._preempt(request)
        return self.plan()

    # --- commit and settle -------------------------------------------------------------------

    def commit(self, result: StepResult) -> None:
        """What became of the oldest flying step."""
        for _ in self.put_away(self.take_in(result)):
            pass

    def take_in(self, result: StepResult) -> Flight:
        """The first half of `commit`: the news. They need not wait for the second half."""
        flight = self.flying.popleft()
        assert result.step == flight.step, "steps come back in order"
        self._pass_on(result)
        self._append(flight.sampled_rows, unpack(result.tokens), result)
        return flight

    def put_away(self, flight: Flight) -> Iterator[None]:
        """The second half, to be iterated to its end: the step flies no more, prompts go into the
        tree, and who has ended gives back what it held. If many have, a few at a time: there may be
        a plan in between."""
        rows, in_step = self.rows, flight.rows
        rows.flying[in_step] -= 1
        for chunk in flight.chunks:
            if not rows.leaving[chunk.row]:
                self._remember(chunk.request, chunk.end)
        for i, row in enumerate(self._settled_rows(in_step)):
            if i and i % self.AT_A_TIME == 0:
                yield
            self._settle(rows.request(row))

    def _settled_rows(self, in_step: np.ndarray) -> np.ndarray:
        """Those of the step that nothing holds any more."""
        return in_step[self.rows.leaving[in_step] & (self.rows.flying[in_step] == 0)]

    def _append(self, sampled: np.ndarray, tokens: np.ndarray, result: StepResult) -> None:
        """The sampled tokens become known; requests that are complete leave."""
        rows = self.rows
        # A preempted row's results count; an ended one's do not, nor, with max_new_tokens = 0, the
        # prompt's own.
        wanted = ~rows.ended[sampled] & (rows.known[sampled] < rows.limit[sampled])
        kept, new = sampled[wanted], tokens[wanted]
        at = rows.known[kept]
        rows.tokens[kept, at] = new
        rows.known[kept] = at + 1
        self._generated_tokens += len(kept)
        self._outbox.add_tokens(kept, rows.handle[kept], new, result.logprobs)

        stopped, _ = (rows.stop_tokens[kept] == new[:, None]).nonzero()
        for i in stopped.tolist():
            self._complete(int(kept[i]), "stop", int(new[i]))
        constrained = rows.constrained[kept] & ~rows.ended[kept]
        for i in constrained.nonzero()[0].tolist():
            row = int(kept[i])
            request = rows.request(row)
            self._constrained.add_token(request, int(new[i]))
            if rows.leaving[row]:  # it is about to be settled
                self._take_in_token(request)
        full = rows.known[sampled] >= rows.limit[sampled]
        for row in sampled[full & ~(rows.ended[sampled] | rows.unread[sampled])].tolist():
            self._complete(row, "length")

    def _pass_on(self, result: StepResult) -> None:
        """What is said of prompts."""
        for scored in result.prompt_logprobs:
            request = self.rows.request(scored.owner)
            if not self.rows.ended[scored.owner]:
                request.prompt_logprobs_from = scored.start + len(scored.logprobs) // 4
                self._outbox.add_prompt_logprobs(request, scored)
        for embedding in result.embeddings:
            request = self.rows.request(embedding.owner)
            if not self.rows.ended[embedding.owner]:
                self._outbox.add_embedding(request, embedding)

    def _complete(self, row: int, reason: FinishReason, token: int | None = None) -> None:
        self.rows.leaving[row] = self.rows.ended[row] = True
        self._outbox.finish(self.rows.request(row), reason, token)

    def _remember(self, request: Request, end: int) -> None:
        """Puts the first `end` tokens, whose KV is written, into the tree, for others to use."""
        row, old = request.row, request.node
        assert old is not None
        _, node = self.cache.insert(self.rows.tokens[row, :end], self.rows.slots[row, :end])
        self.cache.lock(node)
        self.cache.unlock(old)
        request.node, request.cached = node, end

    def _leave(self, request: Request, ended: bool) -> None:
        """Marks it; it is settled when its last flying step is committed."""
        row = request.row
        self.rows.leaving[row] = True
        self.rows.ended[row] |= ended
        if self.rows.flying[row] == 0:
            self._settle(request)

    def _settle(self, request: Request) -> None:
        """Gives back everything that a row holds: the one place that does. What the tree does not
        know yet of its KV goes there; a preempted request goes back to the queue."""
        rows, row = self.rows, request.row
        assert rows.leaving[row] and rows.flying[row] == 0 and request.node is not None
        planned = int(rows.planned[row])
        n = min(planned, int(rows.known[row]) - 1)
        own = rows.slots[row, :n]
        in_tree, _ = self.cache.insert(rows.tokens[row, :n], own)
        if self.cache.disabled:
            self.allocator.free(own)
        else:
            self.allocator.free(own[own != in_tree])
        self.allocator.free(rows.slots[row, n:planned])
        self.cache.unlock(request.node)
        request.node = None
        ended = bool(rows.ended[row])
        self._constrained.forget(request)
        if request in self._prefilling:
            self._prefilling.remove(request)
        rows.close_row(row)
        if ended:
            del self.requests[request.handle]
        else:
            self.waiting.put_back(request)

    # --- grammars ----------------------------------------------------------------------------

    def follow_grammar(self) -> bool:
        """Lets one constrained row's grammar take in its last token: most of what such a row costs
        here, so it is done while a step runs. False: there is none that has to."""
        request = self._constrained.next()
        if request is None:
            return False
        self._take_in_token(request)
        if self.rows.ended[request.row]:
            self._settle(request)
        return True

    def _take_in_token(self, request: Request) -> None:
        """Tokens that the grammar then leaves no choice of are known at once, and prefilled
        (SGLang's jump-forward decoding)."""
        said = self._constrained.take_in(request)
        if said.forced:
            self._outbox.add_forced(request, said.forced)
            self._generated_tokens += len(said.forced)
            self._forced_tokens += len(said.forced)
            if not self.rows.leaving[request.row]:
                self._prefilling.append(request)
        if said.end is not None:
            self._complete(request.row, said.end, said.stop_token)

    # --- figures -----------------------------------------------------------------------------

    def stats(self) -> Stats:
        return Stats(
            running=int(self.rows.open.sum()),
            queued=len(self.waiting),
            used_tokens=self.allocator.num_slots - self._num_available(),
            cached_tokens=self.cache.num_tokens,
            max_total_tokens=self.allocator.num_slots,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            hit_tokens=self._hit_tokens,
            generated_tokens=self._generated_tokens,
            preemptions=self._preemptions,
            evicted_tokens=self.cache.num_evicted,
            forced_tokens=self._forced_tokens,
        )
