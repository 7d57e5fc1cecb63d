"""One rank, two or four: the same tokens; and a rank that dies or hangs takes all down."""

from __future__ import annotations

import os
import signal
import time

import pytest

import sglang
from tests.models import tiny

LOAD = {"max_total_tokens": 260, "chunked_prefill_size": 16, "schedule_conservativeness": 0.0}
"""So little that prompts come in chunks and requests are preempted."""


def prompts_of(vocabulary: int) -> list[list[int]]:
    return [[(7 * i + j * j) % vocabulary for j in range(5 + 3 * i)] for i in range(12)]


def tokens_of(path: str, tp_size: int, vocabulary: int, **flags) -> list[list[list[int]]]:
    greedy = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
    seeded = [greedy | {"temperature": 1.0, "top_k": 20, "seed": i} for i in range(12)]
    prompts = prompts_of(vocabulary)
    flags = {"device": "cpu", "dtype": "float32", "skip_tokenizer_init": True, **flags}
    flags["check_ranks"] = True
    with sglang.LLM(path, tp_size=tp_size, **flags) as llm:
        replies = [llm.generate(prompts, params, use_tqdm=False) for params in (greedy, seeded)]
        assert llm.stats().preemptions > 0
    return [[reply["output_ids"] for reply in each] for each in replies]


@pytest.mark.parametrize("family", ["Qwen3", "Mistral"])
def test_two_and_four_ranks_give_the_tokens_of_one(family, tmp_path):
    tiny.make(family).save_pretrained(tmp_path)
    expected = tokens_of(str(tmp_path), 1, 99, **LOAD)
    for size in (2, 4):
        assert tokens_of(str(tmp_path), size, 99, **LOAD) == expected


def test_the_demo_model_gives_the_same_tokens_on_three_ranks():
    """It has nine heads: two ranks cannot share them."""
    load = {**LOAD, "context_length": 256}
    assert tokens_of("", 3, 40_000, **load) == tokens_of("", 1, 40_000, **load)


def test_a_number_of_ranks_that_does_not_divide_the_heads_is_refused():
    with pytest.raises(ValueError, match="9"):
        sglang.LLM(device="cpu", tp_size=2)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_ends_the_engine_within_ten_seconds_and_is_named(how, tmp_path):
    tiny.make("Qwen3").save_pretrained(tmp_path)
    llm = sglang.LLM(
        str(tmp_path), tp_size=2, device="cpu", dtype="float32", skip_tokenizer_init=True
    )
    pids = llm.pids()
    llm.generate([[1, 2, 3]], {"max_new_tokens": 4}, use_tqdm=False)
    os.kill(pids["model worker 1"], how)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="model worker 1"):
        while time.monotonic() - start < 10:
            llm.generate([[1, 2, 3]], {"max_new_tokens": 4}, use_tqdm=False)
    llm.shutdown()
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids.values())
