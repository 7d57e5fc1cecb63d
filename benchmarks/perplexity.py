"""What rounding the weights costs: the demo model's perplexity on a fixed text, by every method.

    python benchmarks/perplexity.py
    python -c "from pydoc_data.topics import topics; print(*topics.values())" > topics.txt
    python benchmarks/perplexity.py --text topics.txt --tokens 13000 --only int8,fp8

Beside it is how far it is from float32's, with the standard error of that, how often the most
likely next token is float32's, and where that is another one, how far float32 had put the new one
below its own, in nats (the median). Ends with an error where a method is further from float32 than
rounding explains. Takes some minutes on two cores.
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
    "gguf": 0.1, "gguf bfloat16": 0.1, "int8 at load": 0.1, "fp8 at load": 0.1,
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


def token_logprobs(given: list[torch.Tensor], texts: list[list[int]]) -> torch.Tensor:
    """Of each token but the first of a window."""
    scored = [
        rows[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        for rows, ids in zip(given, texts, strict=True)
    ]
    return torch.cat(scored)


def perplexity(logprobs: torch.Tensor) -> float:
    return math.exp(-float(logprobs.mean()))


def agreement(given: list[torch.Tensor], exact: list[torch.Tensor]) -> tuple[float, float]:
    """(share of tokens whose likeliest successor is the same, how much less likely the others are
    to the exact model, in nats)."""
    ours, theirs = torch.cat(given), torch.cat(exact).log_softmax(-1)
    chosen = ours.argmax(-1)
    below = theirs.max(-1).values - theirs.gather(1, chosen[:, None])[:, 0]
    others = below[chosen != theirs.argmax(-1)]
    return 1 - len(others) / len(ours), float(others.median()) if len(others) else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, default=TEXT, help="a file that is scored instead")
    parser.add_argument("--tokens", type=int, help="of it, at most")
    parser.add_argument("--only", default=",".join(BOUNDS), help="methods, comma-separated")
    options = parser.parse_args()
    only = set(options.only.split(","))
    if unknown := only - set(BOUNDS):
        parser.error(f"--only: {unknown.pop()} is not one of {', '.join(BOUNDS)}")
    args = ServerArgs(device="cpu")
    tokenizer = Tokenizer.load(ModelConfig.load(args), args)
    texts = windows(tokenizer.encode(options.text.read_text())[: options.tokens])
    prompts = windows([id for prompt in PROMPTS for id in tokenizer.encode(prompt)])
    demo = str(demo_model.fetch())
    exact = logits(demo, texts + prompts, dtype="float32")
    base = token_logprobs(exact[: len(texts)], texts)
    print("| weights | perplexity | more than float32 | same next token | others, nats below |")
    print(f"|---|---|---|---|---|\n| float32 | {perplexity(base):.3f} | | | |", flush=True)
    failed = []

    def show(name: str, path: str, step: int = WINDOW, **flags: str) -> None:
        given = logits(path, texts + prompts, step, **flags)
        scored = token_logprobs(given[: len(texts)], texts)
        more = perplexity(scored) - perplexity(base)
        error = float((scored - base).std()) / len(base) ** 0.5 * perplexity(base)
        same, below = agreement(given, exact)
        cells = f"{perplexity(scored):.3f} | {more:+.3f} ± {error:.3f} | {same:.1%} | {below:.2f}"
        print(f"| {name} | {cells} |", flush=True)
        if not abs(more) <= BOUNDS[name]:
            failed.append(name)

    # A few tokens at a time, which is when the 4-bit products are used.
    for name, dtype in (("gguf", "float32"), ("gguf bfloat16", "bfloat16")):
        if name in only:
            show(name, demo, FEW, dtype=dtype, quantization="gguf")
    for kind in ("int8", "fp8"):
        if (name := f"{kind} at load") in only:
            show(name, demo, dtype="float32", quantization=kind)
    with tempfile.TemporaryDirectory() as folder:
        for method in (method for method in METHODS if method in only):
            path = f"{folder}/{method}"
            quantize(method, "", path, text=calibration.TEXT.read_text())
            show(method, path, dtype="float32")
    if failed:
        print(f"further from float32 than they should be: {', '.join(failed)}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
