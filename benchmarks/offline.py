"""Seven workloads, offline, on one engine:

    python benchmarks/offline.py --model qwen3-0.6b --compare h200
    python benchmarks/offline.py --model demo --scale 0.05 --only bs1,offline256
    python benchmarks/offline.py --model llama2-7b --attention-backend triton     (a server's flag)

    startup          construct the engine              what a user waits for
    bs1              128 in, 257 out, one request      latency of a token: kernels and CPU overhead
    ttft             N in, 1 out, one request          latency of a prefill
    offline256       256 requests, 100-1024 in and     throughput
                     out, temperature 0.6
    prefix256        256 requests sharing 2048 tokens, the radix cache, from cold
                     64 of their own, 32 out
    prefill256x1024  256 requests of 1024 in, 1 out    throughput of prefill
    short1024        1024 requests, 16 in, 16 out      scheduling

Prompts are token ids from a fixed seed: every engine and every run does the same work. Greedy but
for offline256 (whose protocol is nano-vllm's), and no output ends early.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for tests.reference
from engines import ENGINES, Engine, make_engine
from models import CONFIGS, DEMO
from peers import UNITS, references, times_the_best

WORKLOADS = ("bs1", "ttft", "offline256", "prefix256", "prefill256x1024", "short1024")
ENOUGH_SECONDS = 25.0
"""A first run that took longer than this is not repeated."""


class Bench:
    """Runs workloads in a fixed order. One that is left out still draws its prompts, so that those
    of the others stay the same."""

    def __init__(self, engine: Engine, only: set[str], scale: float, show: Callable) -> None:
        self._engine = engine
        self._only = only
        self._scale = scale
        self._show = show
        self._random = random.Random(0)

    def _n(self, count: int) -> int:
        """A number of requests or tokens, scaled."""
        return max(round(count * self._scale), 1)

    def _tokens(self, n: int) -> list[int]:
        return [self._random.randint(0, 10000) for _ in range(self._n(n))]

    def _time(
        self, prompts: list[list[int]], lengths: list[int], temperature: float = 0.0
    ) -> float:
        """Seconds."""
        start = time.perf_counter()
        outputs = self._engine.generate(prompts, lengths, temperature)
        took = time.perf_counter() - start
        assert [len(ids) for ids in outputs] == lengths, "an output has the wrong length"
        return took

    def run(self) -> None:
        self._time([self._tokens(100)], [16])  # warm-up
        self._bs1()
        self._ttft()
        self._offline256()
        self._prefix256()
        self._prefill256x1024()
        self._short1024()

    def _bs1(self) -> None:
        pairs = [(self._tokens(128), self._tokens(128)) for _ in range(2)]
        if "bs1" not in self._only:
            return
        n = self._n(256)
        for short, long in pairs:  # the first pair warms up
            first = self._time([short], [1])
            whole = self._time([long], [n + 1])
        self._show("bs1", n / (whole - first))

    def _ttft(self) -> None:
        for n in (128, 512, 2048, 3900):
            prompts = [self._tokens(n) for _ in range(5)]
            if "ttft" in self._only:
                median = sorted(self._time([prompt], [1]) for prompt in prompts)[2]
                self._show(f"ttft{n}", 1e3 * median)

    def _offline256(self) -> None:
        for run in (1, 2):
            self._random.seed(0)  # the same lengths in every run
            count = range(self._n(256))
            prompts = [self._tokens(self._random.randint(100, 1024)) for _ in count]
            lengths = [self._n(self._random.randint(100, 1024)) for _ in count]
            self._random.seed(run)  # and other tokens
            prompts = [[self._random.randint(0, 10000) for _ in prompt] for prompt in prompts]
            if "offline256" in self._only:
                took = self._time(prompts, lengths, temperature=0.6)
                self._show("offline256", sum(lengths) / took)
                if took > ENOUGH_SECONDS:
                    break

    def _prefix256(self) -> None:
        for _ in range(2):
            prefix = self._tokens(2048)
            prompts = [prefix + self._tokens(64) for _ in range(self._n(256))]
            if "prefix256" in self._only:
                took = self._time(prompts, [self._n(32)] * len(prompts))
                self._show("prefix256", len(prompts) / took)

    def _prefill256x1024(self) -> None:
        prompts = [self._tokens(1024) for _ in range(self._n(256))]
        if "prefill256x1024" in self._only:
            took = self._time(prompts, [1] * len(prompts))
            self._show("prefill256x1024", sum(map(len, prompts)) / took)

    def _short1024(self) -> None:
        prompts = [self._tokens(16) for _ in range(self._n(1024))]
        if "short1024" in self._only:
            took = self._time(prompts, [self._n(16)] * len(prompts))
            self._show("short1024", len(prompts) / took)


class Figures:
    """Printed as they come; the last one of each name counts."""

    def __init__(self, label: str) -> None:
        self._label = label
        self.runs: dict[str, list[float]] = {}

    def show(self, name: str, value: float) -> None:
        self.runs.setdefault(name, []).append(value)
        print(f"{self._label} {name}: {value:,.4g} {UNITS[name]}", flush=True)

    def last(self) -> dict[str, float]:
        return {name: values[-1] for name, values in self.runs.items()}


def table(ours: str, figures: dict[str, float], others: dict[str, dict[str, float]]) -> str:
    """In Markdown; `others` by engine, with how far ahead of the best of them we are."""
    peers = [values for name, values in others.items() if name != "floor"]
    head = ["workload", ours, *others, *(["ahead of the best"] if peers else [])]
    lines = [head, ["---"] * len(head)]
    for name, value in figures.items():
        unit = UNITS[name]
        cells = [f"{name} {unit}", _number(value)]
        cells += [_number(values.get(name)) for values in others.values()]
        if peers:
            ratio = times_the_best(name, value, peers)
            cells.append("" if ratio is None else f"{ratio:.2f}x")
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    """(ours, the flags of the server)."""
    lines = __doc__.splitlines()
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=lines[0],
        epilog="\n".join(lines[1:]),
        formatter_class=form,
        allow_abbrev=False,
    )
    parser.add_argument("--engine", choices=ENGINES, default="sglang")
    parser.add_argument(
        "--model",
        default=DEMO,
        help=f"{', '.join([DEMO, *CONFIGS])}, or the path of a model (default: {DEMO})",
    )
    parser.add_argument(
        "--load-format",
        choices=("auto", "dummy"),
        help="dummy: random weights, which the configurations that have none get in any case",
    )
    parser.add_argument("--only", default=",".join(WORKLOADS), help="workloads, comma-separated")
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="of the number of requests and of their tokens: 0.1 is a hundredth of the work",
    )
    parser.add_argument("--compare", help="h200 or h100, or one engine there: vllm-h200")
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument(
        "--profile", help="write a trace for https://ui.perfetto.dev here (its last 65,536 spans)"
    )
    args, flags = parser.parse_known_args()
    args.only = set(args.only.split(","))
    if unknown := args.only - set(WORKLOADS):
        parser.error(f"no workload {', '.join(unknown)}; there are: {', '.join(WORKLOADS)}")
    if args.profile and args.engine != "sglang":
        parser.error("--profile is for sglang")
    if args.compare and args.scale != 1.0:
        parser.error("--compare is for the whole work: leave out --scale")
    if args.compare:
        try:
            args.compare = references(args.compare, args.model)
        except ValueError as error:
            parser.error(str(error))
    return args, [flag for flag in flags if flag != "--"]


def describe_machine() -> Iterator[str]:
    import torch

    yield torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    yield f"torch {torch.__version__}"


def main() -> None:
    args, flags = parse_args()
    figures = Figures(f"{args.engine} {args.model}")
    dummy = None if args.load_format is None else args.load_format == "dummy"
    started = time.perf_counter()
    engine = make_engine(args.engine, args.model, dummy, flags)
    figures.show("startup", time.perf_counter() - started)
    try:
        if args.profile:
            engine.llm.start_profile()
        Bench(engine, args.only, args.scale, figures.show).run()
        if args.profile:
            engine.llm.stop_profile(args.profile)
    finally:
        engine.close()
        if args.json:
            record = {
                "engine": args.engine,
                "model": args.model,
                "flags": flags,
                "scale": args.scale,
                "machine": list(describe_machine()),
                "runs": figures.runs,
            }
            Path(args.json).write_text(json.dumps(record, indent=1))
    print("\n" + table(args.engine, figures.last(), args.compare or {}))


if __name__ == "__main__":
    main()
