"""One-shot all-reduce, on Triton's interpreter: real processes over memory that they share."""

import pytest
import torch
import torch.multiprocessing as mp

from sglang.kernels import all_reduce as kernel

SIZES = [(4000, torch.float32), (7, torch.float16), (1, torch.float32), (9001, torch.float16)]
TURNS = len(SIZES) + 2


def shares_of(turn: int, ranks: int) -> list[torch.Tensor]:
    size, dtype = SIZES[turn % len(SIZES)]
    generator = torch.Generator().manual_seed(turn)
    return [torch.randn(size, generator=generator).to(dtype) for _ in range(ranks)]


def keys_of(ranks: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(-(2**62), 2**62, (1500,), generator=generator) for _ in range(ranks)]


def run_rank(rank: int, worlds: list[tuple[list[torch.Tensor], list[torch.Tensor]]]) -> None:
    """In those worlds that have so many ranks."""
    torch.set_num_threads(1)
    for memories, results in worlds:
        if rank < len(memories):
            launch_all(rank, memories, results)


def launch_all(rank: int, memories: list[torch.Tensor], results: list[torch.Tensor]) -> None:
    ranks, results = len(memories), iter(results)
    launches = torch.zeros(kernel.MAX_PROGRAMS, dtype=torch.int32)
    args = (tuple(memory.data_ptr() for memory in memories), launches, rank)
    for turn in range(TURNS):
        next(results)[rank] = kernel.all_reduce_triton(shares_of(turn, ranks)[rank], *args)
    next(results)[rank] = kernel.all_reduce_triton(keys_of(ranks)[rank], *args, largest=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="wants Triton's interpreter")
def test_every_rank_gets_the_same_bits_launch_after_launch():
    """Of two ranks and of three, in the same processes: these take the longest to start."""
    worlds, wanted = [], []
    for ranks in (2, 3):
        memories = [
            torch.zeros(kernel.memory_bytes(ranks), dtype=torch.uint8).share_memory_()
            for _ in range(ranks)
        ]
        turns = [shares_of(turn, ranks) for turn in range(TURNS)]
        expected = [kernel.all_reduce_naive(shares) for shares in turns]
        expected.append(kernel.all_reduce_naive(keys_of(ranks), largest=True))
        results = [torch.stack([torch.zeros_like(e)] * ranks).share_memory_() for e in expected]
        worlds.append((memories, results))
        wanted.append(expected)
    mp.spawn(run_rank, (worlds,), nprocs=3)
    for (memories, results), expected in zip(worlds, wanted, strict=True):
        for each, sum_of_all in zip(results, expected, strict=True):
            for rank in range(len(memories)):
                assert torch.equal(each[rank], sum_of_all), (len(memories), rank)


def test_what_does_not_fit_or_is_not_contiguous_is_not_taken():
    limit = kernel.MAX_PROGRAMS * kernel.CHUNK_BYTES
    assert kernel.takes(torch.empty(limit, dtype=torch.uint8))
    assert not kernel.takes(torch.empty(limit + 1, dtype=torch.uint8))
    assert not kernel.takes(torch.empty(0)) and not kernel.takes(torch.empty(4, 4).t())
