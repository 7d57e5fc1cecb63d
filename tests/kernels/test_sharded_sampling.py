"""Sampling from shares of the logits: the tokens of sampling from all of them."""

import random

import pytest
import torch

from sglang.kernels.sampling import sample_naive
from sglang.kernels.sharded_sampling import best_keys_naive, best_keys_triton, tokens_of
from sglang.layers.shard import Shard

from .common import DEVICE, DTYPES, GPU, randn, seeds


@pytest.mark.parametrize("seed", seeds(16, 16))
@pytest.mark.parametrize("run", [best_keys_naive, best_keys_triton])
def test_shares_name_the_token_of_the_whole(run, seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    n, vocab, size = 6, rng.choice([3, 300, 40000 if GPU else 1000]), rng.choice([2, 3, 4])
    logits = randn(n, vocab, dtype=rng.choice([torch.float32, *DTYPES])) * rng.choice([0.1, 3, 10])
    if rng.random() < 0.3:
        logits = logits.round()  # many ties, of which the first counts
    temperature = torch.tensor(rng.choices([0.0, 0.0, 0.5, 2.0], k=n), device=DEVICE)
    draw = (
        temperature,
        torch.randint(0, 2**31, (n,), device=DEVICE).int(),
        torch.randint(0, 10000, (n,), device=DEVICE).int(),
    )
    none = torch.zeros(n, dtype=torch.int32, device=DEVICE)
    all_of_it = torch.ones(n, device=DEVICE)
    expected = sample_naive(logits, draw[0], none, all_of_it, none.float(), *draw[1:])
    before = logits.clone()
    keys = []
    for rank in range(size):
        start, stop = Shard(rank, size).bounds(vocab)
        keys.append(run(logits[:, start:stop], start, *draw))
    tokens = tokens_of(torch.stack(keys).amax(0), vocab)
    assert tokens.dtype == torch.int32
    # On a GPU exp and log are rounded otherwise, and may in rare cases decide.
    assert int((tokens != expected).sum()) <= (1 if GPU else 0)
    assert torch.equal(logits, before)


def test_nan_logits_give_a_token_of_the_vocabulary():
    logits = torch.full((2, 9), float("nan"), device=DEVICE)
    zeros = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    for run in (best_keys_naive, best_keys_triton):
        keys = run(logits, 0, zeros.float(), zeros, zeros)
        assert ((tokens_of(keys, 9) >= 0) & (tokens_of(keys, 9) < 9)).all()
