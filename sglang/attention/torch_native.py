"""Attention for the CPU, on torch's scaled_dot_product_attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from sglang.attention.base import AttentionBackend
from sglang.kernels import cpu

if TYPE_CHECKING:
    from sglang.worker.batch import Batch


class TorchNativeAttention(AttentionBackend):
    """Reads lengths on the host, so it needs `q_lens_host` and `kv_lens_host`, and `begin`.

    Where there is a kernel of our own for it (kernels/cpu.py), decode rows are its.
    A row whose slots follow one another (a lone request's usually do) is read in place, others are
    gathered. Decode rows of similar lengths are padded and share one call: on two cores that is up
    to four times as quick as a call each. KV heads are never repeated: the query heads that share
    one are either the "queries" of it (decode) or see it through a stride of 0 (prefill).
    """

    def __init__(self) -> None:
        self._windowed: dict[int, list[_Call]] = {}

    def begin(self, batch: Batch) -> None:
        self._windowed = {}

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
        d, has_kernel = batch.num_decode, cpu.takes_heads(q, k_cache)
        if window not in self._windowed:
            self._windowed[window] = _plan(batch, window, q.dtype, not has_kernel)
        calls = self._windowed[window]
        if len(calls) == 1 and calls[0].num_tokens == q.shape[0]:
            return calls[0].run(q, k_cache, v_cache, scale)
        out = q.new_zeros(q.shape[0], q.shape[1] * q.shape[2])
        if d and has_kernel:
            cpu.decode_attention(
                q[:d], k_cache, v_cache, batch.slot_table, batch.rows, batch.kv_lens,
                scale, window, out,
            )  # fmt: skip
        for call in calls:
            tokens = slice(call.first_token, call.first_token + call.num_tokens)
            out[tokens] = call.run(q[tokens], k_cache, v_cache, scale)
        return out


class _Call:
    """One call of SDPA: either n decode rows padded to one length, or one row's prefill."""

    def __init__(
        self, first_token: int, num_tokens: int, slots: torch.Tensor, mask: torch.Tensor | None
    ) -> None:
        """slots int32 [n, L], n = 1 for a prefill; mask float, broadcast to [.., queries, L].

        A prefill without mask has no prefix, and is causal.
        """
        self.first_token = first_token
        self.num_tokens = num_tokens
        self.shape = slots.shape
        self.decodes = num_tokens == slots.shape[0]
        self.mask = mask
        start = int(slots[0, 0])
        consecutive = torch.arange(start, start + slots.numel(), dtype=torch.int32)
        self.slots = slots.flatten()
        self.view = slice(start, start + slots.numel())
        self.in_place = torch.equal(self.slots, consecutive)

    def run(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """q [tokens, Hq, D] -> [tokens, Hq D]."""
        (n, kv_len), (_, kv_heads, dim) = self.shape, k_cache.shape
        if self.in_place:
            k, v = k_cache[self.view], v_cache[self.view]
        else:
            k, v = k_cache.index_select(0, self.slots), v_cache.index_select(0, self.slots)
        k = k.view(n, kv_len, kv_heads, dim).transpose(1, 2)  # [n, Hkv, L, D]
        v = v.view(n, kv_len, kv_heads, dim).transpose(1, 2)
        if self.decodes:
            q = q.reshape(n, kv_heads, -1, dim)  # [n, Hkv, G, D]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, scale=scale)
            return out.reshape(n, -1)
        q = q.view(self.num_tokens, kv_heads, -1, dim).permute(1, 2, 0, 3)  # [Hkv, G, tokens, D]
        k, v = (x.transpose(0, 1).expand(-1, q.shape[1], -1, -1) for x in (k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=self.mask, is_causal=self.mask is None, scale=scale
        )
        return out.permute(2, 0, 1, 3).reshape(self.num_tokens, -1)


def _plan(batch: Batch, window: int, dtype: torch.dtype, decodes: bool) -> list[_Call]:
    """The step's calls, with those of decode rows or without. Rows of padding are in none of
    them."""
    assert batch.q_lens_host is not None and batch.kv_lens_host is not None
    rows = batch.rows.tolist()
    q_lens, kv_lens = batch.q_lens_host.tolist(), batch.kv_lens_host.tolist()
    calls = _plan_decode(batch, rows, kv_lens, window, dtype) if decodes else []
    first_token = batch.num_decode
    for row, q_len, kv_len in zip(
        rows[batch.num_decode :], q_lens[batch.num_decode :], kv_lens[batch.num_decode :],
        strict=True,
    ):  # fmt: skip
        if q_len > 0 and kv_len > 0:
            start = max(kv_len - q_len + 1 - window, 0) if window else 0
            slots = batch.slot_table[row : row + 1, start:kv_len]
            mask = None
            if 1 < q_len < kv_len - start or 0 < window < q_len:
                mask = _causal_mask(q_len, kv_len - start, window, dtype)
            calls.append(_Call(first_token, q_len, slots, mask))
        first_token += q_len
    return calls


def _plan_decode(
    batch: Batch, rows: list[int], kv_lens: list[int], window: int, dtype: torch.dtype
) -> list[_Call]:
    """Neighbours share a call as long as at most half of what it reads is padding."""
    calls = []
    first = 0
    while first < batch.num_decode:
        lens: list[int] = []
        for kv_len in kv_lens[first : batch.num_decode]:
            seen = min(kv_len, window) if window else kv_len
            longest = max(*lens, seen) if lens else seen
            if lens and (seen == 0 or longest * (len(lens) + 1) > 2 * (sum(lens) + seen)):
                break
            lens.append(seen)
            if seen == 0:
                break
        if lens[0] > 0:
            calls.append(_decode_call(batch, rows, kv_lens, first, lens, dtype))
        first += len(lens)
    return calls


def _decode_call(
    batch: Batch,
    rows: list[int],
    kv_lens: list[int],
    first: int,
    lens: list[int],
    dtype: torch.dtype,
) -> _Call:
    longest = max(lens)
    slots = torch.zeros(len(lens), longest, dtype=torch.int32)
    for i, seen in enumerate(lens):
        end = kv_lens[first + i]
        slots[i, :seen] = batch.slot_table[rows[first + i], end - seen : end]
    mask = None
    if min(lens) < longest:
        past_end = torch.arange(longest) >= torch.tensor(lens)[:, None]
        mask = torch.zeros(past_end.shape, dtype=dtype).masked_fill_(past_end, float("-inf"))
        mask = mask[:, None, None]  # [n, 1, 1, L]
    return _Call(first, len(lens), slots, mask)


def _causal_mask(q_len: int, kv_len: int, window: int, dtype: torch.dtype) -> torch.Tensor:
    """[q_len, kv_len]: 0 where query i, at kv_len - q_len + i, sees key j; -inf elsewhere."""
    distance = torch.arange(kv_len - q_len, kv_len)[:, None] - torch.arange(kv_len)
    hidden = distance < 0
    if window:
        hidden |= distance >= window
    return torch.zeros(q_len, kv_len, dtype=dtype).masked_fill_(hidden, float("-inf"))
