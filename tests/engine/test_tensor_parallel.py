"""One rank, two or four: the same tokens, greedy or drawn, of every kind of model."""

from __future__ import annotations

import pytest

from sglang.model_config import ModelConfig
from sglang.quantize import quantize
from sglang.server_args import ServerArgs
from sglang.tokenizer import Tokenizer
from sglang.worker.parallel import TensorParallel
from tests.engine.prompts import PROMPTS
from tests.engine.ranks import outputs_of, outputs_of_ranks
from tests.models import tiny
from tests.reference import demo_model_for_ranks

PROMPT_IDS = [[(7 * i + j * j) % 99 for j in range(5 + 4 * i)] for i in range(12)]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> list[tuple[str, list[list[int]]]]:
    """Models, with two KV heads each but for the last, and prompts."""
    folder = tmp_path_factory.mktemp("models")
    tiny.make("Qwen3").save_pretrained(folder / "qwen3")
    tiny.make("Mistral", sliding_window=12).save_pretrained(folder / "mistral")
    wide = {"hidden_size": 128, "intermediate_size": 256}  # whole groups for each of four ranks
    tiny.make("Qwen2", **wide).save_pretrained(folder / "qwen2")
    quantize("awq", str(folder / "qwen2"), str(folder / "awq"), group_size=32)
    demo_model_for_ranks(folder / "demo")
    args = ServerArgs(device="cpu")
    tokenizer = Tokenizer.load(ModelConfig.load(args), args)
    texts = [tokenizer.encode(text) for text in PROMPTS[10:16]]
    tiny_ones = [(str(folder / name), PROMPT_IDS) for name in ("qwen3", "mistral", "awq")]
    return [*tiny_ones, (str(folder / "demo"), texts)]


@pytest.fixture(scope="module")
def of_one_rank(work) -> list[list[list[int]]]:
    """Of the demo model from its own file, with the heads that it has."""
    paths = [*(path for path, _ in work[:-1]), ""]
    pairs = zip(paths, work, strict=True)
    return [outputs_of(path, prompts, TensorParallel()) for path, (_, prompts) in pairs]


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_say_what_one_says(size, work, of_one_rank):
    for outputs in outputs_of_ranks(size, work):
        for ours, theirs, (path, _) in zip(outputs, of_one_rank, work, strict=True):
            assert ours == theirs, path
