"""Attention with the Triton kernels: decode rows in one call, prefill rows in another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang.attention.base import AttentionBackend
from sglang.kernels.decode_attention import decode_attention
from sglang.kernels.extend_attention import extend_attention

if TYPE_CHECKING:
    from sglang.worker.batch import Batch


class TritonAttention(AttentionBackend):
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
        num_tokens, d = q.shape[0], batch.num_decode
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        rows, decode_lens = batch.rows[:d], batch.kv_lens[:d]
        if batch.decode_lens is not None:
            # Which rows decode is known on the device only: each kernel leaves out the other's.
            rows, decode_lens = batch.rows, batch.decode_lens
        if len(rows) > 0:
            decode_attention(
                q[: len(rows)], k_cache, v_cache, batch.slot_table,
                rows, decode_lens, scale, window, out[: len(rows)],
            )  # fmt: skip
        if d < num_tokens:
            extend_attention(
                q[d:], k[d:], v[d:], k_cache, v_cache, batch.slot_table,
                batch.rows[d:], batch.q_starts, batch.kv_lens[d:], scale, window,
                batch.max_q_len, out[d:],
            )  # fmt: skip
        return out.view(num_tokens, -1)
