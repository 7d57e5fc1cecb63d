"""Causal attention of a row's new tokens over its cached prefix and themselves."""

from __future__ import annotations

import torch


def extend_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_table: torch.Tensor,
    rows: torch.Tensor,
    q_starts: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    window: int,
    max_q_len: int,
) -> torch.Tensor:
    """softmax(scale q K^T + causal mask) V -> [T, Hq, D], in q's dtype.

    q           [T, Hq, D], the new tokens of m rows, one row after the other
    k_cache, v_cache  [S, Hkv, D], where the new tokens' K and V are already
    slot_table  int32 [R + 1, max_len]: row and token position -> slot of the cache
    rows        int32 [m]
    q_starts    int32 [m + 1], where in q each row begins; the last one is where the last row ends
    kv_lens     int32 [m], cached and new tokens of the row: its last query is the last of them
    window      a token sees only itself and the window - 1 before it; 0: all before it
    max_q_len   an upper bound of the rows' new tokens, known on the host
    """
    return extend_attention_naive(
        q, k_cache, v_cache, slot_table, rows, q_starts, kv_lens, scale, window, max_q_len
    )


def extend_attention_naive(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_table: torch.Tensor,
    rows: torch.Tensor,
    q_starts: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    window: int,
    max_q_len: int,
) -> torch.Tensor:
    out = torch.zeros_like(q)
    group = q.shape[1] // k_cache.shape[1]
    starts = q_starts.tolist()
    for i, (row, kv_len) in enumerate(zip(rows.tolist(), kv_lens.tolist(), strict=True)):
        new = slice(starts[i], starts[i + 1])
        q_len = new.stop - new.start
        if q_len == 0 or kv_len == 0:
            continue
        slots = slot_table[row, :kv_len]
        k = k_cache[slots].float().repeat_interleave(group, 1)  # [L, Hq, D]
        v = v_cache[slots].float().repeat_interleave(group, 1)
        query_at = torch.arange(kv_len - q_len, kv_len, device=q.device)[:, None]
        key_at = torch.arange(kv_len, device=q.device)[None, :]
        hidden = key_at > query_at
        if window:
            hidden |= key_at <= query_at - window
        scores = torch.einsum("qhd,lhd->hql", q[new].float(), k) * scale
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[new] = torch.einsum("hql,lhd->qhd", weights, v)
    return out
