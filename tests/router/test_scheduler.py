"""The scheduler by simulation: right tokens and no leaks, whatever happens."""

import numpy as np
import pytest

from sglang.messages import GenerateRequest, pack, unpack
from sglang.router.scheduler import Scheduler
from sglang.sampling_params import SamplingParams
from tests.router.simulation import EOS, HashingWorker, Simulation, expected_tokens

WORKLOADS = 300
BROKEN_WORKLOADS = 100


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_random_workloads_give_right_tokens_and_leak_nothing(depth):
    preemptions = evicted = hits = 0
    for seed in range(WORKLOADS):
        simulation = Simulation(seed, depth)
        simulation.run()
        stats = simulation.scheduler.stats()
        preemptions += stats.preemptions
        evicted += stats.evicted_tokens
        hits += stats.hit_tokens
    assert preemptions > 100 and evicted > 10_000 and hits > 1000, "the workloads are too tame"


class FreesDuplicatesAtOnce(Scheduler):
    """Breaks seam rule 2: duplicate slots found at an insert are freed, and the row's table
    rewritten, while steps that read them may be flying."""

    def _remember(self, request, end):
        rows, row = self.rows, request.row
        own = rows.slots[row, :end].copy()
        super()._remember(request, end)
        in_tree, _ = self.cache.match(rows.tokens[row, :end])
        if len(in_tree) == end:
            self.allocator.free(own[own != in_tree])
            rows.slots[row, :end] = in_tree


class SettlesWhileFlying(Scheduler):
    """Breaks seam rule 3: gives everything back when a request ends, not when its last flying step
    is committed."""

    def _settled_rows(self, in_step):
        leaving = in_step[self.rows.leaving[in_step]]
        self.rows.flying[leaving] = 0
        return leaving


def failures(scheduler_class, depth: int) -> int:
    count = 0
    for seed in range(BROKEN_WORKLOADS):
        try:
            Simulation(seed, depth, scheduler_class).run()
        except Exception:
            count += 1
    return count


def test_breaking_rule_2_is_noticed():
    assert failures(FreesDuplicatesAtOnce, depth=1) > BROKEN_WORKLOADS // 20


def test_breaking_rule_3_is_noticed():
    assert failures(SettlesWhileFlying, depth=1) == 0, "nothing flies at a commit"
    assert failures(SettlesWhileFlying, depth=2) > BROKEN_WORKLOADS // 4


def make(num_slots=256, num_rows=8, chunk_size=64, **kwargs):
    scheduler = Scheduler(
        num_slots=num_slots,
        num_rows=num_rows,
        max_len=64,
        chunk_size=chunk_size,
        eos=(EOS,),
        **kwargs,
    )
    return scheduler, HashingWorker(num_slots, num_rows, 64)


def request(handle, prompt, max_new_tokens=4, **params):
    params = SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True, **params)
    return GenerateRequest(handle, pack(prompt), params)


def step(scheduler, worker):
    plan = scheduler.plan()
    assert plan is not None
    scheduler.commit(worker.run(*plan))
    return plan


def run(scheduler, worker):
    while not scheduler.is_idle():
        step(scheduler, worker)


def test_requests_with_the_same_new_prefix_compute_it_once():
    scheduler, worker = make()
    prefix = list(range(40))
    for handle in range(6):
        scheduler.add(request(handle, [*prefix, 40 + handle]))
    first, _ = step(scheduler, worker)
    assert first.num_prefill_tokens == 41
    second, _ = step(scheduler, worker)
    assert second.num_prefill_tokens == 5 and second.num_decode == 1
    assert scheduler.stats().hit_tokens == 5 * 40


def test_without_a_cache_nobody_waits_for_a_shared_prefix():
    scheduler, worker = make(disable_radix_cache=True, chunk_size=1000)
    for handle in range(3):
        scheduler.add(request(handle, list(range(40))))
    plan, _ = step(scheduler, worker)
    assert plan.num_prefill_tokens == 3 * 40
    run(scheduler, worker)
    assert scheduler.allocator.num_free == scheduler.allocator.num_slots


def test_a_long_prompt_does_not_hold_up_decoding():
    scheduler, worker = make(chunk_size=8)
    scheduler.add(request(0, [1, 2, 3], max_new_tokens=20))
    step(scheduler, worker)
    scheduler.add(request(1, list(range(33))))
    for _ in range(4):
        plan, _ = step(scheduler, worker)
        assert plan.num_decode == 1 and plan.num_prefill_tokens == 8


def test_no_policy_starves_a_request():
    for policy in ("lpm", "weight", "random", "fcfs"):
        scheduler, worker = make(num_rows=1, policy=policy)
        popular = list(range(30))
        scheduler.add(request(0, popular, 1))
        scheduler.add(request(1, [49, 48], 1))
        for handle in range(2, 1500):  # popular requests keep coming
            scheduler.add(request(handle, [*popular, handle % 50], 1))
            step(scheduler, worker)
            if 1 not in scheduler.requests:
                break
        assert 1 not in scheduler.requests, policy


def test_a_request_may_use_every_slot_there_is():
    scheduler, worker = make(num_slots=32, num_rows=2)
    prompt = list(range(20))
    for handle in range(3):
        scheduler.add(request(handle, prompt, 12))
    tokens = {0: [], 1: [], 2: []}
    while not scheduler.is_idle():
        step(scheduler, worker)
        news = scheduler.take_outbox()
        for handle, token in zip(unpack(news.handles), unpack(news.tokens), strict=True):
            tokens[int(handle)].append(int(token))
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    assert all(t == expected_tokens(prompt, params) for t in tokens.values())


def test_abort_of_all_requests_frees_everything():
    scheduler, worker = make(num_rows=2)
    for handle in range(5):
        scheduler.add(request(handle, [handle] * 10, 30))
    step(scheduler, worker)
    plan = scheduler.plan()
    scheduler.abort([])
    assert not scheduler.is_idle(), "a flying step still reads the rows"
    scheduler.commit(worker.run(*plan))
    assert scheduler.is_idle() and scheduler.plan() is None
    assert scheduler.stats().used_tokens == 0
    assert len(scheduler.take_outbox().finished) == 5


def test_a_decode_step_of_many_rows_is_cheap():
    """256 rows: the router's part of a step, plan and commit (the aim is 0.5 ms on a server)."""
    import time

    num_rows = 256
    scheduler = Scheduler(num_slots=100_000, num_rows=num_rows, max_len=2048, chunk_size=8192)
    for handle in range(num_rows):
        scheduler.add(request(handle, [handle % 50] * 16, 1000))
    from sglang.messages import StepResult

    def once():
        plan, _ = scheduler.plan()
        scheduler.commit(StepResult(plan.step, pack(np.full(plan.num_rows, 3))))
        scheduler.take_outbox()

    once()
    times = []
    for _ in range(100):
        start = time.perf_counter()
        once()
        times.append(time.perf_counter() - start)
    assert sorted(times)[10] < 2e-3
