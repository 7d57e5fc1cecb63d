"""Admission by the worst moment to come."""

import random

import pytest

from sglang.router.future_tokens import peak
from tests.router.test_scheduler import make, request, run, step


def naive_peak(held: list[int], remaining: list[int]) -> int:
    """A token a step for each request, until it ends and gives back what it has."""
    used = most = 0
    for now in range(1, max(remaining) + 1):
        used += sum(now <= last for last in remaining)
        most = max(most, used)
        used -= sum(h + last for h, last in zip(held, remaining, strict=True) if last == now)
    return most


@pytest.mark.parametrize("seed", range(50))
def test_peak_is_that_of_stepping_through_it(seed):
    rng = random.Random(seed)
    held = [rng.randint(0, 100) for _ in range(rng.randint(1, 30))]
    remaining = [rng.randint(1, 100) for _ in held]
    assert peak(held, remaining) == naive_peak(held, remaining)


def test_requests_that_never_need_all_their_slots_at_once_run_together():
    """0.7 of what they may still generate is more than the pool has, but they end one after the
    other, and no moment needs more than there is."""
    lengths = [4 * (i + 1) for i in range(12)]
    prompts = [[i] * 10 for i in range(12)]
    slots = sum(map(len, prompts)) + naive_peak([10] * 12, lengths)
    assert slots < sum(map(len, prompts)) + 0.7 * sum(lengths)
    scheduler, worker = make(num_slots=slots, num_rows=12, chunk_size=256)
    for handle, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        scheduler.add(request(handle, prompt, length))
    plan, _ = step(scheduler, worker)
    assert plan.num_rows == 12
    run(scheduler, worker)
    assert scheduler.stats().preemptions == 0
