"""Products of many tokens, with and without SwiGLU: Hopper's kernel against its naive twins, and
who is called."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from sglang.kernels import gated_linear as dispatch
from sglang.kernels.gated_linear import gated_linear, gated_linear_naive
from sglang.kernels.linear import linear

from .common import assert_close, on_hopper, randn

hopper = dispatch.hopper

HALVES = [torch.float16, torch.bfloat16]
Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Kind:
    kernel: str
    dispatch: Product
    naive: Product
    rows: int
    """Of weights, for an output."""
    least_steps: int
    """Of 64 inputs."""

    def of(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return getattr(hopper, self.kernel)(x, w)

    def expected(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """Rounded once, at the end."""
        return self.naive(x.float(), w.float()).to(x.dtype)


PLAIN = Kind("wide_linear_hopper", linear, F.linear, 1, 8)
GATED = Kind("gated_linear_hopper", gated_linear, gated_linear_naive, 2, 4)
kinds = pytest.mark.parametrize("kind", [PLAIN, GATED], ids=["plain", "gated"])


def inputs(tokens: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    return randn(tokens, k, dtype=dtype) / k**0.5


@on_hopper
@kinds
@pytest.mark.parametrize("dtype", HALVES)
def test_agrees_with_its_twin_and_with_itself(dtype: torch.dtype, kind: Kind) -> None:
    rng = random.Random(0)
    torch.manual_seed(0)
    for _ in range(20):
        tokens = rng.choice([1, 63, 65, 127, 128, 129, 2049, rng.randint(1, 5000)])
        outputs = 32 * rng.choice([1, 3, 4, 5, 8, 9, 34, 344, rng.randint(1, 200)])
        least = kind.least_steps
        k = 64 * rng.choice([least, least + 1, 16, 64, rng.randint(least, 100)])
        x, w = inputs(tokens, k, dtype), randn(kind.rows * outputs, k, dtype=dtype)
        outs = [kind.of(x, w) for _ in range(3)]
        assert_close(outs[0], kind.expected(x, w))
        assert torch.equal(outs[0], outs[1])
        assert torch.equal(outs[0], outs[2])


@on_hopper
@kinds
@pytest.mark.parametrize("gap, first", [(8, 0), (8, 3), (5, 0)])
def test_rows_of_the_input_lie_anywhere(gap: int, first: int, kind: Kind) -> None:
    torch.manual_seed(0)
    x = inputs(300, 512 + gap, torch.float16)[:, first : first + 512]
    w = randn(2 * 192, 512, dtype=torch.float16)
    assert_close(kind.of(x, w), kind.expected(x, w))


@on_hopper
@kinds
def test_a_captured_call_can_be_repeated(kind: Kind) -> None:
    torch.manual_seed(0)
    x, w = inputs(2500, 512, torch.bfloat16), randn(2 * 1056, 512, dtype=torch.bfloat16)
    kind.of(x, w)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [kind.of(x, w) for _ in range(3)]
    for _ in range(3):
        x.copy_(inputs(2500, 512, torch.bfloat16))
        graph.replay()
        for out in outs:
            assert_close(out, kind.expected(x, w))


def was_called(kind: Kind, x: torch.Tensor, w: torch.Tensor, monkeypatch) -> bool:
    calls = []
    kernel = getattr(hopper, kind.kernel)
    monkeypatch.setattr(hopper, kind.kernel, lambda *a: calls.append(1) or kernel(*a))
    assert_close(kind.dispatch(x, w), kind.expected(x, w))
    monkeypatch.setattr(hopper, kind.kernel, kernel)
    return len(calls) > 0


@on_hopper
def test_is_called_for_many_tokens_and_for_nothing_that_it_cannot_do(monkeypatch) -> None:
    torch.manual_seed(0)
    for kind, tokens, outputs, k, expected in (
        (GATED, 2048, 3072, 1024, True),
        (GATED, 2047, 3072, 1024, False),  # few
        (GATED, 2048, 3080, 1024, False),
        (GATED, 2048, 3072, 1000, False),
        (GATED, 2048, 3072, 192, False),
        (PLAIN, 2048, 4096, 1024, True),
        (PLAIN, 1024, 12288, 512, True),
        (PLAIN, 1023, 12288, 512, False),  # few
        (PLAIN, 2048, 4112, 512, False),
        (PLAIN, 2048, 4096, 448, False),
        (PLAIN, 1024, 4096, 1024, False),  # half of the programs would have no tile
        (PLAIN, 2200, 4096, 1024, False),  # a last round of few
    ):
        x = inputs(tokens, k, torch.float16)
        w = randn(kind.rows * outputs, k, dtype=torch.float16)
        assert was_called(kind, x, w, monkeypatch) == expected, (tokens, outputs, k)
    for kind, usable in ((PLAIN, hopper.usable), (GATED, hopper.usable_gated)):
        k = 64 * kind.least_steps
        x, w = inputs(2048, k, torch.float32), randn(4096, k, dtype=torch.float32)
        assert not usable(x, w)
        assert not usable(x.half(), w.bfloat16())
        assert not usable(x.half(), w.half().t().contiguous().t())
        assert usable(x.half(), w.half())


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("tokens", [0, 1, 7, 2100])
def test_other_products_are_the_twins(tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = inputs(tokens, 256, dtype).cpu()
    w = randn(2 * 32, 256, dtype=dtype).cpu()
    assert hopper is None or not (hopper.usable(x, w) or hopper.usable_gated(x, w))
    assert_close(gated_linear(x, w), gated_linear_naive(x, w))
    assert_close(linear(x, w), F.linear(x, w))
