"""What Prometheus reads at /metrics, under SGLang's names."""

from __future__ import annotations

from bisect import bisect_left

from sglang.messages import Stats

_SECONDS = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0
)  # fmt: skip


class Histogram:
    def __init__(self, name: str, help: str) -> None:
        self._name, self._help = name, help
        self._counts = [0] * (len(_SECONDS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(_SECONDS, seconds)] += 1
        self._sum += seconds

    def render(self, label: str) -> list[str]:
        name, total = f"sglang:{self._name}", 0
        lines = [f"# HELP {name} {self._help}", f"# TYPE {name} histogram"]
        for bound, count in zip((*_SECONDS, "+Inf"), self._counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{{label},le="{bound}"}} {total}')
        return [*lines, f"{name}_sum{{{label}}} {self._sum}", f"{name}_count{{{label}}} {total}"]


class Metrics:
    """Of the sequences that have ended; the rest comes from the router's Stats."""

    def __init__(self) -> None:
        self._ttft = Histogram("time_to_first_token_seconds", "Arrival to first token.")
        self._itl = Histogram("inter_token_latency_seconds", "Mean time between tokens.")
        self._e2e = Histogram("e2e_request_latency_seconds", "Arrival to last token.")
        self._ended = {"stop": 0, "length": 0, "abort": 0}

    def observe(self, reason: str, start: float, first: float, end: float, tokens: int) -> None:
        """Times in seconds of one clock; `first` is 0 where there was no token."""
        self._ended[reason] += 1
        self._e2e.observe(end - start)
        if first:
            self._ttft.observe(first - start)
            if tokens > 1:
                self._itl.observe((end - first) / (tokens - 1))

    def render(self, stats: Stats, model: str) -> str:
        escaped = model.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        label = f'model_name="{escaped}"'
        gauges = {
            "num_running_reqs": (stats.running, "Requests in the batch."),
            "num_queue_reqs": (stats.queued, "Requests that wait for a seat."),
            "num_used_tokens": (stats.used_tokens, "KV slots that cannot be evicted now."),
            "token_usage": (stats.used_tokens / stats.max_total_tokens, "The same, as a part."),
            "cache_hit_rate": (
                stats.hit_tokens / max(stats.prompt_tokens, 1),
                "Part of the prompt tokens that came from the radix cache.",
            ),
        }
        counters = {
            "prompt_tokens_total": (stats.prompt_tokens, "Prompt tokens."),
            "cached_tokens_total": (stats.hit_tokens, "Those from the radix cache."),
            "generation_tokens_total": (stats.generated_tokens, "Generated tokens."),
            "num_requests_total": (sum(self._ended.values()), "Sequences that have ended."),
            "num_aborted_requests_total": (self._ended["abort"], "Those that were aborted."),
            "num_preemptions_total": (stats.preemptions, "Requests that lost their seat."),
            "evicted_tokens_total": (stats.evicted_tokens, "Tokens evicted from the cache."),
            "forced_tokens_total": (stats.forced_tokens, "Tokens that a grammar forced."),
            "grammars_total": (stats.grammars, "Grammars compiled."),
            "grammar_compile_seconds_total": (stats.grammar_seconds, "Time that took."),
        }
        lines = []
        for kind, values in (("gauge", gauges), ("counter", counters)):
            for name, (value, help) in values.items():
                lines += [f"# HELP sglang:{name} {help}", f"# TYPE sglang:{name} {kind}"]
                lines.append(f"sglang:{name}{{{label}}} {value}")
        for histogram in (self._ttft, self._itl, self._e2e):
            lines += histogram.render(label)
        return "\n".join(lines) + "\n"
