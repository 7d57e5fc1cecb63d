"""The radix tree against a naive model: a set of every cached prefix."""

import random

import numpy as np
import pytest

from sglang.router.radix_cache import RadixCache
from sglang.router.slots import SlotAllocator


def tokens_of(rng: random.Random) -> np.ndarray:
    return np.array([rng.randint(0, 2) for _ in range(rng.randint(1, 12))], dtype=np.int32)


class NaiveCache:
    """Every cached prefix in a dict: prefix -> the slot of its last token."""

    def __init__(self) -> None:
        self.slot: dict[tuple, int] = {}

    def match(self, tokens) -> list[int]:
        slots = []
        for n in range(1, len(tokens) + 1):
            if (prefix := tuple(tokens[:n])) not in self.slot:
                break
            slots.append(self.slot[prefix])
        return slots

    def insert(self, tokens, slots) -> None:
        for n in range(1, len(tokens) + 1):
            self.slot.setdefault(tuple(tokens[:n]), slots[n - 1])


@pytest.mark.parametrize("seed", range(20))
def test_match_and_insert_agree_with_a_set_of_prefixes(seed):
    rng, naive = random.Random(seed), NaiveCache()
    allocator = SlotAllocator(10_000)
    cache = RadixCache(allocator)
    for _ in range(100):
        tokens = tokens_of(rng)
        if rng.random() < 0.5:
            slots = allocator.alloc(len(tokens))
            in_tree, _ = cache.insert(tokens, slots)
            naive.insert(tokens.tolist(), slots.tolist())
            assert in_tree.tolist() == naive.match(tokens.tolist())
        assert cache.match_len(tokens) == len(naive.match(tokens.tolist()))
        assert cache.match(tokens)[0].tolist() == naive.match(tokens.tolist())
        assert cache.num_tokens == cache.num_evictable == len(naive.slot)


@pytest.mark.parametrize("seed", range(20))
def test_eviction_spares_locked_paths_and_frees_the_rest(seed):
    rng = random.Random(seed)
    allocator = SlotAllocator(400)
    cache = RadixCache(allocator)
    locked = []
    for _ in range(200):
        tokens = tokens_of(rng)
        action = rng.random()
        if action < 0.5 and allocator.num_free >= len(tokens):
            slots = allocator.alloc(len(tokens))
            in_tree, node = cache.insert(tokens, slots)
            allocator.free(slots[slots != in_tree])
            if rng.random() < 0.3:
                cache.lock(node)
                locked.append((tokens, node))
        elif action < 0.7 and locked:
            cache.unlock(locked.pop(rng.randrange(len(locked)))[1])
        else:
            free, evictable = allocator.num_free, cache.num_evictable
            wanted = rng.randint(1, 30)
            cache.evict(wanted)
            assert allocator.num_free >= min(free + wanted, free + evictable)
        for tokens, _ in locked:
            assert cache.match_len(tokens) == len(tokens)
        assert allocator.num_free + cache.num_tokens == 400
    for _, node in locked:
        cache.unlock(node)
    cache.clear()
    assert allocator.num_free == 400 and cache.num_tokens == cache.num_evictable == 0


def test_the_least_recently_used_leaf_goes_first():
    allocator = SlotAllocator(100)
    cache = RadixCache(allocator)
    keys = [np.array([i, i, i], dtype=np.int32) for i in range(3)]
    for key in keys:
        cache.insert(key, allocator.alloc(3))
    cache.match(keys[0])
    cache.evict(3)
    assert [cache.match_len(key) for key in keys] == [3, 0, 3]


def test_a_disabled_cache_remembers_nothing():
    allocator = SlotAllocator(10)
    cache = RadixCache(allocator, disabled=True)
    tokens = np.arange(4, dtype=np.int32)
    in_tree, _ = cache.insert(tokens, allocator.alloc(4))
    assert len(in_tree) == 0 and cache.match_len(tokens) == 0


def test_freeing_a_slot_twice_is_noticed():
    allocator = SlotAllocator(4)
    slots = allocator.alloc(4)
    allocator.free(slots)
    with pytest.raises(AssertionError, match="twice"):
        allocator.free(slots)
