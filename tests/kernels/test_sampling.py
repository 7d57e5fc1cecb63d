"""Sampling: the Triton kernel against its twin, and the properties that both must have.

Properties are checked through the public functions: on a GPU they test the kernel, else the twin.
"""

import math
import random

import pytest
import torch

from sglang.kernels.sampling import (
    _launch,
    greedy,
    greedy_naive,
    greedy_triton,
    sample,
    sample_naive,
    sample_triton,
)

from .common import DEVICE, DTYPES, GPU, int32, randn, seeds


def knobs(rows: int, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=None, positions=None):
    """sample's arguments after the logits; by default every row has its own seed."""

    def full(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((rows,), value, dtype=dtype, device=DEVICE)

    return (
        full(temperature, torch.float32),
        full(top_k, torch.int32),
        full(top_p, torch.float32),
        full(min_p, torch.float32),
        torch.arange(rows, device=DEVICE) if seed is None else full(seed, torch.int64),
        full(7, torch.int32) if positions is None else int32(positions),
    )


def draw(logits: list[float], rows: int, **kwargs: object) -> list[int]:
    """rows draws from one distribution."""
    table = torch.tensor(logits, device=DEVICE).expand(rows, -1)
    return sample(table, *knobs(rows, **kwargs)).tolist()


def chi_square(tokens: list[int], probabilities: list[float]) -> float:
    expected = torch.tensor(probabilities, dtype=torch.float64) * len(tokens)
    observed = torch.bincount(torch.tensor(tokens), minlength=len(probabilities))
    return float(((observed - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("seed", seeds(24, 40))
def test_the_kernel_draws_the_tokens_that_its_twin_draws(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    n, vocab = 6, rng.choice([7, 300, 40000 if GPU else 1000])
    logits = randn(n, vocab, dtype=rng.choice([torch.float32, *DTYPES])) * rng.choice([0.1, 3, 10])
    if rng.random() < 0.3:
        logits = logits.round()  # many ties
    if rng.random() < 0.3:
        logits[:, 5:] = -float("inf")  # as a grammar's mask does
    choices = (
        torch.tensor(rng.choices([0.0, 0.5, 1.0, 2.0], k=n), device=DEVICE),
        int32(rng.choices([0, 1, 5, 50, 2000], k=n)),
        torch.tensor(rng.choices([0.0, 0.3, 0.9, 1.0, 0.9999], k=n), device=DEVICE),
        torch.tensor(rng.choices([0.0, 0.1, 1e-6, 1.0], k=n), device=DEVICE),
        torch.randint(-(2**63), 2**63 - 1, (n,), device=DEVICE),
        torch.randint(0, 10000, (n,), device=DEVICE).int(),
    )
    expected = sample_naive(logits, *choices)
    # Short lists of likely tokens, so that falling back to the whole vocabulary is tested too.
    tokens = _launch(logits, choices, chunk=256, list_size=rng.choice([4, 64, 2048]), block=128)
    # On a GPU exp and log are rounded otherwise, and may in rare cases decide.
    assert int((tokens != expected).sum()) <= (1 if GPU else 0)
    if GPU:
        assert int((sample_triton(logits, *choices) != expected).sum()) <= 1
    assert torch.equal(greedy_triton(logits), greedy_naive(logits))


def test_draws_follow_the_softmax() -> None:
    logits = [0.0, 1.0, -1.0, 2.0, 0.5, -2.0, 1.5, -0.5]
    probabilities = (torch.tensor(logits) / 0.7).softmax(-1).tolist()
    by_seed = draw(logits, 8000, temperature=0.7)
    by_position = draw(logits, 8000, temperature=0.7, seed=5, positions=range(8000))
    # 7 degrees of freedom: 29.9 is passed by chance once in 10,000 times, and seeds are fixed.
    assert chi_square(by_seed, probabilities) < 29.9
    assert chi_square(by_position, probabilities) < 29.9


def test_draws_under_a_filter_follow_the_renormalised_softmax() -> None:
    logits = [0.0, 1.0, 2.0, 3.0, 2.5]
    kept = torch.tensor([1.0, 2.0, 3.0, 2.5]).softmax(-1).tolist()
    tokens = draw(logits, 4000, top_k=4)
    assert chi_square([token - 1 for token in tokens], kept) < 21.1  # 3 degrees of freedom


def test_consecutive_draws_of_one_seed_are_independent() -> None:
    tokens = draw([0.0, 0.0, 0.0], 9000, seed=3, positions=range(9000))
    pairs = [3 * a + b for a, b in zip(tokens[::2], tokens[1::2], strict=True)]
    assert chi_square(pairs, [1 / 9] * 9) < 31.8  # 8 degrees of freedom


@pytest.mark.parametrize(
    ("options", "support"),
    [
        # Probabilities 0.4, 0.3, 0.1, 0.1, 0.06, 0.04
        ({"top_k": 1}, {0}),
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 3}, {0, 1, 2, 3}),  # the third and the fourth are as likely
        ({"top_k": 6}, {0, 1, 2, 3, 4, 5}),
        ({"top_k": 99}, {0, 1, 2, 3, 4, 5}),
        ({"top_p": 0.0}, {0}),
        ({"top_p": 0.39}, {0}),
        ({"top_p": 0.41}, {0, 1}),
        ({"top_p": 0.75}, {0, 1, 2, 3}),
        ({"top_p": 0.95}, {0, 1, 2, 3, 4}),
        ({"top_k": 2, "top_p": 0.6}, {0, 1}),  # top_p is of what top_k leaves: 4/7 < 0.6
        ({"top_k": 2, "top_p": 0.56}, {0}),
        ({"min_p": 0.24}, {0, 1, 2, 3}),
        ({"min_p": 0.26}, {0, 1}),
        ({"min_p": 1.0}, {0}),
        ({"top_k": 4, "min_p": 0.5}, {0, 1}),
    ],
)
def test_filters_leave_exactly_their_support(options: dict[str, float], support: set[int]) -> None:
    # A temperature divides the logits before the filters see them.
    logits = [2 * math.log(p) for p in (0.4, 0.3, 0.1, 0.1, 0.06, 0.04)]
    assert set(draw(logits, 600, temperature=2.0, **options)) == support


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.zeros(3, 9000, device=DEVICE)
    logits[0, [17, 4, 8999]] = 1.0
    logits[1, [8999, 5000]] = 2.0
    assert greedy(logits).tolist() == [4, 5000, 0]
    assert sample(logits, *knobs(3, temperature=0.0)).tolist() == [4, 5000, 0]
    assert greedy_triton(logits).tolist() == [4, 5000, 0]


def test_a_draw_depends_on_seed_and_position_and_not_on_the_batch() -> None:
    logits = randn(1, 500, dtype=torch.float32)
    alone = sample(logits, *knobs(1, seed=11)).item()
    crowd = torch.cat((randn(3, 500, dtype=torch.float32), logits))
    among = sample(crowd, *knobs(4, seed=11))
    assert among[3].item() == alone
    others = sample(logits.expand(50, -1), *knobs(50))
    assert len(set(others.tolist())) > 10


def test_seeds_of_64_bits_differ_in_every_half() -> None:
    flat = [0.0] * 5000
    tokens = {draw(flat, 1, seed=seed)[0] for seed in (1, 1 + 2**32, -(2**63) + 1, 2**62 + 1)}
    assert len(tokens) == 4


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = [-float("inf"), 0.0, -float("inf"), -30.0]
    assert set(draw(logits, 300)) == {1}
    assert set(draw(logits, 300, top_p=0.999999)) == {1}
    assert set(draw(logits, 300, temperature=1e9, top_k=3)) <= {1, 3}
