"""Attention with the Triton kernels: decode rows in one call, prefill rows in another. Where all
rows decode, that call does RoPE and the write to the KV cache too."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang.attention.base import AttentionBackend, AttentionShape
from sglang.kernels.decode_attention import decode_attention
from sglang.kernels.decode_shares import Shares, share_out
from sglang.kernels.extend_attention import extend_attention
from sglang.kernels.rope import Rope

if TYPE_CHECKING:
    from sglang.worker.batch import Batch


class TritonAttention(AttentionBackend):
    def __init__(self, shape: AttentionShape) -> None:
        self._shape = shape
        self._shares: dict[int, Shares] = {}
        """How this step's decoding is shared out, by window."""

    def begin(self, batch: Batch) -> None:
        rows, kv_lens = _decoding(batch)
        if len(rows) > 0 and kv_lens.is_cuda:
            shape = self._shape
            heads = shape.num_heads, shape.num_kv_heads, shape.head_dim
            self._shares = {
                window: share_out(kv_lens, *heads, shape.kv_dtype, window)
                for window in shape.windows
            }

    def forward(
        self,
        qkv: torch.Tensor,
        rope: Rope,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        batch: Batch,
        scale: float,
        window: int = 0,
    ) -> torch.Tensor:
        if batch.num_decode < len(qkv):
            return super().forward(qkv, rope, k_cache, v_cache, batch, scale, window)
        heads = qkv.view(len(qkv), -1, k_cache.shape[2])
        out = decode_attention(
            heads, k_cache, v_cache, batch.slot_table, batch.rows, batch.kv_lens, scale, window,
            shares=self._shares.get(window), rope=rope,
        )  # fmt: skip
        return out.flatten(1)

    def attend(
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
        rows, decode_lens = _decoding(batch)
        if len(rows) > 0:
            decode_attention(
                q[: len(rows)], k_cache, v_cache, batch.slot_table,
                rows, decode_lens, scale, window, out[: len(rows)],
                self._shares.get(window),
            )  # fmt: skip
        if d < num_tokens:
            extend_attention(
                q[d:], k[d:], v[d:], k_cache, v_cache, batch.slot_table,
                batch.rows[d:], batch.q_starts, batch.kv_lens[d:], scale, window,
                batch.max_q_len, out[d:],
            )  # fmt: skip
        return out.view(num_tokens, -1)


def _decoding(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows that decode, their lengths)."""
    if batch.decode_lens is not None:
        # Which rows decode is known on the device only: each kernel leaves out the other's.
        return batch.rows, batch.decode_lens
    return batch.rows[: batch.num_decode], batch.kv_lens[: batch.num_decode]
