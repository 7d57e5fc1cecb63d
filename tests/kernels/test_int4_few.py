"""Hopper's product of a few tokens with 4-bit weights against its naive twin."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from sglang.kernels import int4
from sglang.kernels.int4_weight import Int4Weight, dequantize_int4_naive
from tests.kernels.common import assert_close, on_hopper, randn, random_int4

few = int4.few

if few is None:
    pytest.skip("needs Gluon", allow_module_level=True)

both_modes = pytest.mark.parametrize("keeps", [True, False], ids=["inputs kept", "not kept"])


def expected(x: torch.Tensor, w: Int4Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Added up in float32, which cuBLAS does not always do with 16-bit types."""
    out = F.linear(x.float(), dequantize_int4_naive(w, torch.float32))
    return (out if bias is None else out + bias.float()).to(x.dtype)


@on_hopper
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@both_modes
def test_agrees_with_its_twin_and_with_itself(keeps: bool, dtype: torch.dtype) -> None:
    rng = random.Random(keeps)
    torch.manual_seed(0)
    for tokens in range(2, 9):
        # Less than a step for each warp; steps that do not come out even; a group over all inputs.
        k, group = rng.choice([(128, 128), (768, 256), (1408, 128), (4096, 128), (2048, 2048)])
        n = rng.choice([32, 160, 4128, 6144])
        w = random_int4(n, k, group, torch.bfloat16)
        x = randn(tokens, k, dtype=dtype) / k**0.5
        bias = randn(n, dtype=dtype) if tokens % 2 else None
        outs = [few.int4_few_linear(x, w, bias, keeps) for _ in range(3)]
        assert_close(outs[0], expected(x, w, bias))
        assert torch.equal(outs[0], outs[1])
        assert torch.equal(outs[0], outs[2])


@on_hopper
@both_modes
def test_adds_to_what_is_there(keeps: bool) -> None:
    torch.manual_seed(0)
    for tokens, n in ((5, 4096), (8, 160)):
        w = random_int4(n, 1408, 128, torch.bfloat16)
        x = randn(tokens, 1408, dtype=torch.float16) / 1408**0.5
        added = randn(tokens, n, dtype=torch.float16)
        right = added + expected(x, w)
        assert few.int4_few_linear(x, w, None, keeps, added) is added
        assert_close(added, right)


@on_hopper
@both_modes
def test_writes_nothing_but_its_own_rows(keeps: bool) -> None:
    torch.manual_seed(0)
    w = random_int4(160, 512, 128, torch.bfloat16)
    room = torch.full((8, 160), 7.0, dtype=torch.float16, device="cuda")
    few.int4_few_linear(randn(3, 512, dtype=torch.float16), w, None, keeps, room[:3])
    assert (room[3:] == 7).all()


@on_hopper
@pytest.mark.parametrize("gap, first", [(8, 0), (8, 3), (5, 0)])
def test_rows_of_the_input_lie_anywhere(gap: int, first: int) -> None:
    torch.manual_seed(0)
    w = random_int4(256, 512, 128, torch.bfloat16)
    x = randn(7, 512 + gap, dtype=torch.float16)[:, first : first + 512] / 512**0.5
    assert_close(few.int4_few_linear(x, w), expected(x, w))


@on_hopper
def test_captured_calls_one_behind_the_other_wait_for_each_other() -> None:
    """They load their weights before the one before has ended, but not their inputs."""
    torch.manual_seed(0)
    w = [random_int4(1024, 1024, 128, torch.bfloat16) for _ in range(4)]
    x = torch.empty(8, 1024, dtype=torch.bfloat16, device="cuda")

    def chain(product) -> torch.Tensor:
        y = x
        for each in w:
            y = product(y, each) / 16
        return y

    chain(few.int4_few_linear)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(few.int4_few_linear)
    for _ in range(3):
        x.copy_(randn(8, 1024, dtype=torch.bfloat16) / 32)
        graph.replay()
        right = chain(expected).float()
        assert (out.float() - right).norm() < 0.01 * right.norm()


@on_hopper
def test_is_called_for_a_few_tokens_and_for_nothing_that_it_cannot_do(monkeypatch) -> None:
    torch.manual_seed(0)
    calls = []
    kernel = few.int4_few_linear
    monkeypatch.setattr(few, "int4_few_linear", lambda *a, **k: calls.append(1) or kernel(*a, **k))

    def was_called(tokens: int, n: int, k: int, group: int = 128) -> bool:
        calls.clear()
        w = random_int4(n, k, group, torch.bfloat16)
        x = randn(tokens, k, dtype=torch.float16) / k**0.5
        assert_close(int4.int4_linear(x, w), expected(x, w))
        return len(calls) > 0

    assert was_called(2, 12288, 4096)
    assert was_called(8, 4096, 11008)
    assert not was_called(1, 4096, 4096)
    assert not was_called(9, 4096, 4096)
    assert not was_called(8, 5120, 13824)
    assert not was_called(8, 4096 + 8, 4096)
    assert not was_called(8, 4096, 4096, 64)
    assert not was_called(8, 4096, 4096 + 64, 64)
