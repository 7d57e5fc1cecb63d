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

NUM_PARAMS = 6
"""Sampling parameters of a row: temperature, top_p, min_p (float32 bits), top_k, seed, unused."""


@dataclass
class StepArrays:
    """A step in int32 NumPy arrays: T tokens of n rows, decode rows first."""

    num_decode: int
    rows: np.ndarray  # [n]
    q_lens: np.ndarray  # [n] new tokens
    kv_lens: np.ndarray  # [n] tokens after this step
    positions: np.ndarray  # [T]
    slots: np.ndarray  # [T]
    prefill_ids: np.ndarray  # [T - num_decode]
    sample_at: np.ndarray  # [s] tokens whose logits are sampled
    sample_of: np.ndarray  # [s] index into rows
    grown_at: np.ndarray  # [T] into the flat slot table the slots go
    opened: np.ndarray  # [o] rows
    params: np.ndarray  # [NUM_PARAMS, o]
    cached_at: np.ndarray  # [c] into the flat slot table...
    cached_slots: np.ndarray  # [c] ...the slots of the opened rows' cached prefixes go
    masked: np.ndarray  # [m] index into sample_of
    masks: np.ndarray  # [m, W] bits of the allowed tokens

    @classmethod
    def empty(cls) -> StepArrays:
        none = np.empty(0, dtype=np.int32)
        params = np.empty((NUM_PARAMS, 0), dtype=np.int32)
        masks = np.empty((0, 0), dtype=np.int32)
        return cls(
            0, none, none, none, none, none, none, none, none, none, none, params, none, none,
            none, masks,
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
        self.params = torch.zeros((NUM_PARAMS, num_rows + 1), dtype=torch.int32, device=device)
        self.seq_len = np.zeros(num_rows + 1, dtype=np.int32)  # tokens whose KV exists

    def advance(self, plan: StepPlan, payload: bytes) -> StepArrays:
        """Reads a plan (StepPlan's docstring draws its payload) and moves `seq_len` past it."""
        d, num_prefill = plan.num_decode, plan.num_rows - plan.num_decode
        opened = np.array([spec.row for spec in plan.opened], dtype=np.int32)
        cached_lens = np.array([spec.cached_len for spec in plan.opened], dtype=np.int32)
        num_masked = len(plan.masked)
        rows, chunk_lens, samples, slots, cached_slots, prefill_ids, masks = _split(
            unpack(payload),
            plan.num_rows,
            num_prefill,
            num_prefill,
            d + plan.num_prefill_tokens,
            int(cached_lens.sum()),
            plan.num_prefill_tokens,
        )
        self.seq_len[opened] = cached_lens
        before = self.seq_len[rows]
        q_lens = np.ones(plan.num_rows, dtype=np.int32)
        q_lens[d:] = chunk_lens
        self.seq_len[rows] = kv_lens = before + q_lens
        if num_prefill:
            positions = _ranges(before, q_lens)
            owners = np.repeat(rows, q_lens)
            sample_of = np.concatenate([np.arange(d), d + np.flatnonzero(samples)])
            sample_at = np.cumsum(q_lens)[sample_of] - 1
        else:
            positions, owners = before, rows
            sample_of = sample_at = np.arange(d)
        grown_at = owners * np.int32(self.max_len) + positions
        return StepArrays(
            num_decode=d,
            rows=rows,
            q_lens=q_lens,
            kv_lens=kv_lens,
            positions=positions,
            slots=slots,
            prefill_ids=prefill_ids,
            sample_at=sample_at.astype(np.int32),
            sample_of=sample_of.astype(np.int32),
            grown_at=grown_at,
            opened=opened,
            params=_params(plan.opened),
            cached_at=_ranges(opened * np.int32(self.max_len), cached_lens),
            cached_slots=cached_slots,
            masked=np.array(plan.masked, dtype=np.int32),
            masks=masks.reshape(num_masked, len(masks) // max(num_masked, 1)),
        )


def _split(data: np.ndarray, *sizes: int) -> list[np.ndarray]:
    """The parts of these sizes, and what is left."""
    assert len(data) >= sum(sizes), "the payload belies its header"
    return np.split(data, np.cumsum(sizes))


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenated start, start + 1, ..., start + length - 1: int32."""
    first = np.cumsum(lengths) - lengths
    return (np.repeat(starts - first, lengths) + np.arange(lengths.sum())).astype(np.int32)


def _params(specs: list[RowSpec]) -> np.ndarray:
    floats = np.array([(s.temperature, s.top_p, s.min_p) for s in specs], dtype=np.float32)
    params = np.zeros((NUM_PARAMS, len(specs)), dtype=np.int32)
    params[:3] = floats.reshape(-1, 3).T.view(np.int32) if len(specs) else 0
    params[3] = [s.top_k for s in specs]
    params[4] = np.array([s.seed for s in specs], dtype=np.uint32).view(np.int32)
    return params
