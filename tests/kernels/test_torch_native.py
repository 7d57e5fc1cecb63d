"""The CPU attention backend against the naive kernels."""

import numpy as np
import pytest
import torch

from sglang.attention import create_attention_backend
from sglang.kernels.decode_attention import decode_attention_naive
from sglang.kernels.extend_attention import extend_attention_naive
from sglang.worker.batch import Batch


def make_batch(
    rng: np.random.Generator, decode: list[int], prefill: list[tuple[int, int]]
) -> Batch:
    """decode: lengths of KV; prefill: (new tokens, tokens of KV with them)."""
    q_lens = np.array([1] * len(decode) + [q for q, _ in prefill], dtype=np.int32)
    kv_lens = np.array(decode + [kv for _, kv in prefill], dtype=np.int32)
    n, longest = len(kv_lens), max(kv_lens)
    num_tokens = int(q_lens.sum())
    # Some rows lie in a row in the cache, others are scattered.
    slot_table = rng.permutation(n * longest).astype(np.int32).reshape(n, longest)
    slot_table[::2].sort(axis=1)
    if rng.random() < 0.5:
        slot_table = np.arange(n * longest, dtype=np.int32).reshape(n, longest)
    starts = np.concatenate(([0], np.cumsum(q_lens[len(decode) :])))
    none = torch.zeros(num_tokens, dtype=torch.int32)
    return Batch(
        num_decode=len(decode),
        input_ids=none,
        positions=none,
        slots=none,
        rows=torch.from_numpy(rng.permutation(n).astype(np.int32)),
        kv_lens=torch.from_numpy(kv_lens),
        slot_table=torch.from_numpy(slot_table),
        q_starts=torch.from_numpy(starts.astype(np.int32)),
        max_kv_len=int(longest),
        attention=create_attention_backend("auto", torch.device("cpu")),
        kv_cache=None,  # type: ignore[arg-type]
        q_lens_host=q_lens,
        kv_lens_host=kv_lens,
    )


@pytest.mark.parametrize("seed", range(40))
def test_every_mix_of_rows_agrees_with_the_naive_kernels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    decode = [int(rng.choice([0, 1, 2, 9, 60, 70])) for _ in range(rng.integers(0, 6))]
    prefill = []
    for _ in range(rng.integers(0 if decode else 1, 4)):
        new = int(rng.choice([1, 2, 17, 40]))
        prefill.append((new, new + int(rng.choice([0, 1, 30]))))
    if not prefill and max(decode) == 0:
        prefill = [(3, 3)]
    batch = make_batch(rng, decode, prefill)
    kv_heads, group, dim = int(rng.choice([1, 3])), int(rng.choice([1, 2, 3])), 16
    window = int(rng.choice([0, 1, 8, 33]))
    slots = batch.slot_table.numel()
    k, v = torch.randn(2, slots, kv_heads, dim)
    q = torch.randn(int(batch.q_lens_host.sum()), kv_heads * group, dim)
    scale = dim**-0.5

    batch.attention.begin(batch)
    out = batch.attention.forward(q, k, v, batch, scale, window)

    d = batch.num_decode
    rest = (k, v, batch.slot_table)
    expected = torch.cat(
        (
            decode_attention_naive(q[:d], *rest, batch.rows[:d], batch.kv_lens[:d], scale, window),
            extend_attention_naive(
                q[d:], *rest, batch.rows[d:], batch.q_starts, batch.kv_lens[d:], scale, window, 64
            ),
        )
    )
    torch.testing.assert_close(out, expected.flatten(1), rtol=1e-5, atol=1e-5)
