"""Steps laid out for CUDA graphs, padding and all, give the tokens of steps that are not.

Without a GPU the captured functions are run instead of replayed: what is put into a graph, and what
comes out of it, is the same.
"""

import itertools
import random

import pytest
import torch

from sglang.attention.triton import TritonAttention
from sglang.messages import GenerateRequest, pack, unpack
from sglang.sampling_params import SamplingParams
from sglang.server_args import ServerArgs
from sglang.worker.graphs import Family, StepGraphs, decode_sizes, prefill_sizes
from tests.engine.inprocess import InProcessEngine
from tests.models import tiny


class Uncaptured:
    """In a CUDA graph's place: runs the function again, into the same outputs. (So the next step
    overwrites them: one step is in flight at most.)"""

    def __init__(self, run, inputs, outputs) -> None:
        self.run, self.inputs, self.outputs = run, inputs, outputs

    @torch.inference_mode()
    def replay(self) -> None:
        new = self.run(self.inputs)
        for name, tensor in vars(self.outputs).items():
            tensor.copy_(getattr(new, name))


class RunGraphs(StepGraphs):
    def _capture(self, run, inputs):
        outputs = run(inputs)
        return Uncaptured(run, inputs, outputs), outputs


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny.make("Qwen3").save_pretrained(path)
    args = ServerArgs(
        model_path=str(path), device="cpu", dtype="float32", max_total_tokens=512,
        max_running_requests=6, chunked_prefill_size=40,
    )  # fmt: skip
    engine = InProcessEngine(args)
    engine.runner.attention = TritonAttention()  # its naive kernels read lengths on the device
    return engine


def workload(seed: int) -> list[GenerateRequest]:
    rng = random.Random(seed)
    shared = [rng.randrange(99) for _ in range(20)]
    requests = []
    for handle in range(14):
        prompt = shared[: rng.choice([0, 10, 20])]
        prompt += [rng.randrange(99) for _ in range(rng.randint(1, 50))]
        params = SamplingParams(
            max_new_tokens=rng.randint(1, 20),
            temperature=rng.choice([0.0, 0.0, 1.0]),
            top_k=rng.choice([-1, 5]),
            frequency_penalty=rng.choice([0.0, 0.0, 1.0]),
            seed=handle,
        )
        requests.append(GenerateRequest(handle, pack(prompt), params))
    return requests


def run(engine: InProcessEngine, requests: list[GenerateRequest]) -> dict[int, list[int]]:
    scheduler, outputs = engine.scheduler(), {request.handle: [] for request in requests}
    waiting, sent = list(requests), []
    while waiting or not scheduler.is_idle():
        for request in waiting[:2]:  # arriving while others decode
            scheduler.add(request)
        del waiting[:2]
        if not sent and (step := scheduler.plan()) is not None:
            sent.append(engine.runner.launch(*step))
        elif sent:
            scheduler.commit(sent.pop(0).wait())
        if (news := scheduler.take_outbox()) is not None:
            for handle, token in zip(unpack(news.handles), unpack(news.tokens), strict=True):
                outputs[int(handle)].append(int(token))
    return outputs


@pytest.mark.parametrize("seed", range(3))
def test_steps_in_graphs_give_the_tokens_of_steps_without(engine, seed, monkeypatch):
    monkeypatch.setattr("sglang.worker.graphs.MANY_TOKENS", 10)
    monkeypatch.setattr("sglang.worker.graphs.SHORT_ROW", 30)
    runner = engine.runner
    expected = run(engine, workload(seed))
    runner.graphs = RunGraphs(
        runner._decode, runner._prefill, runner.attention, runner.rows,
        max_rows=6, max_tokens=46,
    )  # fmt: skip
    runner.graphs.capture(show_progress=False)
    replayed = set()
    at_least = Family.at_least
    monkeypatch.setattr(
        Family, "at_least", lambda family, size: replayed.add(id(family)) or at_least(family, size)
    )
    try:
        assert run(engine, workload(seed)) == expected
    finally:
        runner.graphs = None
    assert len(replayed) == 4, "a family of graphs was never used"


def test_sizes_leave_little_padding_and_end_with_the_largest():
    for largest in (1, 7, 64, 256, 1000):
        sizes = decode_sizes(largest)
        assert sizes == sorted(set(sizes)) and sizes[-1] == largest
        assert all(b <= max(2 * a, 1.34 * a + 8) for a, b in itertools.pairwise(sizes))
    for largest in (10, 16, 100, 2965, 8448):
        for steps in (2, 4):
            sizes = prefill_sizes(largest, steps)
            assert sizes == sorted(set(sizes)) and sizes[-1] == largest
            assert all(b <= 2 * a for a, b in itertools.pairwise(sizes))
            assert all(b <= (1 + 1 / steps) * a for a, b in itertools.pairwise(sizes) if a >= 1024)
    assert prefill_sizes(0, 2) == []
