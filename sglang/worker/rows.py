"""What a worker keeps of each running request: the row-indexed state of the seam.

A plan names rows and new slots only. Row lengths are mirrored on the host, so everything about a
step is known there without asking the device, but for the last sampled token: `last_token` is what
lets a step be launched before the one before it has ended.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from sglang.messages import RowSpec, StepPlan, unpack

NUM_PARAMS = 5
"""Sampling parameters of a row: temperature, top_p, min_p (float32 bits), top_k, seed."""
_NONE = np.empty(0, dtype=np.int32)


@dataclass
class StepArrays:
    """A step in int32 NumPy arrays: T tokens of n rows, decode rows first."""

    num_decode: int
    rows: np.ndarray  # [n]
    q_lens: np.ndarray  # [n] new tokens
    kv_lens: np.ndarray  # [n] tokens after this step
    owners: np.ndarray  # [T] the token's row
    positions: np.ndarray  # [T]
    slots: np.ndarray  # [T]
    prefill_ids: np.ndarray  # [T - num_decode]
    sample_at: np.ndarray  # [s] tokens whose logits are sampled
    sample_of: np.ndarray  # [s] index into rows
    grown_at: np.ndarray  # [T] into the flat slot table the slots go
    params: np.ndarray  # [NUM_PARAMS, n]
    cached_at: np.ndarray  # [c] into the flat slot table...
    cached_slots: np.ndarray  # [c] ...the slots of the opened rows' cached prefixes go
    masked: np.ndarray  # [m] index into sample_of
    masks: np.ndarray  # [m, W] bits of the allowed tokens

    @classmethod
    def empty(cls) -> StepArrays:
        no_params, no_masks = np.empty((NUM_PARAMS, 0), dtype=np.int32), _NONE.reshape(0, 0)
        return cls(
            0, _NONE, _NONE, _NONE, _NONE, _NONE, _NONE, _NONE, _NONE, _NONE, _NONE, no_params,
            _NONE, _NONE, _NONE, no_masks,
        )  # fmt: skip


class RowState:
    """R rows and one more, index R, for padding, which reads and writes no KV."""

    def __init__(self, num_rows: int, max_len: int, device: torch.device) -> None:
        assert (num_rows + 1) * max_len < 2**31, "slot table indices are int32"
        self.num_rows = num_rows
        self.max_len = max_len
        shape = (num_rows + 1, max_len)
        self.slot_table = torch.zeros(shape, dtype=torch.int32, device=device)
        self.last_token = torch.zeros(num_rows + 1, dtype=torch.int32, device=device)
        self._seq_len = np.zeros(num_rows + 1, dtype=np.int32)  # tokens whose KV exists
        self._params = np.zeros((NUM_PARAMS, num_rows + 1), dtype=np.int32)
        self._ones = np.ones(num_rows, dtype=np.int32)
        self._count = np.arange(num_rows, dtype=np.int32)
        for shared in (self._ones, self._count):  # by all steps
            shared.flags.writeable = False

    def advance(self, plan: StepPlan, payload: bytes) -> StepArrays:
        """Reads a plan (StepPlan's docstring draws its payload) and moves the rows past it."""
        d, num_prefill = plan.num_decode, plan.num_rows - plan.num_decode
        cached_at = self._open(plan.opened) if plan.opened else _NONE
        rows, chunk_lens, samples, slots, cached_slots, prefill_ids, masks = _split(
            unpack(payload),
            plan.num_rows,
            num_prefill,
            num_prefill,
            d + plan.num_prefill_tokens,
            len(cached_at),
            plan.num_prefill_tokens,
        )
        index = rows.astype(np.intp)  # NumPy would make it, at each use
        before = self._seq_len.take(index)
        if num_prefill:
            q_lens = np.concatenate((self._ones[:d], chunk_lens))
            positions, owners = _ranges(before, q_lens), rows.repeat(q_lens)
            sample_of = np.concatenate((self._count[:d], d + samples.nonzero()[0]))
            sample_at = q_lens.cumsum(dtype=np.int32)[sample_of] - 1
        else:
            q_lens = self._ones[:d]
            positions, owners = before, rows
            sample_of = sample_at = self._count[:d]
        self._seq_len[index] = kv_lens = before + q_lens
        return StepArrays(
            num_decode=d,
            rows=rows,
            q_lens=q_lens,
            kv_lens=kv_lens,
            owners=owners,
            positions=positions,
            slots=slots,
            prefill_ids=prefill_ids,
            sample_at=sample_at,
            sample_of=sample_of.astype(np.int32, copy=False),
            grown_at=owners * np.int32(self.max_len) + positions,
            params=self._params.take(index, axis=1),
            cached_at=cached_at,
            cached_slots=cached_slots,
            masked=np.array(plan.masked, dtype=np.int32) if plan.masked else _NONE,
            masks=masks.reshape(len(plan.masked), -1) if plan.masked else masks.reshape(0, 0),
        )

    def _open(self, specs: list[RowSpec]) -> np.ndarray:
        """Sets lengths and parameters; returns where the cached slots go in the slot table."""
        rows = np.array([spec.row for spec in specs], dtype=np.int32)
        cached_lens = np.array([spec.cached_len for spec in specs], dtype=np.int32)
        self._seq_len[rows] = cached_lens
        self._params[:, rows] = _params(specs)
        return _ranges(rows * np.int32(self.max_len), cached_lens)


def _split(data: np.ndarray, *sizes: int) -> list[np.ndarray]:
    """The parts of these sizes, and what is left."""
    assert len(data) >= sum(sizes), "the payload belies its header"
    parts, end = [], 0
    for size in sizes:
        start, end = end, end + size
        parts.append(data[start:end])
    return [*parts, data[end:]]


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenated start, start + 1, ..., start + length - 1. All are int32; there is at least one
    range, though it may be empty."""
    ends = lengths.cumsum(dtype=np.int32)
    offsets = starts - ends + lengths
    return offsets.repeat(lengths) + np.arange(ends[-1], dtype=np.int32)


def _params(specs: list[RowSpec]) -> np.ndarray:
    floats = np.array([(s.temperature, s.top_p, s.min_p) for s in specs], dtype=np.float32)
    params = np.empty((NUM_PARAMS, len(specs)), dtype=np.int32)
    params[:3] = floats.T.view(np.int32)
    params[3] = [s.top_k for s in specs]
    params[4] = np.array([s.seed for s in specs], dtype=np.uint32).view(np.int32)
    return params
