"""What Prometheus reads at /metrics, under SGLang's names."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)

from sglang.messages import Stats

disable_created_metrics()

_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
    120.0, 300.0,
)  # fmt: skip
_LABEL = "model_name"


class TokenIntervals:
    """The times between tokens. At tens of thousands a second a histogram's own `observe` would be
    felt: they are collected, and counted many at once."""

    def __init__(self) -> None:
        self._new: list[float] = []
        self._counts = np.zeros(len(_SECONDS) + 1, dtype=np.int64)
        self._sum = 0.0

    def add(self, seconds: list[float]) -> None:
        self._new += seconds
        if len(self._new) >= 4096:
            self._count()

    def _count(self) -> None:
        at = np.searchsorted(_SECONDS, self._new)
        self._counts += np.bincount(at, minlength=len(self._counts))
        self._sum += sum(self._new)
        self._new = []

    def metric(self, model: str) -> Metric:
        self._count()
        family = HistogramMetricFamily(
            "sglang:inter_token_latency_seconds", "Between a sequence's tokens.", labels=[_LABEL]
        )
        bounds = [str(bound) for bound in (*_SECONDS, "+Inf")]
        counts = self._counts.cumsum().tolist()
        family.add_metric([model], list(zip(bounds, counts, strict=True)), self._sum)
        return family


class Metrics:
    """Of the sequences that have ended, and of tokens; the rest comes from the router's Stats."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._stats: Stats | None = None
        self._registry = CollectorRegistry()
        self.token_intervals = TokenIntervals()

        def histogram(name: str, help: str) -> Histogram:
            new = Histogram(
                f"sglang:{name}", help, [_LABEL], buckets=_SECONDS, registry=self._registry
            )
            return new.labels(model)

        self._ttft = histogram("time_to_first_token_seconds", "Arrival to first token.")
        self._tpot = histogram(
            "time_per_output_token_seconds", "A sequence's mean time for a token after the first."
        )
        self._e2e = histogram("e2e_request_latency_seconds", "Arrival to last token.")
        ended = Counter(
            "sglang:num_requests",
            "Sequences that have ended.",
            [_LABEL, "reason"],
            registry=self._registry,
        )
        self._ended = {why: ended.labels(model, why) for why in ("stop", "length", "abort")}
        self._aborted = Counter(
            "sglang:num_aborted_requests",
            "Sequences that were aborted.",
            [_LABEL],
            registry=self._registry,
        ).labels(model)
        self._registry.register(self)  # type: ignore[arg-type]
        ProcessCollector(registry=self._registry)

    def observe(self, reason: str, start: float, first: float, last: float, tokens: int) -> None:
        """A sequence has ended. Times in seconds of one clock; `first` is 0 where there was no
        token."""
        self._ended[reason].inc()
        if reason == "abort":
            self._aborted.inc()
        self._e2e.observe(last - start)
        if first:
            self._ttft.observe(first - start)
            if tokens > 1:
                self._tpot.observe((last - first) / (tokens - 1))

    def forgotten(self, count: int) -> None:
        """So many sequences lost their reader before they ended."""
        self._ended["abort"].inc(count)
        self._aborted.inc(count)

    def render(self, stats: Stats) -> bytes:
        self._stats = stats
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """As `prometheus_client` asks its collectors."""
        stats = self._stats
        if stats is None:  # asked for names, at registration
            return
        for name, value, help in _gauges(stats):
            gauge = GaugeMetricFamily(f"sglang:{name}", help, labels=[_LABEL])
            gauge.add_metric([self._model], value)
            yield gauge
        for name, value, help in _counters(stats):
            counter = CounterMetricFamily(f"sglang:{name}", help, labels=[_LABEL])
            counter.add_metric([self._model], value)
            yield counter
        compiling = SummaryMetricFamily(
            "sglang:grammar_compilation_time_seconds", "Compiling grammars.", labels=[_LABEL]
        )
        compiling.add_metric([self._model], stats.grammars, stats.grammar_seconds)
        yield compiling
        yield self.token_intervals.metric(self._model)


def _gauges(stats: Stats) -> list[tuple[str, float, str]]:
    hit_rate = stats.hit_tokens / max(stats.prompt_tokens, 1)
    return [
        ("num_running_reqs", stats.running, "Requests in the batch."),
        ("num_queue_reqs", stats.queued, "Requests that wait for a seat."),
        ("num_used_tokens", stats.used_tokens, "KV slots that cannot be evicted now."),
        ("max_total_num_tokens", stats.max_total_tokens, "KV slots."),
        ("token_usage", stats.used_tokens / stats.max_total_tokens, "Used part of the KV slots."),
        ("cache_hit_rate", hit_rate, "Part of all prompt tokens that the radix cache had."),
    ]


def _counters(stats: Stats) -> list[tuple[str, float, str]]:
    """Their names end in _total."""
    return [
        ("prompt_tokens", stats.prompt_tokens, "Prompt tokens."),
        ("cached_tokens", stats.hit_tokens, "Prompt tokens that the radix cache had."),
        ("generation_tokens", stats.generated_tokens, "Generated tokens."),
        ("num_retracted_requests", stats.preemptions, "Requests that lost their seat: preempted."),
        ("evicted_tokens", stats.evicted_tokens, "Tokens evicted from the radix cache."),
        ("forced_tokens", stats.forced_tokens, "Generated tokens that a grammar forced."),
        ("forward_steps", stats.steps, "Steps of the model."),
    ]
