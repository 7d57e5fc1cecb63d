"""What the order of the queue is worth: hit rate and time for each --schedule-policy.

    python benchmarks/policies.py --plot policies.png

Requests that share a few prefixes arrive all at once, in random order, and the KV pool holds only
some of the prefixes. In that order every prefix is evicted before its next request comes; `lpm` and
`weight` find the requests whose prefix is still there. The demo model on the CPU, if nothing else
is said; flags of the server may follow.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import time
from pathlib import Path

POLICIES = ("lpm", "weight", "random", "fcfs")


@dataclasses.dataclass
class Workload:
    prefixes: int
    requests_per_prefix: int
    prefix_len: int
    own_len: int
    output_len: int

    def prompts(self, seed: int = 0) -> list[list[int]]:
        """Token ids, shuffled."""
        rng = random.Random(seed)

        def tokens(n: int) -> list[int]:
            return rng.choices(range(100, 10000), k=n)

        prefixes = [tokens(self.prefix_len) for _ in range(self.prefixes)]
        prompts = [p + tokens(self.own_len) for p in prefixes * self.requests_per_prefix]
        rng.shuffle(prompts)
        return prompts

    def best_hit_rate(self) -> float:
        """Of all prompt tokens, those that need not be computed if no prefix is ever evicted."""
        hits = self.prefixes * (self.requests_per_prefix - 1) * self.prefix_len
        count = self.prefixes * self.requests_per_prefix
        return hits / (count * (self.prefix_len + self.own_len))

    def pool(self, fraction: float, running: int) -> int:
        """KV slots for that part of the prefixes, beside what running requests need."""
        own = running * (self.own_len + self.output_len)
        return int(fraction * self.prefixes * self.prefix_len) + own


@dataclasses.dataclass
class Result:
    policy: str
    hit_rate: float
    seconds: float
    evicted_tokens: int


def measure(policy: str, load: Workload, flags: list[str]) -> Result:
    import sglang
    from sglang import SamplingParams
    from sglang.server_args import parse_args

    args = parse_args([*flags, "--schedule-policy", policy])
    prompts = load.prompts()
    params = SamplingParams(max_new_tokens=load.output_len, temperature=0.0, ignore_eos=True)
    with sglang.LLM(**dataclasses.asdict(args)) as llm:
        llm.generate([prompts[0]], params, use_tqdm=False)  # warm-up
        llm.flush_cache()
        before = llm.stats()
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        after = llm.stats()
    hits = after.hit_tokens - before.hit_tokens
    hit_rate = hits / (after.prompt_tokens - before.prompt_tokens)
    return Result(policy, hit_rate, seconds, after.evicted_tokens - before.evicted_tokens)


def plot(results: list[Result], best: float, title: str, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6))
    names = [r.policy for r in results]
    left.bar(names, [100 * r.hit_rate for r in results], color="tab:blue")
    left.axhline(100 * best, color="gray", linestyle="--", label="no eviction")
    left.set(ylabel="prompt tokens from the cache, %", ylim=(0, 100))
    left.legend()
    right.bar(names, [r.seconds for r in results], color="tab:orange")
    right.set(ylabel="seconds for all requests")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    lines = __doc__.splitlines()
    parser = argparse.ArgumentParser(
        description=lines[0],
        epilog="\n".join(lines[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--only", default=",".join(POLICIES), help="policies, comma-separated")
    parser.add_argument("--prefixes", type=int, default=20)
    parser.add_argument("--requests-per-prefix", type=int, default=30)
    parser.add_argument("--prefix-len", type=int, default=128, help="tokens (default: 128)")
    parser.add_argument("--own-len", type=int, default=8, help="tokens of each request's own")
    parser.add_argument("--output-len", type=int, default=2, help="tokens (default: 2)")
    parser.add_argument("--pool", type=float, default=0.3, help="part of the prefixes that fit")
    parser.add_argument("--running", type=int, default=8, help="requests at a time (default: 8)")
    parser.add_argument("--json", help="write the results here")
    parser.add_argument("--plot", help="draw them into this PNG")
    args, flags = parser.parse_known_args()
    load = Workload(
        args.prefixes, args.requests_per_prefix, args.prefix_len, args.own_len, args.output_len
    )
    fixed = ["--skip-tokenizer-init", "--log-level", "warning", "--random-seed", "0"]
    fixed += ["--max-running-requests", str(args.running)]
    fixed += ["--max-total-tokens", str(load.pool(args.pool, args.running))]
    flags = [*fixed, *(flag for flag in flags if flag != "--")]
    title = (
        f"{args.prefixes} prefixes of {args.prefix_len} tokens x {args.requests_per_prefix} "
        f"requests, {args.pool:.0%} of them fit"
    )
    print(f"{title}\n\n| policy | hit rate | seconds | evicted tokens |\n|---|---|---|---|")
    results = []
    for policy in args.only.split(","):
        result = measure(policy, load, flags)
        results.append(result)
        hit_rate, evicted = f"{result.hit_rate:.1%}", result.evicted_tokens
        print(f"| {policy} | {hit_rate} | {result.seconds:.1f} | {evicted} |", flush=True)
    print(f"\nWithout any eviction the hit rate would be {load.best_hit_rate():.1%}.")
    if args.json:
        Path(args.json).write_text(json.dumps([dataclasses.asdict(r) for r in results], indent=1))
    if args.plot:
        plot(results, load.best_hit_rate(), title, args.plot)


if __name__ == "__main__":
    main()
