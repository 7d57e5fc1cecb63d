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
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        batch: Batch,
        scale: float,
        window: int = 0,
    ) -> torch.Tensor:
        num_tokens = q.shape[0]
        if batch.decode_lens is not None:
            return self._mixed(q, k_cache, v_cache, batch, scale, window)
        d = batch.num_decode
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if d > 0:
            decode_attention(
                q[:d], k_cache, v_cache, batch.slot_table,
                batch.rows[:d], batch.kv_lens[:d], scale, window, out[:d],
            )  # fmt: skip
        if d < num_tokens:
            q_lens = batch.q_lens_host
            extend_attention(
                q[d:], k_cache, v_cache, batch.slot_table,
                batch.rows[d:], batch.q_starts, batch.kv_lens[d:], scale, window,
                num_tokens - d if q_lens is None else int(q_lens[d:].max()), out[d:],
            )  # fmt: skip
        return out.view(num_tokens, -1)

    def _mixed(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        batch: Batch,
        scale: float,
        window: int,
    ) -> torch.Tensor:
        """Which rows decode is known on the device only. Both kernels see all rows, and give zeros
        to those that are the other's."""
        assert batch.decode_lens is not None
        num_tokens, num_rows = q.shape[0], len(batch.rows)
        decoded = decode_attention(
            q[:num_rows], k_cache, v_cache, batch.slot_table,
            batch.rows, batch.decode_lens, scale, window,
        )  # fmt: skip
        out = extend_attention(
            q, k_cache, v_cache, batch.slot_table,
            batch.rows, batch.q_starts, batch.kv_lens, scale, window,
            max_q_len=num_tokens,
        )  # fmt: skip
        out[:num_rows] += decoded
        return out.view(num_tokens, -1)
