"""In which order queued requests are admitted (--schedule-policy).

A policy is a function (requests in order of arrival, radix tree) -> the same requests, reordered.
To add one, write it here and name it in POLICIES. The queue puts overdue requests before all
others, so a policy need not care for those that it passes over.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable

from sglang.router.radix_cache import Node, RadixCache
from sglang.router.request import Request

Policy = Callable[[list[Request], RadixCache], list[Request]]


def first_come_first_served(queue: list[Request], cache: RadixCache) -> list[Request]:
    return queue


def shuffled(queue: list[Request], cache: RadixCache) -> list[Request]:
    return random.sample(queue, len(queue))


def longest_prefix_match(queue: list[Request], cache: RadixCache) -> list[Request]:
    """Requests whose KV is already there go first, before it is evicted (SGLang, section 3)."""
    for request in queue:
        if request.matched[0] != cache.version:
            request.matched = (cache.version, cache.match_len(request.tokens))
    return sorted(queue, key=lambda request: -request.matched[1])


def depth_first_weight(queue: list[Request], cache: RadixCache) -> list[Request]:
    """A depth-first walk of the tree, the branch with most requests first: who shares a prefix runs
    together (the optimal order for a cache of any size, SGLang, theorem 3.1).

    A walk is resumed at every step, so the branch that it was in, where requests run, comes before
    heavier ones; and what continues no cached prefix comes after all that does.
    """
    waiting: dict[Node, list[Request]] = defaultdict(list)
    weight: dict[Node, int] = defaultdict(int)
    for request in queue:
        _, node = cache.match(request.tokens)
        waiting[node].append(request)
    for node, requests in waiting.items():
        above: Node | None = node
        while above is not None:
            weight[above] += len(requests)
            above = above.parent
    order: list[Request] = []
    stack = [cache.root]
    while stack:  # backwards: the lightest branch first, a node before what continues it
        node = stack.pop()
        order += reversed(waiting.get(node, ()))
        branches = [child for child in node.children.values() if child in weight]
        stack += sorted(branches, key=lambda n: (n.locks > 0, weight[n]), reverse=True)
    return order[::-1]


POLICIES: dict[str, Policy] = {
    "lpm": longest_prefix_match,
    "weight": depth_first_weight,
    "random": shuffled,
    "fcfs": first_come_first_served,
}
