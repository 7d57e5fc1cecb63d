"""How much room a request still needs."""

from __future__ import annotations


class FutureTokens:
    """How many of the tokens that running requests may still generate to reserve slots for.

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
