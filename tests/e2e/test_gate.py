"""The API key, CORS, the queue's limit and the body's."""

from __future__ import annotations

import threading
import time

import openai
import pytest
import requests

from tests.e2e.serving import Server


@pytest.fixture(scope="module")
def guarded():
    flags = ("--api-key", "s3cret", "--max-queued-requests", "1", "--max-running-requests", "1")
    server = Server(*flags, "--max-body-mb", "1", "--allow-origins", "https://a.example")
    yield server.wait_ready()
    server.stop()


def headers(key: str = "s3cret") -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


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


def test_a_body_beyond_the_limit_is_refused(guarded):
    body = {"text": "x" * (2 << 20)}
    assert guarded.post("/generate", body, headers=headers()).status_code == 413


def test_a_full_queue_says_when_to_come_again(guarded):
    body = {"text": "Once", "sampling_params": {"max_new_tokens": 60, "ignore_eos": True}}
    codes = []

    def ask():
        codes.append(guarded.post("/generate", body, headers=headers()).status_code)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    refused = guarded.post("/generate", body, headers=headers())
    assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
    for thread in threads:
        thread.join()
    assert codes == [200, 200]
