"""Requests that wait for a seat."""

from __future__ import annotations

from bisect import insort

import numpy as np

from sglang.router.policy import POLICIES
from sglang.router.radix_cache import RadixCache
from sglang.router.request import Request

WINDOW = 256
"""A policy orders so many of the longest waiting requests: its cost a step is bounded."""
PATIENCE = 1000
"""After so many admissions more than stood before it on arrival, a request goes first."""
SHARED = 32
"""A prefix of so many uncached tokens is worth a step's wait for the request that computes it."""


class WaitingQueue:
    """In order of arrival; `candidates` says in which order they should be admitted."""

    def __init__(self, policy: str) -> None:
        self._policy = POLICIES[policy]
        self._queue: list[Request] = []
        self._arrived = 0
        self._admitted = 0

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, request: Request) -> None:
        self._arrived += 1
        request.arrival = self._arrived
        request.overdue_at = self._admitted + len(self._queue) + PATIENCE
        self._queue.append(request)

    def put_back(self, request: Request) -> None:
        """A preempted request keeps its place."""
        insort(self._queue, request, key=lambda r: r.arrival)

    def remove(self, request: Request) -> None:
        self._queue.remove(request)

    def remove_admitted(self) -> None:
        """Takes out those that have a row now."""
        before = len(self._queue)
        self._queue = [request for request in self._queue if request.row < 0]
        self._admitted += before - len(self._queue)

    def candidates(self, cache: RadixCache) -> list[Request]:
        """Overdue requests, then the others in the policy's order."""
        window = self._queue[:WINDOW]
        overdue = [r for r in window if r.overdue_at <= self._admitted]
        if not overdue:
            return self._policy(window, cache)
        others = [r for r in window if r.overdue_at > self._admitted]
        return overdue + self._policy(others, cache)


class Claims:
    """In-batch sharing: what running requests are about to put into the tree.

    A waiting request whose next uncached tokens are claimed waits for them, a step, rather than
    compute them a second time.
    """

    def __init__(self) -> None:
        self._prefixes: set[bytes] = set()

    def add(self, tokens: np.ndarray, cached: int) -> None:
        """`tokens`, of which the tree holds `cached`, are being prefilled."""
        if len(tokens) >= cached + SHARED:
            self._prefixes.add(tokens[: cached + SHARED].tobytes())

    def cover(self, tokens: np.ndarray, cached: int) -> bool:
        return bool(self._prefixes) and tokens[: cached + SHARED].tobytes() in self._prefixes
