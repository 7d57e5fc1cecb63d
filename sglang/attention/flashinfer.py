"""Attention with FlashInfer's kernels (Ye et al., 2025, arXiv:2501.01005), an optional extra.

FlashInfer spreads a step's work over the GPU on the host: the step is *planned* from the lengths of
its rows, then all layers run by that plan. Its KV cache has pages, ours has slots: a slot is a page
of one token, and the slots of all rows, end to end, are the page indices that it wants.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sglang.attention.base import AttentionBackend, AttentionShape
from sglang.kernels.gather_slots import gather_slots

if TYPE_CHECKING:
    from sglang.worker.batch import Batch

logger = logging.getLogger(__name__)

HEAD_DIMS = (64, 128, 256)
_PARTIAL_BYTES = 256 << 20
"""For the partial results of rows that are split."""
_PLAN_BYTES = 8 << 20
_TURNS = 4
"""Plans of one kind that may be on their way to the device; one more waits."""


class FlashInferAttention(AttentionBackend):
    """Decode rows run in one call, prefill rows in another. Decode steps can be captured: a
    plan has a fixed place on the device, and `plan_decode` puts one there before each replay."""

    captures_prefill = False

    def __init__(self, shape: AttentionShape, device: torch.device) -> None:
        """Raises ValueError where FlashInfer is not installed, or not made for the shape."""
        flashinfer = _import_flashinfer()
        if shape.dtype not in (torch.float16, torch.bfloat16) or shape.head_dim not in HEAD_DIMS:
            raise ValueError(
                "the flashinfer attention backend is for float16 or bfloat16 and head dimensions "
                f"{', '.join(map(str, HEAD_DIMS))}, not {str(shape.dtype).removeprefix('torch.')} "
                f"and {shape.head_dim}"
            )
        logger.info("flashinfer compiles what is not in its cache: that may take minutes")
        self._device = device
        self._buffers = _Buffers(shape, device)
        partial = torch.zeros(_PARTIAL_BYTES, dtype=torch.uint8, device=device)
        self._layers = {
            window: _Layers(flashinfer, shape, window, partial) for window in shape.windows
        }

    def plan_decode(self, kv_lens: np.ndarray, size: int) -> None:
        lens = np.ones(size, dtype=np.int32)  # padding sees one token: of none, the mean is NaN
        lens[: len(kv_lens)] = kv_lens
        for layers in self._layers.values():
            layers.plan_captured(_starts(lens), self._buffers)

    def begin(self, batch: Batch) -> None:
        d, table, buffers = batch.num_decode, batch.slot_table, self._buffers
        if batch.kv_lens_host is None:  # being captured, and planned
            gather_slots(table, batch.rows, buffers.starts[: d + 1], buffers.slots)
            return
        kv_lens = np.maximum(batch.kv_lens_host, 1)
        if d > 0:
            starts = _starts(kv_lens[:d])
            slots = self._gather(table, batch.rows[:d], starts)
            for layers in self._layers.values():
                layers.plan_decode(starts, slots, buffers.host_ones[:d])
        if d < len(kv_lens):
            assert batch.q_lens_host is not None
            starts = _starts(kv_lens[d:])
            slots = self._gather(table, batch.rows[d:], starts)
            for layers in self._layers.values():
                ones = buffers.host_ones[: len(kv_lens) - d]
                layers.plan_prefill(_starts(batch.q_lens_host[d:]), starts, slots, ones)

    def _gather(
        self, slot_table: torch.Tensor, rows: torch.Tensor, starts: torch.Tensor
    ) -> torch.Tensor:
        slots = torch.empty(int(starts[-1]), dtype=torch.int32, device=self._device)
        gather_slots(slot_table, rows, starts.to(self._device, non_blocking=True), slots)
        return slots

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        batch: Batch,
        scale: float,
        window: int = 0,
    ) -> torch.Tensor:
        d, layers = batch.num_decode, self._layers[window]
        pages = (k_cache[:, None], v_cache[:, None])  # [S, 1, Hkv, D]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if d > 0:
            layers.decode.run(q[:d], pages, out=out[:d])
        if d < len(q):
            layers.prefill.run(q[d:], pages, out=out[d:])
        return out.view(len(q), -1)


class _Buffers:
    """What captured decode steps read at fixed addresses: one of them at a time."""

    def __init__(self, shape: AttentionShape, device: torch.device) -> None:
        n, on_device = shape.max_rows, {"dtype": torch.int32, "device": device}
        self.slots = torch.zeros((n + 1) * shape.max_len, **on_device)
        self.starts = torch.zeros(n + 1, **on_device)
        self.ones = torch.ones(n, **on_device)
        """Tokens in each row's last page."""
        self.host_ones = torch.ones(n, dtype=torch.int32, pin_memory=True)


