"""The demo model on a CPU, beside transformers in one run: float32, greedy, the same prompts.

    python benchmarks/cpu.py

Rounds alternate between the engines and the median of each counts, as a shared machine disturbs now
one and now the other. For eight requests transformers has two ways: `generate` for one after the
other, and one `generate` for a batch, which is possible where all eight are there at the start.
The last rows are those of --quantization gguf: weights stay in the 4 bits of the model's file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for tests.reference
CONCURRENT = 8
LONG = 512
"""Tokens of the prompt that only prefills."""


class Ours:
    def __init__(self, flags: list[str]) -> None:
        import sglang
        from sglang.server_args import parse_args

        fixed = ["--device", "cpu", "--skip-tokenizer-init", "--log-level", "warning"]
        args = parse_args([*fixed, *flags])
        self.llm = sglang.LLM(**dataclasses.asdict(args))

    def generate(self, prompts: list[list[int]], length: int) -> list[list[int]]:
        from sglang import SamplingParams

        params = SamplingParams(max_new_tokens=length, temperature=0.0, ignore_eos=True)
        self.llm.flush_cache()
        replies = self.llm.generate(prompts, params, use_tqdm=False)
        return [reply["output_ids"] for reply in replies]


class Theirs:
    def __init__(self) -> None:
        from tests.reference import demo_model_in_transformers

        self.model, _ = demo_model_in_transformers()
        self.model.generation_config.eos_token_id = None  # never stop early

    def batch(self, prompts: list[list[int]], length: int) -> list[list[int]]:
        import torch

        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=length,
                do_sample=False,
                pad_token_id=0,
            )
        return out[:, ids.shape[1] :].tolist()

    def in_turn(self, prompts: list[list[int]], length: int) -> list[list[int]]:
        return [self.batch([prompt], length)[0] for prompt in prompts]


def timed(action: Callable) -> tuple[float, object]:
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


def main() -> None:
    lines = __doc__.splitlines()
    parser = argparse.ArgumentParser(
        description=lines[0],
        epilog="\n".join(lines[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--input-len", type=int, default=128, help="tokens (default: 128)")
    parser.add_argument("--output-len", type=int, default=64, help="tokens (default: 64)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="write the figures here")
    args, flags = parser.parse_known_args()
    n = args.output_len
    rng = random.Random(0)
    many = [rng.choices(range(100, 10000), k=args.input_len) for _ in range(CONCURRENT)]
    long = [rng.choices(range(100, 10000), k=LONG)]
    one = many[:1]

    print(f"{len(os.sched_getaffinity(0))} cores, {args.input_len} tokens in, {n} out")
    startup, exact = timed(lambda: Ours(["--dtype", "float32", *flags]))
    print(f"sglang ready after {startup:.1f} s (model in the cache)", flush=True)
    quick = Ours(["--quantization", "gguf", *flags])
    theirs = Theirs()
    # name -> (what runs it, requests, tokens of each)
    ways: dict[str, tuple[Callable, list[list[int]], int]] = {
        "sglang 1": (exact.generate, one, n),
        "transformers 1": (theirs.batch, one, n),
        "sglang 8": (exact.generate, many, n),
        "transformers 8 in turn": (theirs.in_turn, many, n),
        "transformers 8 as a batch": (theirs.batch, many, n),
        "sglang prefill": (exact.generate, long, 1),
        "transformers prefill": (theirs.batch, long, 1),
        "sglang 4-bit 1": (quick.generate, one, n),
        "sglang 4-bit 8": (quick.generate, many, n),
        "sglang 4-bit prefill": (quick.generate, long, 1),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    outputs: dict[str, object] = {}
    for generate in (exact.generate, quick.generate, theirs.batch):
        generate(one, 4)  # warm-up
    for _ in range(args.rounds):
        for name, (generate, prompts, length) in ways.items():
            if "in turn" in name and outputs.get(name):
                continue  # a long one: once does
            seconds, outputs[name] = timed(lambda g=generate, p=prompts, m=length: g(p, m))
            rate = (LONG if length == 1 else len(prompts) * length) / seconds
            rates[name].append(rate)
            print(f"  {name}: {rate:.1f} tok/s", flush=True)
    exact.llm.shutdown()
    quick.llm.shutdown()

    median = {name: statistics.median(values) for name, values in rates.items()}
    same = outputs["sglang 8"] == outputs["transformers 8 in turn"]
    print(f"\nThe tokens of the float32 rows are {'the same' if same else 'NOT the same'}.\n")
    print("| | transformers, tok/s | sglang, tok/s | ratio |\n|---|---|---|---|")
    for label, peer, name in (
        ("1 request", "transformers 1", "sglang 1"),
        ("8 requests, `generate` in turn", "transformers 8 in turn", "sglang 8"),
        ("8 requests, one batch", "transformers 8 as a batch", "sglang 8"),
        (f"prefill of {LONG} tokens", "transformers prefill", "sglang prefill"),
        ("1 request, 4-bit weights", "transformers 1", "sglang 4-bit 1"),
        ("8 requests, 4-bit weights", "transformers 8 as a batch", "sglang 4-bit 8"),
        (f"prefill of {LONG}, 4-bit weights", "transformers prefill", "sglang 4-bit prefill"),
    ):
        ratio = median[name] / median[peer]
        print(f"| {label} | {median[peer]:.1f} | {median[name]:.1f} | {ratio:.2f}x |")
    if args.json:
        figures = {"startup_s": startup, "same_tokens": same, "tok_s": rates}
        Path(args.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
