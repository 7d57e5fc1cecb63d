"""An engine on each attention backend: graphs, overlap, chunks, shared prefixes, a sliding window.

What it says is held against transformers, token by token, after the same beginning: in a 16-bit
type two ways to round may differ on a near tie, and then go on differently.
"""

import importlib.util
import random

import pytest
import torch

from sglang.sampling_params import SamplingParams
from sglang.server_args import ServerArgs
from tests.engine.inprocess import InProcessEngine
from tests.models import tiny

GPU = torch.cuda.is_available()
HAS_FLASHINFER = GPU and importlib.util.find_spec("flashinfer") is not None
BACKENDS = [
    "torch_native",
    pytest.param("triton", marks=pytest.mark.skipif(not GPU, reason="needs a GPU")),
    pytest.param(
        "flashinfer",
        marks=pytest.mark.skipif(not HAS_FLASHINFER, reason="needs a GPU and flashinfer-python"),
    ),
]


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_are_those_that_transformers_finds_likeliest(backend, window, tmp_path):
    theirs = tiny.make("Mistral", head_dim=64, sliding_window=window, initializer_range=0.1)
    theirs.save_pretrained(tmp_path)
    on_cpu = backend == "torch_native"
    engine = InProcessEngine(
        ServerArgs(
            model_path=str(tmp_path),
            device="cpu" if on_cpu else "cuda",
            dtype="float32" if on_cpu else "bfloat16",
            attention_backend=backend,
            max_total_tokens=1024,
            max_running_requests=8,
            chunked_prefill_size=64,
        )
    )
    rng = random.Random(0)
    shared = [rng.randrange(99) for _ in range(40)]
    prompts = [
        shared[: rng.choice([0, 40])] + [rng.randrange(99) for _ in range(rng.randint(1, 70))]
        for _ in range(12)
    ]
    params = SamplingParams(max_new_tokens=30, temperature=0.0, ignore_eos=True)
    outputs = engine.generate(engine.scheduler(), prompts, params)
    worst = max(below_the_best(theirs, p, o) for p, o in zip(prompts, outputs, strict=True))
    assert worst < (1e-3 if on_cpu else 0.2)


def below_the_best(model, prompt: list[int], output: list[int]) -> float:
    """How far, in nats, the unlikeliest token of the output is below the one likeliest there."""
    assert len(output) == 30
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(output)[:, None])[:, 0]
    return float((logprobs.max(-1).values - chosen).max())
