"""When the GPU worked at each step, for a profile's picture."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from sglang.spans import Lane, now


class GPUSpans:
    """By CUDA events around what the launch thread enqueues for a step; the reply thread, which has
    waited for the step, puts them into the lane. The GPU's clock is set by the host's once."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._origin: tuple[torch.cuda.Event, int] | None = None
        self._steps: dict[int, tuple[torch.cuda.Event, torch.cuda.Event]] = {}

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        if not self._lane.is_on:
            self._origin = None
            yield
            return
        if self._origin is None:
            event = _record()
            event.synchronize()
            self._origin = event, now()
        begin = _record()
        yield
        self._steps[step] = begin, _record()

    def tell(self, step: int) -> None:
        """Waits for the step's end."""
        events, origin = self._steps.pop(step, None), self._origin
        if events is not None and origin is not None:
            events[1].synchronize()
            begin, end = (origin[1] + int(1e6 * origin[0].elapsed_time(e)) for e in events)
            self._lane.add("step", begin, end, step)


def _record() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
