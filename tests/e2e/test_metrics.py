"""/metrics, as Prometheus reads it, and the dashboard that shows it."""

from __future__ import annotations

import json
import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

DASHBOARD = Path(__file__).resolve().parents[2] / "docs" / "grafana.json"


def scrape(server) -> dict[str, float]:
    """Name with the labels other than the model's -> value."""
    values = {}
    for family in text_string_to_metric_families(server.get("/metrics").text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k != "model_name"}
            values[sample.name + (str(labels) if labels else "")] = sample.value
    return values


def test_counters_and_histograms_count_what_was_done(server):
    server.get("/flush_cache")
    before = scrape(server)
    params = {"max_new_tokens": 5, "ignore_eos": True}
    for _ in range(2):
        server.generate(text=["The capital of France is", "Once"], sampling_params=params)
    server.generate(text="Phone: ", sampling_params={"regex": r"\d{3}-\d{7}"})
    after = scrape(server)
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    assert grown["sglang:num_requests_total{'reason': 'length'}"] == 4
    assert grown["sglang:num_requests_total{'reason': 'stop'}"] == 1
    assert grown["sglang:generation_tokens_total"] >= 4 * 5 + 8
    assert grown["sglang:prompt_tokens_total"] > grown["sglang:cached_tokens_total"] >= 4
    for name in ("time_to_first_token", "time_per_output_token", "e2e_request_latency"):
        assert grown[f"sglang:{name}_seconds_count"] == 5, name
        assert grown[f"sglang:{name}_seconds_sum"] > 0
        assert grown[f"sglang:{name}_seconds_bucket" + "{'le': '+Inf'}"] == 5
    assert grown["sglang:inter_token_latency_seconds_count"] >= 4 * 4
    whole = grown["sglang:e2e_request_latency_seconds_sum"]
    assert grown["sglang:time_to_first_token_seconds_sum"] < whole
    assert grown["sglang:inter_token_latency_seconds_sum"] < whole
    assert grown["sglang:grammar_compilation_time_seconds_count"] == 1
    assert grown["sglang:grammar_compilation_time_seconds_sum"] > 0
    assert after["sglang:num_running_reqs"] == after["sglang:num_queue_reqs"] == 0
    assert after["sglang:token_usage"] == 0 and 0 < after["sglang:cache_hit_rate"] < 1
    assert after["process_resident_memory_bytes"] > 1e7


def test_a_client_that_leaves_is_counted_as_an_abort(server):
    before = scrape(server)["sglang:num_aborted_requests_total"]
    body = {"text": "Once", "sampling_params": {"max_new_tokens": 4000, "ignore_eos": True}}
    with server.post("/generate", {**body, "stream": True}, stream=True) as reply:
        next(reply.iter_lines())
    assert server.wait_idle(2.0)
    assert scrape(server)["sglang:num_aborted_requests_total"] == before + 1


def test_probes_are_not_counted(server):
    def counts():
        return {k: v for k, v in scrape(server).items() if "requests_total" in k or "_count" in k}

    before = counts()
    assert server.get("/health_generate").status_code == 200
    assert counts() == before


def test_the_dashboard_shows_metrics_that_there_are(server):
    names = {re.sub(r"\{.*", "", name) for name in scrape(server)}
    dashboard = json.loads(DASHBOARD.read_text("utf-8"))
    shown = re.findall(r"sglang:\w+", json.dumps(dashboard))
    assert len(set(shown)) > 12 and set(shown) <= names
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(places) == len(set(places))
