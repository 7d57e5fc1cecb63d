"""How late the event loop is: what every stream waits for besides the engine."""

from __future__ import annotations

import asyncio
import time
from collections import deque

import numpy as np

PERIOD_SECONDS = 0.02
WINDOW = 3000
"""Samples that count: those of the last minute."""


class LoopLag:
    """Made within a running loop, which from then on it asks to be called on time."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._late: deque[float] = deque(maxlen=WINDOW)
        self._sleep()

    def _sleep(self) -> None:
        self._due = time.monotonic() + PERIOD_SECONDS
        self._loop.call_later(PERIOD_SECONDS, self._wake)

    def _wake(self) -> None:
        self._late.append(max(time.monotonic() - self._due, 0.0))
        self._sleep()

    def figures(self) -> dict[str, float]:
        """Milliseconds: median, 99th percentile and maximum of the last minute."""
        late = 1000 * np.array(self._late or [0.0])
        p50, p99 = np.percentile(late, (50, 99))
        return {"p50": round(p50, 2), "p99": round(p99, 2), "max": round(late.max(), 2)}
