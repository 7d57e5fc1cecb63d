"""The demo model's greedy tokens, in float32 on the CPU, are those of `transformers`: however the
requests are batched, cached, chunked, evicted and preempted, and whatever is in flight."""

import pytest
import torch

from sglang.sampling_params import SamplingParams
from sglang.server_args import ServerArgs
from sglang.tokenizer import Tokenizer
from tests.engine.inprocess import InProcessEngine
from tests.engine.prompts import PROMPTS
from tests.reference import demo_model_in_transformers

NUM_TOKENS = 48
PARAMS = SamplingParams(max_new_tokens=NUM_TOKENS, temperature=0.0)
DEPTHS = pytest.mark.parametrize("depth", [1, 2])


@pytest.fixture(scope="module")
def engine():
    args = ServerArgs(device="cpu", dtype="float32", max_total_tokens=8192, context_length=2048)
    return InProcessEngine(args)


@pytest.fixture(scope="module")
def prompts(engine):
    tokenizer = Tokenizer.load(engine.config, engine.args)
    return [tokenizer.encode(text) for text in PROMPTS]


@pytest.fixture(scope="module")
def expected(engine, prompts):
    """transformers' own `generate`, in two left-padded batches: of short prompts and of long."""
    model, _ = demo_model_in_transformers()
    eos, pad = set(engine.config.eos_token_ids), 2
    outputs = {}
    for is_long in (False, True):
        some = {i: p for i, p in enumerate(prompts) if (len(p) > 50) == is_long}
        longest = max(map(len, some.values()))
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in some.values()])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in some.values()])
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=NUM_TOKENS, do_sample=False,
                pad_token_id=pad,
            )  # fmt: skip
        outputs |= {i: until(eos, row[longest:].tolist()) for i, row in zip(some, out, strict=True)}
    return [outputs[i] for i in range(len(prompts))]


def until(ends, tokens):
    for i, token in enumerate(tokens):
        if token in ends:
            return tokens[: i + 1]
    return tokens


def half(depth: int) -> slice:
    """The prompts of those tests that take the longest: at each depth every other."""
    return slice(depth - 1, None, 2)


@DEPTHS
def test_one_at_a_time(engine, prompts, expected, depth):
    """Half of the tokens, as a step takes as long for one request as for many."""
    mine, few = half(depth), NUM_TOKENS // 2
    params = SamplingParams(max_new_tokens=few, temperature=0.0)
    outputs = engine.generate(engine.scheduler(), prompts[mine], params, depth, at_once=False)
    assert outputs == [tokens[:few] for tokens in expected[mine]]


@DEPTHS
def test_all_at_once(engine, prompts, expected, depth):
    assert engine.generate(engine.scheduler(), prompts, PARAMS, depth) == expected


@DEPTHS
def test_with_shared_prefixes_and_a_warm_cache(engine, prompts, expected, depth):
    prompts, expected = prompts[half(depth)], expected[half(depth)]
    scheduler = engine.scheduler()
    head = [p[: len(p) // 2] for p in prompts if len(p) > 3]
    engine.generate(scheduler, head, SamplingParams(max_new_tokens=1, temperature=0.0), depth)
    before = scheduler.stats().hit_tokens
    assert engine.generate(scheduler, prompts + prompts, PARAMS, depth) == expected + expected
    assert scheduler.stats().hit_tokens - before > sum(map(len, prompts))


@DEPTHS
def test_in_chunks_of_seven(engine, prompts, expected, depth):
    mine = half(depth)
    scheduler = engine.scheduler(chunk_size=7)
    assert engine.generate(scheduler, prompts[mine], PARAMS, depth) == expected[mine]


@DEPTHS
def test_in_a_pool_so_small_that_requests_are_evicted_and_preempted(
    engine, prompts, expected, depth
):
    mine = half(depth)
    scheduler = engine.scheduler(num_slots=300, chunk_size=64, conservativeness=0.0)
    assert engine.generate(scheduler, prompts[mine], PARAMS, depth) == expected[mine]
    stats = scheduler.stats()
    assert stats.preemptions > 0 and stats.evicted_tokens > 0
    assert stats.used_tokens == 0
