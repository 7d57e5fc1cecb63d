"""Extend attention's kernel for Hopper GPUs against its naive twin, over random mixes of rows."""

import random

import pytest
import torch

from sglang.kernels import extend_attention as dispatch
from sglang.kernels.extend_attention import extend_attention, extend_attention_naive

from .common import DEVICE, assert_close, int32, on_hopper, randn

hopper = dispatch.hopper

pytestmark = on_hopper

KV_HEADS = 2
MAX_ROWS, MAX_LEN = 6, 5001


class Case:
    """Tensors whose shapes stay as they are, as a CUDA graph's do, and lengths that change."""

    def __init__(self, tokens: int, group: int, dim: int, dtype: torch.dtype) -> None:
        heads = (KV_HEADS * group, KV_HEADS, KV_HEADS)
        self.q, self.k, self.v = randn(tokens, sum(heads), dim, dtype=dtype).split(heads, 1)
        slots = MAX_ROWS * MAX_LEN
        self.k_cache, self.v_cache = randn(2, slots, KV_HEADS, dim, dtype=dtype)
        self.table = torch.randperm(slots, device=DEVICE).int().view(MAX_ROWS, MAX_LEN)
        self.rows = torch.randperm(MAX_ROWS, device=DEVICE).int()
        self.starts, self.lens = int32([0] * (MAX_ROWS + 1)), int32([0] * MAX_ROWS)
        self.scale = dim**-0.5

    def set(self, news: list[int], prefixes: list[int | None]) -> None:
        """The new tokens of each row and those before (None: the row is left out). What is left of
        the rows and of the tokens is padding."""
        lens = [0 if old is None else new + old for new, old in zip(news, prefixes, strict=True)]
        news, lens = (x + [0] * (MAX_ROWS - len(x)) for x in (news, lens))
        self.starts.copy_(int32([sum(news[:i]) for i in range(MAX_ROWS + 1)]))
        self.lens.copy_(int32(lens))

    def set_random(self, rng: random.Random) -> None:
        n = rng.randint(1, MAX_ROWS)
        left = len(self.q)
        news, prefixes = [], []
        for _ in range(n):
            new = rng.choice([0, 1, 63, 64, 65, 128, 129, rng.randint(0, 2000)])
            news.append(min(new, left))
            left -= news[-1]
            old = rng.choice([0, 0, 1, 127, 128, 129, 256, rng.randint(0, 3000)])
            prefixes.append(rng.choice([old, old, old, None]))
        self.set(news, prefixes)

    def args(self, max_q_len: int | None = None, window: int = 0) -> tuple:
        return (
            self.q, self.k, self.v, self.k_cache, self.v_cache, self.table, self.rows,
            self.starts, self.lens, self.scale, window, max_q_len or len(self.q),
        )  # fmt: skip

    def blank(self) -> torch.Tensor:
        return torch.full(self.q.shape, 7.0, dtype=self.q.dtype, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("group", "dim"), [(1, 128), (2, 128), (3, 128), (4, 128), (2, 64)])
def test_agrees_with_its_twin_and_with_itself(group: int, dim: int, dtype: torch.dtype) -> None:
    rng = random.Random(group * dim)
    torch.manual_seed(0)
    for tokens in (1, 700, 5000):
        case = Case(tokens, group, dim, dtype)
        for _ in range(6):
            case.set_random(rng)
            outs = [
                hopper.extend_attention_hopper(*case.args(), out=case.blank()) for _ in range(3)
            ]
            assert_close(outs[0], extend_attention_naive(*case.args(), out=case.blank()))
            assert torch.equal(outs[0], outs[1])
            assert torch.equal(outs[0], outs[2])


def test_more_rows_than_a_block_of_them() -> None:
    torch.manual_seed(0)
    case = Case(1500, 2, 128, torch.bfloat16)
    news = [i % 7 for i in range(300)]
    case.rows = int32([i % MAX_ROWS for i in range(300)])
    case.starts = int32([sum(news[:i]) for i in range(301)])
    case.lens = int32([new + i for i, new in enumerate(news)])
    out = hopper.extend_attention_hopper(*case.args(), out=case.blank())
    assert_close(out, extend_attention_naive(*case.args(), out=case.blank()))


def test_a_captured_call_follows_what_changes_on_the_device() -> None:
    rng = random.Random(0)
    torch.manual_seed(0)
    case = Case(3000, 2, 128, torch.bfloat16)
    out = case.blank()
    hopper.extend_attention_hopper(*case.args(), out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            hopper.extend_attention_hopper(*case.args(), out=out)
    for i in range(8):
        if i == 4:
            case.set([], [])
        else:
            case.set_random(rng)
            case.rows.copy_(torch.randperm(MAX_ROWS, device=DEVICE))
        out.fill_(7.0)
        graph.replay()
        graph.replay()
        assert_close(out, extend_attention_naive(*case.args(), out=case.blank()))


def test_is_called_for_much_work_and_for_nothing_that_it_cannot_do(monkeypatch) -> None:
    torch.manual_seed(0)
    calls = []
    kernel = hopper.extend_attention_hopper
    monkeypatch.setattr(
        hopper, "extend_attention_hopper", lambda *a, **k: calls.append(1) or kernel(*a, **k)
    )

    def was_called(case: Case, window: int = 0, max_q_len: int | None = None) -> bool:
        calls.clear()
        out = extend_attention(*case.args(max_q_len, window), out=case.blank())
        assert_close(out, extend_attention_naive(*case.args(window=window), out=case.blank()))
        return len(calls) > 0

    def made(group: int = 6, dim: int = 128, dtype: torch.dtype = torch.float16) -> Case:
        case = Case(4500, group, dim, dtype)
        case.set([1500, 500, 2500], [200, 0, 1000])
        return case

    assert was_called(made())
    assert not was_called(made(), window=700)
    assert not was_called(made(dim=80))
    case = made()
    case.k_cache, case.v_cache = (x.to(torch.float8_e4m3fn) for x in (case.k_cache, case.v_cache))
    assert not was_called(case)
    case = made()
    assert not hopper.usable(case.q.float(), case.k_cache.float(), 0, len(case.q))
    case.set([30, 8, 9], [100, 0, 1000])
    assert not was_called(case, max_q_len=30)
    case = Case(600, 1, 128, torch.float16)  # with 2 heads: too little for every SM
    case.set([600], [1000])
    assert not was_called(case)
