"""Load over HTTP on a server that runs: POST /v1/completions, streamed.

    python benchmarks/serving.py --rate 1 2 4 8 --plot load.png     open loop, requests per second
    python benchmarks/serving.py --concurrency 1 8 64 256           closed loop, streams

Works with any server that speaks OpenAI's API. TTFT is the time to the first text, counted from
when the request was due; TPOT the mean time a token after it; ITL the time between two chunks of
text, as a reader sees them. Goodput counts the requests that met both --slo-ttft and --slo-tpot.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import random
import sys
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from load import Outcome, plan_requests, run_load

PERCENTILES = (50, 90, 99)


@dataclass
class Level:
    """One load, and what became of it."""

    name: str
    outcomes: list[Outcome]

    def __post_init__(self) -> None:
        self.done = [o for o in self.outcomes if not o.error]
        self.failed = [o for o in self.outcomes if o.error]

    @property
    def seconds(self) -> float:
        """From the first request sent to the last token."""
        return max(o.times[-1] for o in self.done) - min(o.sent for o in self.done)

    def milliseconds(self) -> dict[str, list[float]]:
        values = {
            "ttft": [o.ttft for o in self.done],
            "tpot": [o.tpot for o in self.done if o.tpot is not None],
            "itl": [gap for o in self.done for gap in o.gaps],
            "latency": [o.latency for o in self.done],
        }
        return {name: sorted(1e3 * v for v in times) for name, times in values.items()}

    def summary(self, slo_ttft: float, slo_tpot: float) -> dict:
        """Rates are per second, times in milliseconds."""
        if not self.done:
            return {"level": self.name, "completed": 0, "failed": len(self.failed)}
        seconds = self.seconds
        good = sum(
            1e3 * o.ttft <= slo_ttft and 1e3 * (o.tpot or 0.0) <= slo_tpot for o in self.done
        )
        return {
            "level": self.name,
            "completed": len(self.done),
            "failed": len(self.failed),
            "seconds": seconds,
            "requests_per_s": len(self.done) / seconds,
            "goodput_per_s": good / seconds,
            "input_tokens_per_s": sum(o.prompt_tokens for o in self.done) / seconds,
            "output_tokens_per_s": sum(o.completion_tokens for o in self.done) / seconds,
            "cached_tokens": sum(o.cached_tokens for o in self.done),
            "client_lag_ms": 1e3 * max(o.sent - o.scheduled for o in self.done),
            **{
                name: {f"p{p}": percentile(times, p) for p in PERCENTILES}
                | {"mean": sum(times) / len(times) if times else math.nan}
                for name, times in self.milliseconds().items()
            },
        }


def percentile(ordered: list[float], p: float) -> float:
    """Nearest rank."""
    if not ordered:
        return math.nan
    return ordered[min(len(ordered) - 1, math.ceil(len(ordered) * p / 100) - 1)]


HEADER = (
    f"{'load':>10} {'req/s':>7} {'good':>7} {'out tok/s':>10} "
    f"{'TTFT p50/90/99 ms':>22} {'TPOT p50/99 ms':>16} {'ITL p50/90/99 ms':>21}  failed"
)


def line(s: dict) -> str:
    if not s["completed"]:
        return f"{s['level']:>10} every request failed"

    def times(name: str, *ps: int) -> str:
        return " / ".join(f"{s[name][f'p{p}']:.4g}" for p in ps)

    return (
        f"{s['level']:>10} {s['requests_per_s']:7.2f} {s['goodput_per_s']:7.2f} "
        f"{s['output_tokens_per_s']:10,.0f} {times('ttft', 50, 90, 99):>22} "
        f"{times('tpot', 50, 99):>16} {times('itl', 50, 90, 99):>21}  {s['failed']}"
    )


def plot(levels: list[Level], summaries: list[dict], title: str, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.5))
    for axes, name, label in (
        (left, "ttft", "time to first token, ms"),
        (middle, "itl", "time between chunks, ms"),
    ):
        for level in levels:
            times = level.milliseconds()[name]
            part = [(i + 1) / len(times) for i in range(len(times))]
            axes.plot(times, part, label=level.name)
        axes.set(xlabel=label, ylabel="part of them below", xscale="log", ylim=(0, 1))
        axes.grid(alpha=0.3)
        axes.legend()
    at = range(len(summaries))
    right.bar(at, [s["output_tokens_per_s"] for s in summaries], color="tab:blue", alpha=0.6)
    right.set(ylabel="output tokens/s (bars)", xlabel="load")
    right.set_xticks(at, [s["level"] for s in summaries])
    rates = right.twinx()
    rates.plot(at, [s["requests_per_s"] for s in summaries], "ko-", label="requests/s")
    rates.plot(at, [s["goodput_per_s"] for s in summaries], "g^--", label="of them in time")
    rates.set(ylabel="requests/s (lines)")
    rates.set_ylim(bottom=0)
    rates.legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def positive(kind: type) -> Callable[[str], float]:
    def number(text: str) -> float:
        if not 0 < kind(text) < math.inf:
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return kind(text)

    number.__name__ = kind.__name__  # argparse names it where the text is no number
    return number


def parse_args() -> argparse.Namespace:
    lines = __doc__.splitlines()
    parser = argparse.ArgumentParser(
        description=lines[0],
        epilog="\n".join(lines[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--model", help="its served name (default: the first in /v1/models)")
    load = parser.add_mutually_exclusive_group()
    load.add_argument(
        "--rate", type=positive(float), nargs="+", help="requests per second, Poisson arrivals"
    )
    load.add_argument(
        "--concurrency", type=positive(int), nargs="+", help="requests under way at a time"
    )
    parser.add_argument(
        "--requests",
        type=positive(int),
        help="a load (default: 4 a stream; with --rate, a minute's)",
    )
    parser.add_argument(
        "--input-len", type=positive(int), default=512, help="tokens (default: 512)"
    )
    parser.add_argument(
        "--output-len", type=positive(int), default=128, help="tokens (default: 128)"
    )
    parser.add_argument("--vary", type=float, default=0.0, help="lengths are 1 +- this times those")
    parser.add_argument("--shared-prefix", type=int, default=0, help="tokens that prompts share")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--clients", type=positive(int), default=4, help="processes (default: 4)")
    parser.add_argument("--slo-ttft", type=float, default=1000.0, help="ms (default: 1000)")
    parser.add_argument("--slo-tpot", type=float, default=50.0, help="ms (default: 50)")
    parser.add_argument(
        "--seed", type=int, help="of prompts and arrivals (default: a new one: nothing is cached)"
    )
    parser.add_argument("--warmup", type=int, default=8, help="requests before (default: 8)")
    parser.add_argument("--json", help="write all percentiles here")
    parser.add_argument("--plot", help="draw them into this PNG")
    args = parser.parse_args()
    if not 0 <= args.shared_prefix < args.input_len:
        parser.error("--shared-prefix must be less than --input-len")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib")
    if not args.rate and not args.concurrency:
        args.concurrency = [1, 8, 64, 256]
    if args.seed is None:
        args.seed = random.randrange(2**31)
    return args


def main() -> int:
    args = parse_args()
    url = args.url.rstrip("/")
    if args.model is None:
        try:
            with urllib.request.urlopen(url + "/v1/models", timeout=30) as reply:
                args.model = json.load(reply)["data"][0]["id"]
        except (OSError, ValueError) as error:
            print(f"error: {url}/v1/models: {error}", file=sys.stderr)
            return 1
    lengths = (args.input_len, args.output_len, args.vary, args.shared_prefix)

    def run(name: str, count: int, rate: float | None, streams: int, seed: int) -> Level:
        requests = plan_requests(count, *lengths, rate, args.seed + seed)
        outcomes = run_load(url, args.model, requests, streams, args.clients, args.temperature)
        return Level(name, outcomes)

    if args.warmup:
        run("warm-up", args.warmup, None, 4, seed=-1)
    todo = [(f"{r:g} req/s", args.requests or max(round(60 * r), 8), r, 0) for r in args.rate or ()]
    todo += [
        (f"{n} stream{'s' * (n > 1)}", args.requests or max(4 * n, 8), None, n)
        for n in args.concurrency or ()
    ]
    levels, summaries = [], []
    print(f"{args.model}: {args.input_len} tokens in, {args.output_len} out\n{HEADER}")
    for seed, (name, count, rate, streams) in enumerate(todo):
        level = run(name, count, rate, streams, seed)
        levels.append(level)
        summaries.append(level.summary(args.slo_ttft, args.slo_tpot))
        print(line(summaries[-1]), flush=True)
        if level.failed:
            print(f"{'':>10} first failure: {level.failed[0].error}")
    if args.json:
        record = {"model": args.model, "url": url, "arguments": vars(args), "levels": summaries}
        Path(args.json).write_text(json.dumps(record, indent=1))
    if args.plot and all(level.done for level in levels):
        title = f"{args.model}, {args.input_len} tokens in, {args.output_len} out"
        plot(levels, summaries, title, args.plot)
    return 1 if any(level.failed for level in levels) else 0


if __name__ == "__main__":
    sys.exit(main())
