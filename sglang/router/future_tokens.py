"""How much room requests still need.

A sum of what all may still generate would be too much: they do not end at the same time, and who
ends gives back its slots. What counts is the worst moment on the way (Gong et al., "Past-Future
Scheduler for LLM Serving under SLA Guarantees", ASPLOS 2025).
"""

from __future__ import annotations

import numpy as np

from sglang.router.request import Request, Rows


class FutureTokens:
    """The part of the tokens that requests may still generate that they are expected to.

    Most end before their limit. The estimate decays while all goes well and rises with a
    preemption (SGLang's new-token ratio).
    """

    def __init__(self, conservativeness: float) -> None:
        self._start = min(0.7 * conservativeness, 1.0)
        self._floor = 0.14 * self._start
        self.ratio = self._start

    def step(self) -> None:
        self.ratio = max(self.ratio - (self._start - self._floor) / 600, self._floor)

    def preempted(self) -> None:
        self.ratio = self._start

    def forecast(self, rows: Rows) -> Forecast:
        return Forecast(self.ratio, rows)


class Forecast:
    """Whether running requests, and those that join them, will fit the KV pool until they end."""

    def __init__(self, ratio: float, rows: Rows) -> None:
        running = rows.running()
        planned = rows.planned[running]
        prompts = np.maximum(planned, rows.prefill_len[running])
        self._ratio = ratio
        self._prompts = sum((prompts - planned).tolist())
        """Slots that are taken as soon as may be: of prompts that are not planned to their end."""
        self._held = (prompts - rows.shared[running]).tolist()
        """Slots that each gives back when it ends..."""
        self._remaining = (ratio * (rows.limit - rows.known)[running]).tolist()
        """...after so many more tokens."""
        self._total = sum(self._remaining)

    def join(self, request: Request, cached: int, room: int) -> bool:
        """False: with this request, more than `room` slots would be needed some day."""
        own = len(request.tokens) - cached
        remaining = self._ratio * (request.limit - len(request.tokens))
        prompts, total = self._prompts + own, self._total + remaining
        if prompts + total > room:  # the peak is at most the sum, which costs less
            grown = peak([*self._held, own], [*self._remaining, remaining])
            if prompts + grown > room:
                return False
        self._prompts, self._total = prompts, total
        self._held.append(own)
        self._remaining.append(remaining)
        return True


def peak(held: list[int], remaining: list[float]) -> float:
    """Slots beyond today's at the worst moment, if each request grows by a token a step for its
    `remaining` steps, and then gives back those and what it had `held`."""
    steps = np.array(remaining)
    order = np.argsort(-steps)
    steps = steps[order]
    until = np.array(held)[order].cumsum()
    # When a request is about to end, those that last as long have grown as much, and those that
    # did not have gone.
    grown = steps * np.arange(1, len(steps) + 1)
    return float((grown - (until[-1] - until)).max())
