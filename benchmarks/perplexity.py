"""What rounding the weights costs: the demo model's perplexity on a fixed text, by every method.

    python benchmarks/perplexity.py

Beside it is how often the most likely next token is float32's, and where that is another one, how
far float32 had put the new one below its own, in nats (the median). Ends with an error where a
method is further from float32 than rounding explains. Takes some minutes on two cores.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the tests' reference
import torch

from sglang import calibration, demo_model
from sglang.model_config import ModelConfig
from sglang.quantize import METHODS, quantize
from sglang.server_args import ServerArgs
from sglang.tokenizer import Tokenizer
from tests.engine.prompts import PROMPTS
from tests.models import tiny

TEXT = Path(__file__).with_name("text.txt")
WINDOW = 250
"""Tokens that are scored together, each after all before it in the window."""
FEW = 4
BOUNDS = {
    "gguf": 0.1, "gguf, bfloat16": 0.1, "int8 at load": 0.1, "fp8 at load": 0.1,
    "awq": 1.5, "gptq": 1.5, "int8": 0.1, "fp8": 0.1,
}  # fmt: skip
"""How much more than float32's the perplexity may be."""


def windows(ids: list[int]) -> list[list[int]]:
    return [ids[i : i + WINDOW] for i in range(0, len(ids) - 1, WINDOW)]


def logits(path: str, texts: list[list[int]], step: int = WINDOW, **flags: str):
    """Of each text [tokens, V], `step` tokens at a time."""
    model, _ = tiny.load(path, **flags)
    out = []
    for ids in texts:
        session = tiny.Session(model)
        out.append(
            torch.cat([session.step({0: ids[i : i + step]})[0] for i in range(0, len(ids), step)])
        )
    return out


def score(given: list[torch.Tensor], texts: list[list[int]]) -> float:
    """Perplexity."""
    total, count = 0.0, 0
    for rows, ids in zip(given, texts, strict=True):
        logprobs = rows[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])
        total, count = total - float(logprobs.sum()), count + len(logprobs)
    return math.exp(total / count)


def agreement(given: list[torch.Tensor], exact: list[torch.Tensor]) -> tuple[float, float]:
    """(share of tokens whose likeliest successor is the same, how much less likely the others are
    to the exact model, in nats)."""
    ours, theirs = torch.cat(given), torch.cat(exact).log_softmax(-1)
    chosen = ours.argmax(-1)
    below = theirs.max(-1).values - theirs.gather(1, chosen[:, None])[:, 0]
    others = below[chosen != theirs.argmax(-1)]
    return 1 - len(others) / len(ours), float(others.median()) if len(others) else 0.0


def main() -> int:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    args = ServerArgs(device="cpu")
    tokenizer = Tokenizer.load(ModelConfig.load(args), args)
    texts = windows(tokenizer.encode(TEXT.read_text()))
    prompts = windows([id for prompt in PROMPTS for id in tokenizer.encode(prompt)])
    demo = str(demo_model.fetch())
    exact = logits(demo, texts + prompts, dtype="float32")
    base = score(exact[: len(texts)], texts)
    print("| weights | perplexity | more than float32 | same next token | others, nats below |")
    print(f"|---|---|---|---|---|\n| float32 | {base:.3f} | | | |", flush=True)
    failed = []

    def show(name: str, path: str, step: int = WINDOW, **flags: str) -> None:
        given = logits(path, texts + prompts, step, **flags)
        more = score(given[: len(texts)], texts) - base
        same, below = agreement(given, exact)
        print(
            f"| {name} | {base + more:.3f} | {more:+.3f} | {same:.1%} | {below:.2f} |", flush=True
        )
        if not abs(more) <= BOUNDS[name]:
            failed.append(name)

    # A few tokens at a time, which is when the 4-bit products are used.
    show("gguf", demo, FEW, dtype="float32", quantization="gguf")
    show("gguf, bfloat16", demo, FEW, dtype="bfloat16", quantization="gguf")
    for kind in ("int8", "fp8"):
        show(f"{kind} at load", demo, dtype="float32", quantization=kind)
    with tempfile.TemporaryDirectory() as folder:
        for method in METHODS:
            path = f"{folder}/{method}"
            quantize(method, "", path, text=calibration.TEXT.read_text())
            show(method, path, dtype="float32")
    if failed:
        print(f"further from float32 than they should be: {', '.join(failed)}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
