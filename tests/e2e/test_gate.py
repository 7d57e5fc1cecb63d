"""The API key, CORS, limits of queue, body and time, and what is logged."""

from __future__ import annotations

import json
import re
import signal
import threading
import time

import openai
import pytest
import requests

from tests.e2e.serving import Server

LONG = {"max_new_tokens": 4000, "ignore_eos": True}


@pytest.fixture(scope="module")
def guarded():
    flags = ["--api-key", "s3cret", "--max-queued-requests", "1", "--max-running-requests", "1"]
    flags += ["--max-body-mb", "1", "--allow-origins", "https://a.example"]
    flags += ["--request-timeout", "8", "--log-requests", "--log-requests-level", "2"]
    server = Server(*flags, "--shutdown-timeout", "0.5").wait_ready()
    yield server
    server.stop()


def headers(key: str = "s3cret", **others: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}", **others}


def log_lines(server: Server, id: str, count: int) -> list[str]:
    """The lines that name a request; waits for so many."""
    deadline = time.monotonic() + 5
    while True:
        lines = [line for line in server.stderr().splitlines() if f" {id}]" in line]
        if len(lines) >= count or time.monotonic() > deadline:
            return lines
        time.sleep(0.05)


def test_without_the_key_only_health_answers(guarded):
    assert guarded.get("/health").status_code == 200
    for path in ("/v1/models", "/metrics", "/get_server_info"):
        assert guarded.get(path).status_code == 401
    wrong = openai.OpenAI(base_url=guarded.url + "/v1", api_key="wrong")
    with pytest.raises(openai.AuthenticationError) as error:
        wrong.models.list()
    assert error.value.code == "invalid_api_key"
    right = openai.OpenAI(base_url=guarded.url + "/v1", api_key="s3cret")
    assert right.models.list().data


def test_web_pages_of_allowed_origins_may_call(guarded):
    for origin, allowed in (("https://a.example", True), ("https://b.example", False)):
        asks = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        reply = requests.options(guarded.url + "/v1/completions", headers=asks, timeout=10)
        assert (reply.headers.get("access-control-allow-origin") == origin) == allowed


@pytest.mark.parametrize("in_chunks", [False, True])
def test_a_body_beyond_the_limit_is_refused(guarded, in_chunks):
    body = json.dumps({"text": "x" * (2 << 20)}).encode()
    data = (body[i : i + 65536] for i in range(0, len(body), 65536)) if in_chunks else body
    reply = requests.post(
        guarded.url + "/generate",
        data=data,
        headers=headers(**{"Content-Type": "application/json"}),
        timeout=20,
    )
    assert reply.status_code == 413
    assert "--max-body-mb" in reply.json()["error"]["message"]


def test_a_full_queue_says_when_to_come_again(guarded):
    body = {"text": "Once", "sampling_params": LONG, "stream": True}
    with (
        guarded.post("/generate", body, headers=headers(), stream=True) as running,
        guarded.post("/generate", body, headers=headers(), stream=True) as queued,
    ):
        assert running.status_code == queued.status_code == 200
        refused = guarded.post("/generate", body, headers=headers())
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        healthy = requests.get(guarded.url + "/health_generate", headers=headers(), timeout=30)
        assert healthy.status_code == 200, "it has much to do, and does it"
    time.sleep(0.3)
    few = {**body, "sampling_params": {"max_new_tokens": 1}}
    assert guarded.post("/generate", few, headers=headers()).status_code == 200


def test_a_request_that_takes_too_long_is_ended_whole_and_streamed(guarded):
    client = openai.OpenAI(base_url=guarded.url + "/v1", api_key="s3cret", max_retries=0)
    endless = dict(
        model="", prompt="Once", max_tokens=8000, temperature=0, extra_body={"ignore_eos": True}
    )
    text = ""
    with pytest.raises(openai.APIError, match="--request-timeout"):
        stream = client.completions.create(stream=True, **endless)
        text += next(stream).choices[0].text
        with pytest.raises(openai.APIStatusError) as error:  # it waits for its seat all the time
            client.completions.create(**endless)
        assert error.value.status_code == 504 and error.value.code == "timeout"
        for chunk in stream:
            text += chunk.choices[0].text
    assert len(text) > 10, "what came before the end is told"
    stats = requests.get(guarded.url + "/get_server_info", headers=headers(), timeout=10).json()
    assert stats["stats"]["running"] + stats["stats"]["queued"] <= 1


def test_the_log_names_a_request_by_the_id_that_its_client_gave(guarded):
    body = {"text": "Name a river.", "sampling_params": {"max_new_tokens": 3, "temperature": 0}}
    reply = guarded.post("/generate", body, headers=headers(**{"X-Request-Id": "mine-7"}))
    assert reply.headers["x-request-id"] == "mine-7"
    received, ended, access = log_lines(guarded, "mine-7", 3)
    rid = reply.json()["meta_info"]["id"]
    assert rid in received and "Name a river." in received and "'max_new_tokens': 3" in received
    assert rid in ended and "completion_tokens=[3]" in ended and "finish_reason=" in ended
    assert reply.json()["text"].split()[0] in ended
    assert re.search(r"127\.0\.0\.1:\d+ POST /generate 200 \d+\.\d+ s$", access)
    assert "s3cret" not in guarded.stderr()
    own = guarded.get("/health").headers["x-request-id"]
    assert log_lines(guarded, own, 1)


@pytest.mark.alone
def test_a_server_that_is_to_end_waits_as_long_as_it_was_told(guarded):
    """Last: it ends the server."""
    body = {"text": "Once", "sampling_params": LONG}
    replies = []
    thread = threading.Thread(
        target=lambda: replies.append(guarded.post("/generate", body, headers=headers()).json())
    )
    thread.start()
    time.sleep(0.3)
    asked = time.monotonic()
    assert guarded.stop(signal.SIGTERM) == 0
    assert time.monotonic() - asked < 6, "--shutdown-timeout 0.5, and what ending takes"
    thread.join()
    assert replies[0]["meta_info"]["finish_reason"]["type"] == "abort"