class _Layers:
    """The layers that have one window in common: FlashInfer's wrappers for them."""

    def __init__(
        self, flashinfer: Any, shape: AttentionShape, window: int, partial: torch.Tensor
    ) -> None:
        self._heads = (shape.num_heads, shape.num_kv_heads, shape.head_dim, 1)
        self._options = {
            "window_left": window - 1,
            "sm_scale": shape.head_dim**-0.5,
            "q_data_type": shape.dtype,
            "kv_data_type": shape.kv_dtype,
        }
        group = shape.num_heads // shape.num_kv_heads

        def decode_wrapper(**buffers: Any) -> Any:
            return flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                partial, use_tensor_cores=group >= 4 or shape.kv_dtype.itemsize == 1, **buffers
            )

        self._decode_wrapper = decode_wrapper
        self._captured: dict[int, Any] = {}  # by number of rows
        self._uncaptured = decode_wrapper()
        self.decode = self._uncaptured
        """What `run`s the step's decode rows..."""
        self.prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(partial)
        """...and its prefill rows."""
        self._decode_plans = _Plans(partial.device)
        self._prefill_plans = _Plans(partial.device)

    def plan_captured(self, starts: torch.Tensor, buffers: _Buffers) -> None:
        n = len(starts) - 1
        if n not in self._captured:
            self._captured[n] = self._decode_wrapper(
                use_cuda_graph=True,
                paged_kv_indptr_buffer=buffers.starts[: n + 1],
                paged_kv_indices_buffer=buffers.slots,
                paged_kv_last_page_len_buffer=buffers.ones[:n],
            )
        self.decode = self._captured[n]
        # The slots are gathered within the graph.
        self._plan_decode(starts, buffers.slots[:0], buffers.host_ones[:n])

    def plan_decode(self, starts: torch.Tensor, slots: torch.Tensor, ones: torch.Tensor) -> None:
        self.decode = self._uncaptured
        self._plan_decode(starts, slots, ones)

    def _plan_decode(self, *pages: torch.Tensor) -> None:
        self._decode_plans.make(self.decode, *pages, *self._heads, **self._options)

    def plan_prefill(self, q_starts: torch.Tensor, *pages: torch.Tensor) -> None:
        self._prefill_plans.make(
            self.prefill, q_starts, *pages, *self._heads, causal=True, **self._options
        )


class _Plans:
    """Where plans of one kind are put, of which a step has one.

    FlashInfer writes a plan to pinned memory and copies it to the device, in stream order: behind
    the steps that still run. It would write the next one to the same memory, before that copy.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_device = torch.empty(_PLAN_BYTES, dtype=torch.uint8, device=device)
        self._pinned = deque(
            (torch.empty(_PLAN_BYTES, dtype=torch.uint8, pin_memory=True), torch.cuda.Event())
            for _ in range(_TURNS)
        )

    def make(self, wrapper: Any, *args: Any, **options: Any) -> None:
        pinned, copied = self._pinned[0]
        self._pinned.rotate(-1)
        copied.synchronize()
        # What reset_workspace_buffer sets, without its allocation of other pinned memory.
        wrapper._int_workspace_buffer = self._on_device
        wrapper._pin_memory_int_workspace_buffer = pinned
        wrapper.plan(*args, **options)
        copied.record()


def _starts(lens: np.ndarray) -> torch.Tensor:
    """int32 [n + 1], pinned: where each of n parts begins, and the last ends."""
    starts = torch.zeros(len(lens) + 1, dtype=torch.int32, pin_memory=True)
    np.cumsum(lens, out=starts.numpy()[1:])
    return starts


def _import_flashinfer() -> Any:
    try:
        import flashinfer
    except ImportError as error:
        raise ValueError(
            "the flashinfer attention backend needs flashinfer-python: "
            f"pip install 'nano-sglang[flashinfer]' ({error})"
        ) from None
    return flashinfer
