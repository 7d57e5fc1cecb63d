"""Policies: in which order queued requests are admitted."""

import subprocess
import sys

import numpy as np

from sglang.messages import GenerateRequest, StepResult, pack
from sglang.router.policy import POLICIES
from sglang.router.radix_cache import RadixCache
from sglang.router.request import Request
from sglang.router.scheduler import Scheduler
from sglang.router.slots import SlotAllocator
from sglang.sampling_params import SamplingParams


def queue_of(prompts):
    params = SamplingParams(max_new_tokens=1)
    return [
        Request(GenerateRequest(i, pack(p), params), eos=(), seed=0) for i, p in enumerate(prompts)
    ]


def cache_with(*sequences):
    allocator = SlotAllocator(1000)
    cache = RadixCache(allocator)
    for tokens in sequences:
        cache.insert(np.array(tokens, dtype=np.int32), allocator.alloc(len(tokens)))
    return cache


def order(policy, prompts, cache):
    return [r.handle for r in POLICIES[policy](queue_of(prompts), cache)]


def test_longest_prefix_match_puts_the_longest_hit_first_and_keeps_ties_in_order():
    cache = cache_with([1, 2, 3, 4], [5, 6])
    prompts = [[9, 9], [5, 6, 7], [8, 8], [1, 2, 3, 4, 5], [1, 2, 7]]
    assert order("lpm", prompts, cache) == [3, 1, 4, 0, 2]


def test_weight_walks_the_branch_with_most_requests_first():
    cache = cache_with([1, 1, 1], [1, 1, 2], [3, 3])
    prompts = [[3, 3, 0], [1, 1, 2, 0], [9], [1, 1, 1, 0], [1, 1, 2, 5]]
    result = order("weight", prompts, cache)
    assert sorted(result) == [0, 1, 2, 3, 4]
    places = [result.index(i) for i in (1, 4, 3)]
    assert max(places) - min(places) == 2, "what shares a branch runs together"
    assert result.index(1) < result.index(0)


def test_fcfs_keeps_the_order_and_random_only_permutes():
    prompts = [[i] for i in range(20)]
    assert order("fcfs", prompts, cache_with()) == list(range(20))
    assert sorted(order("random", prompts, cache_with())) == list(range(20))


def test_the_router_imports_neither_torch_nor_triton():
    code = (
        "import sys, sglang.router.router; "
        "sys.exit(bool({'torch', 'triton', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def hit_rate(policy: str) -> float:
    """20 prefixes x 15 requests in random order; the pool holds a third of the prefixes."""
    rng = np.random.default_rng(0)
    prefixes = rng.integers(0, 1000, (20, 100))
    prompts = [[*prefixes[i % 20], *rng.integers(0, 1000, 10)] for i in rng.permutation(300)]
    scheduler = Scheduler(num_slots=800, num_rows=8, max_len=200, chunk_size=512, policy=policy)
    for handle, prompt in enumerate(prompts):
        params = SamplingParams(max_new_tokens=8, ignore_eos=True)
        scheduler.add(GenerateRequest(handle, pack(prompt), params))
    while not scheduler.is_idle():
        plan, _ = scheduler.plan()
        tokens = np.zeros(len(scheduler.flying[0].sampled_rows))
        scheduler.commit(StepResult(plan.step, pack(tokens)))
    stats = scheduler.stats()
    return stats.hit_tokens / stats.prompt_tokens


def test_policies_that_know_the_tree_hit_twice_as_often_when_prefixes_do_not_all_fit():
    assert min(hit_rate("lpm"), hit_rate("weight")) > 2 * max(hit_rate("fcfs"), hit_rate("random"))
