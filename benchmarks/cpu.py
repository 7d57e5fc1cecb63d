"""The demo model on a CPU, beside transformers and llama.cpp in one run: greedy, the same prompts.
llama.cpp, where its Python package is installed (pip install llama-cpp-python).

    python benchmarks/cpu.py

Rounds alternate between the engines and the median of each counts, as a shared machine disturbs now
one and now the other. Of decoding, the time that the same prompts take with one token of output is
subtracted. For eight requests transformers has two ways: `generate` for one after the
other, and one `generate` for a batch, which is possible where all eight are there at the start.
"As stored" is how the demo model is served: its weights stay in the file's 4 and 8 bits, as they do
in llama.cpp. "float32": dequantized, as in transformers.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
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


class LlamaCpp:
    """One request after the other, on all cores."""

    def __init__(self) -> None:
        from llama_cpp import Llama

        from sglang import demo_model

        cores = len(os.sched_getaffinity(0))
        self._llama = Llama(
            str(demo_model.fetch()),
            n_ctx=2048,
            n_threads=cores,
            n_threads_batch=cores,
            verbose=False,
        )

    def generate(self, prompts: list[list[int]], length: int) -> list[list[int]]:
        outs = []
        for prompt in prompts:
            self._llama.reset()
            tokens = self._llama.generate(prompt, temp=0.0)
            outs.append([token for token, _ in zip(tokens, range(length), strict=False)])
        return outs


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
    startup, quick = timed(lambda: Ours(flags))
    print(f"sglang ready after {startup:.1f} s (model in the cache)", flush=True)
    exact = Ours(["--dtype", "float32", *flags])
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
        "sglang as stored 1": (quick.generate, one, n),
        "sglang as stored 8": (quick.generate, many, n),
        "sglang as stored prefill": (quick.generate, long, 1),
    }
    if importlib.util.find_spec("llama_cpp"):
        llama = LlamaCpp()
        ways |= {
            "llama.cpp 1": (llama.generate, one, n),
            "llama.cpp 8": (llama.generate, many, n),
            "llama.cpp prefill": (llama.generate, long, 1),
        }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    outputs: dict[str, object] = {}
    for generate in (exact.generate, quick.generate, theirs.batch):
        generate(one, 4)  # warm-up
    for _ in range(args.rounds):
        for name, (generate, prompts, length) in ways.items():
            if "in turn" in name and outputs.get(name):
                continue  # a long one: once does
            first, outputs[name] = timed(lambda g=generate, p=prompts: g(p, 1))
            if length == 1:
                rate = LONG / first
            else:
                whole, outputs[name] = timed(lambda g=generate, p=prompts, m=length: g(p, m + 1))
                rate = len(prompts) * length / (whole - first)
            rates[name].append(rate)
            print(f"  {name}: {rate:.1f} tok/s", flush=True)
    exact.llm.shutdown()
    quick.llm.shutdown()

    median = {name: statistics.median(values) for name, values in rates.items()}
    expected = outputs["transformers 8 in turn"]
    same = expected == outputs["sglang 8"] == outputs["sglang as stored 8"]
    print(f"\nThe tokens of sglang's rows are {'' if same else 'NOT '}those of transformers.\n")
    print("| tok/s | transformers, float32 | sglang, float32 | llama.cpp | sglang, as stored |")
    print("|---|---|---|---|---|")
    for label, theirs_way, llama_way, what in (
        ("1 request", "transformers 1", "llama.cpp 1", "1"),
        (
            "8 requests, transformers and llama.cpp in turn",
            "transformers 8 in turn", "llama.cpp 8", "8",
        ),
        ("8 requests, transformers as a batch", "transformers 8 as a batch", "", "8"),
        (f"prefill of {LONG} tokens", "transformers prefill", "llama.cpp prefill", "prefill"),
    ):  # fmt: skip
        row = (theirs_way, f"sglang {what}", llama_way, f"sglang as stored {what}")
        cells = [f"{median[way]:.1f}" if way in median else "" for way in row]
        print(f"| {label} | {' | '.join(cells)} |")
    if args.json:
        figures = {"startup_s": startup, "same_tokens": same, "tok_s": rates}
        Path(args.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
