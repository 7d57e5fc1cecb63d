"""Building one step's plan: arrays, as they go to the workers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from sglang.messages import RowSpec, StepPlan, pack
from sglang.router.radix_cache import EMPTY
from sglang.router.request import Request


@dataclass
class Chunk:
    """New prompt tokens of one row in one step: positions start..end of its request."""

    request: Request
    row: int
    start: int
    end: int
    samples: bool
    """The chunk ends the prompt: its last position yields a token."""


@dataclass
class Flight:
    """A plan that was sent and whose result is not committed."""

    step: int
    decode_rows: np.ndarray
    chunks: list[Chunk]

    def rows(self) -> np.ndarray:
        """int32: every row of the step, in plan order."""
        return self._join([chunk.row for chunk in self.chunks])

    def sampled_rows(self) -> np.ndarray:
        """int32: the rows that sample, in the order of StepResult.tokens."""
        return self._join([chunk.row for chunk in self.chunks if chunk.samples])

    def _join(self, prefill_rows: list[int]) -> np.ndarray:
        return np.concatenate([self.decode_rows, np.asarray(prefill_rows, dtype=np.int32)])


@dataclass
class PlanBuilder:
    """Collects a step; `build` lays it out as StepPlan's docstring draws it."""

    step: int
    decode_rows: np.ndarray = field(default_factory=lambda: EMPTY)
    decode_slots: np.ndarray = field(default_factory=lambda: EMPTY)
    opened: list[RowSpec] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    _grown: list[int] = field(default_factory=list)
    _grown_slots: list[np.ndarray] = field(default_factory=list)
    _prefill_ids: list[np.ndarray] = field(default_factory=list)

    def open(self, spec: RowSpec, cached_slots: np.ndarray) -> None:
        self.opened.append(spec)
        if len(cached_slots):
            self._grow(spec.row, 0, cached_slots)

    def prefill(self, chunk: Chunk, tokens: np.ndarray, slots: np.ndarray) -> None:
        self.chunks.append(chunk)
        self._grow(chunk.row, chunk.start, slots)
        self._prefill_ids.append(tokens)

    def _grow(self, row: int, at: int, slots: np.ndarray) -> None:
        self._grown += (row, at, len(slots))
        self._grown_slots.append(slots)

    def is_empty(self) -> bool:
        return not len(self.decode_rows) and not self.chunks

    def build(self) -> tuple[StepPlan, bytes, Flight]:
        flight = Flight(self.step, self.decode_rows, self.chunks)
        rows = flight.rows()
        q_lens = [c.end - c.start for c in self.chunks]
        samples = [c.samples for c in self.chunks]
        grown_slots = np.concatenate([EMPTY, *self._grown_slots])
        prefill_ids = np.concatenate([EMPTY, *self._prefill_ids])
        plan = StepPlan(
            step=self.step,
            opened=self.opened,
            num_rows=len(rows),
            num_decode=len(self.decode_rows),
            num_grown=len(self._grown) // 3,
            num_grown_slots=len(grown_slots),
            num_prefill_tokens=len(prefill_ids),
        )
        parts = (
            rows, self.decode_slots, q_lens, samples, self._grown, grown_slots, prefill_ids
        )  # fmt: skip
        return plan, b"".join(pack(part) for part in parts), flight
