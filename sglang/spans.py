"""Who does what when: a trace of all processes, which https://ui.perfetto.dev draws.

A thread has a *lane*, and tells it now and then what the time since it last did so was for. That
costs next to nothing while no profile is being taken. The clock is CLOCK_MONOTONIC, which all
processes of a host share. At the end each process writes its lanes into the server's folder, and
whoever asked for the profile joins them: Chrome's trace event format, in JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from pathlib import Path

from sglang.messages import StartProfile, StopProfile

CAPACITY = 1 << 16
"""Spans of a lane that are kept: the last ones."""
WRITE_SECONDS = 20.0
"""In which router and workers have written what they noted."""
Span = tuple[str, int, int, int]
"""What for, start and end in nanoseconds, step (-1: of none)."""
now = time.perf_counter_ns


class Lane:
    def __init__(self, name: str) -> None:
        self.name = name
        self._spans: deque[Span] | None = None
        self._last = 0

    @property
    def is_on(self) -> bool:
        return self._spans is not None

    def lap(self, what: str, step: int = -1) -> None:
        """The time since the last lap, or `skip`, was for this."""
        spans = self._spans
        if spans is not None:
            start, self._last = self._last, now()
            spans.append((what, start, self._last, step))

    def skip(self) -> None:
        """The time since the last lap was for nothing: waiting."""
        if self._spans is not None:
            self._last = now()

    def add(self, what: str, start: int, end: int, step: int = -1) -> None:
        if self._spans is not None:
            self._spans.append((what, start, end, step))

    def start(self) -> None:
        self._last = now()
        self._spans = deque(maxlen=CAPACITY)

    def stop(self) -> list[Span]:
        spans, self._spans = self._spans or deque(), None
        return [spans.popleft() for _ in range(len(spans))]  # its thread may be at its last one


class Recorder:
    """The lanes of this process."""

    def __init__(self, process: str, order: int, folder: str) -> None:
        """order: of the processes in the picture, from the top."""
        self._process, self._order = process, order
        self._path = Path(folder, f"{process}.{os.getpid()}.spans")
        self._lanes: list[Lane] = []

    def lane(self, name: str) -> Lane:
        self._lanes.append(Lane(name))
        return self._lanes[-1]

    def handle(self, message: StartProfile | StopProfile) -> None:
        if isinstance(message, StartProfile):
            for lane in self._lanes:
                lane.start()
            return
        draft = self._path.with_suffix(".draft")
        try:
            draft.write_text(json.dumps(self._events()))
            draft.rename(self._path)  # whole, or not there
        except OSError as error:  # a full disk does not end what is being served
            print(f"no profile of {self._process}: {error}", file=sys.stderr, flush=True)

    def _events(self) -> list[dict]:
        pid = os.getpid()
        events = [
            _named("process_name", pid, 0, name=self._process),
            _named("process_sort_index", pid, 0, sort_index=self._order),
        ]
        for tid, lane in enumerate(self._lanes, 1):
            events.append(_named("thread_name", pid, tid, name=lane.name))
            events.append(_named("thread_sort_index", pid, tid, sort_index=tid))
            for what, start, end, step in lane.stop():
                event = {"ph": "X", "name": what, "pid": pid, "tid": tid}
                event |= {"ts": start / 1e3, "dur": (end - start) / 1e3}
                events.append(event | ({"args": {"step": step}} if step >= 0 else {}))
        return events


def _named(what: str, pid: int, tid: int, **args: str | int) -> dict:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": args}


class Profile:
    """A profile from the side that asks for it. `start` and `stop` give what to tell the router."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self.is_on = False
        self._until = 0.0

    def start(self) -> StartProfile:
        """Raises ValueError if one is being taken."""
        if self.is_on:
            raise ValueError("a profile is being taken already")
        self.is_on = True
        for old in self._folder.glob("*.spans"):
            old.unlink()
        return StartProfile()

    def stop(self) -> StopProfile:
        """Raises ValueError if none is being taken."""
        if not self.is_on:
            raise ValueError("no profile is being taken: start one first")
        self.is_on = False
        self._until = time.monotonic() + WRITE_SECONDS
        return StopProfile()

    def is_written(self, num_workers: int) -> bool:
        """By router and workers, all of them. Raises OSError if it should have been by now."""
        if len(list(self._folder.glob("*.spans"))) == 1 + num_workers:
            return True
        if time.monotonic() > self._until:
            raise OSError("router or workers have not written their parts of the profile")
        return False

    def join(self, path: Path) -> Path:
        """Puts the trace there; a folder gets a file with a name of its own."""
        parts = [json.loads(part.read_text()) for part in sorted(self._folder.glob("*.spans"))]
        if path.is_dir():
            path = path / f"nano-sglang-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.trace.json"
        events = [event for part in parts for event in part]
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
        return path
