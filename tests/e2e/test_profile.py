"""Profiles: a trace of all processes that shows how steps overlap."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

import sglang
from sglang import spans
from tests.e2e.serving import Server


def spans_of(trace: dict) -> dict[str, list[dict]]:
    """By lane, in order of time: those of Chrome's trace event format that have a duration."""
    names, lanes = {}, {}
    for event in trace["traceEvents"]:
        if event["name"] == "thread_name":
            names[event["pid"], event["tid"]] = event["args"]["name"]
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            assert event["dur"] >= 0 and event["ts"] > 0
            lanes.setdefault(names[event["pid"], event["tid"]], []).append(event)
    return {name: sorted(events, key=lambda e: e["ts"]) for name, events in lanes.items()}


def of(spans: list[dict], what: str) -> dict[int, dict]:
    """By step."""
    return {e["args"]["step"]: e for e in spans if e["name"] == what}


def end(span: dict) -> float:
    return span["ts"] + span["dur"]


def test_a_server_writes_a_trace_with_a_lane_for_each_thread(server: Server, tmp_path):
    assert server.post("/start_profile", {"output_dir": str(tmp_path)}).ok
    assert server.post("/start_profile", {}).status_code == 400, "it is on"
    server.generate(text="Once", sampling_params={"max_new_tokens": 20, "ignore_eos": True})
    trace = server.post("/stop_profile", {}).json()["trace"]
    assert trace.startswith(str(tmp_path))
    with open(trace) as file:
        lanes = spans_of(json.load(file))
    assert set(lanes) >= {"router", "launch"}
    assert {"plan", "send", "take in", "put away", "receive"} <= {
        e["name"] for e in lanes["router"]
    }
    launches = of(lanes["launch"], "launch")
    assert len(launches) >= 20
    for step, launch in launches.items():
        assert end(of(lanes["router"], "plan")[step]) <= launch["ts"]
        assert end(launch) <= of(lanes["router"], "take in")[step]["ts"]
    for before, after in pairwise(lanes["launch"]):
        assert end(before) <= after["ts"] + 1e-3, "a thread does one thing at a time"


def test_what_is_wrong_with_a_profile_is_said(server: Server):
    assert "start one first" in server.post("/stop_profile", {}).json()["error"]["message"]
    for field, value in (("output_dir", "/not/there"), ("num_steps", 5)):
        error = server.post("/start_profile", {field: value}).json()["error"]
        assert error["param"] == field
    assert server.post("/start_profile", {"output_dir": "/proc"}).ok
    reply = server.post("/stop_profile", {})
    assert reply.status_code == 400 and "/proc/nano-sglang" in reply.json()["error"]["message"]


def test_parts_that_are_never_written_are_not_waited_for(tmp_path, monkeypatch):
    """As on a full disk."""
    monkeypatch.setattr(spans, "WRITE_SECONDS", 0.0)
    profile = spans.Profile(str(tmp_path))
    profile.start()
    profile.stop()
    with pytest.raises(OSError, match="have not written their parts"):
        profile.is_written(1)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_step_is_planned_before_the_one_before_it_is_known_if_and_only_if_they_overlap(
    depth: int, tmp_path
):
    params = {"max_new_tokens": 24, "ignore_eos": True, "temperature": 0}
    with sglang.LLM(device="cpu", overlap_depth=depth, max_total_tokens=1024) as llm:
        llm.generate("Once", params, use_tqdm=False)
        llm.start_profile()
        llm.generate(["Once", "Twice"], params, use_tqdm=False)
        with open(llm.stop_profile(str(tmp_path / "trace.json"))) as file:
            lanes = spans_of(json.load(file))
        with pytest.raises(ValueError):
            llm.stop_profile()
    sent, known = of(lanes["router"], "send"), of(lanes["router"], "take in")
    overlapping = [end(sent[n + 1]) <= known[n]["ts"] for n in known if n + 1 in sent]
    assert len(overlapping) >= 20
    assert sum(overlapping) >= len(overlapping) - 4 if depth == 2 else not any(overlapping)
