"""Attention of one new token a row over the row's cached tokens."""

from __future__ import annotations

import torch


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_table: torch.Tensor,
    rows: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """softmax(scale q K^T) V -> [n, Hq, D], in q's dtype.

    q           [n, Hq, D]
    k_cache, v_cache  [S, Hkv, D]; query head h reads KV head h // (Hq / Hkv)
    slot_table  int32 [R + 1, max_len]: row and token position -> slot of the cache
    rows        int32 [n]
    kv_lens     int32 [n], tokens of the row, the new one included; 0 (padding) gives zeros
    window      only the last `window` tokens are seen; 0: all
    """
    return decode_attention_naive(q, k_cache, v_cache, slot_table, rows, kv_lens, scale, window)


def decode_attention_naive(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_table: torch.Tensor,
    rows: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    out = torch.zeros_like(q)
    group = q.shape[1] // k_cache.shape[1]
    for i, (row, kv_len) in enumerate(zip(rows.tolist(), kv_lens.tolist(), strict=True)):
        if kv_len == 0:
            continue
        slots = slot_table[row, max(kv_len - window, 0) if window else 0 : kv_len]
        k = k_cache[slots].float().repeat_interleave(group, 1)  # [L, Hq, D]
        v = v_cache[slots].float().repeat_interleave(group, 1)
        weights = torch.einsum("hd,lhd->hl", q[i].float(), k).mul(scale).softmax(-1)
        out[i] = torch.einsum("hl,lhd->hd", weights, v)
    return out
