"""Many more streams than seats, and clients that leave whenever they like."""

from __future__ import annotations

import asyncio
import json
import random
import time
from urllib.parse import urlsplit

import pytest

from tests.e2e.serving import Server
from tests.models.tiny import make
from tests.vocabularies import byte_level

NUM_STREAMS = 500
WORDS = ["The", "quick", "brown", "fox", "你好", "世界", "🤗", "🎉", "naïve", "café", "1234", "  "]
ALONE = 24
"""So many of the answers are compared with what the same prompt gives alone."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Server:
    """A small random model is quick: the processes around it are what is under load."""
    folder = tmp_path_factory.mktemp("model")
    make("Llama", vocab_size=640, max_position_embeddings=512).save_pretrained(folder)
    byte_level().save(str(folder / "tokenizer.json"))
    flags = ("--max-running-requests", "64", "--dtype", "float32", "--max-total-tokens", "8192")
    server = Server("--model-path", str(folder), *flags).wait_ready()
    yield server
    server.stop()


def body(rng: random.Random, number: int) -> dict:
    prompt = " ".join([*rng.choices(WORDS, k=rng.randint(1, 30)), str(number)])
    return {
        "prompt": prompt,
        "max_tokens": rng.choice([1, 8, rng.randint(16, 96)]),
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def stream(url: str, body: dict, leave_after: int | None) -> tuple[str, dict] | None:
    """(the text, the usage) of a stream; None: it was left after so many events, or during the
    first, as clients do when they crash: without a word."""
    host, port = urlsplit(url).hostname, urlsplit(url).port
    reader, writer = await asyncio.open_connection(host, port)
    payload = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload)
    events, text, usage = 0, "", {}
    try:
        if leave_after == 0:
            await asyncio.sleep(0.05)
            return None
        async for line in reader:
            if line.startswith(b"HTTP/1.1 "):
                assert b" 200 " in line, line
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                return text, usage
            events += 1
            if leave_after is not None and events >= leave_after:
                return None
            event = json.loads(line[6:])
            text += "".join(choice["text"] for choice in event["choices"])
            usage = event.get("usage") or usage
        raise AssertionError(f"the stream ended after {events} events")
    finally:
        writer.transport.abort()


async def send_all(url: str, bodies: list[dict], leavers: dict[int, int]) -> list:
    tasks = [stream(url, body, leavers.get(i)) for i, body in enumerate(bodies)]
    return await asyncio.gather(*tasks)


@pytest.mark.alone
def test_500_streams_of_which_a_third_leaves_all_give_back_their_slots_and_the_rest_is_right(tiny):
    rng = random.Random(0)
    bodies = [body(rng, i) for i in range(NUM_STREAMS)]
    leavers = {i: rng.choice([0, 1, rng.randint(2, 20)]) for i in range(0, NUM_STREAMS, 3)}
    start = time.monotonic()
    answers = asyncio.run(send_all(tiny.url, bodies, leavers))
    seconds = time.monotonic() - start
    info = tiny.get("/get_server_info").json()
    assert tiny.wait_idle(1.0), "slots were not given back"
    stats = tiny.stats()
    lag = info["event_loop_lag_ms"]
    tokens = stats["generated_tokens"]
    print(f"{NUM_STREAMS} streams, {tokens} tokens in {seconds:.1f} s, lag in ms: {lag}, {stats}")
    assert lag["p99"] < 100

    stayed = [i for i in range(NUM_STREAMS) if i not in leavers]
    for i in stayed:
        assert answers[i][1]["completion_tokens"] == bodies[i]["max_tokens"]
    for i in rng.sample(stayed, min(ALONE, len(stayed))):
        alone = tiny.post("/v1/completions", {**bodies[i], "stream": False, "stream_options": None})
        assert alone.json()["choices"][0]["text"] == answers[i][0]
    assert tiny.get("/get_server_info").json()["num_requests"] == 0
    assert tiny.post("/flush_cache", {}).status_code == 200
    assert tiny.stats()["cached_tokens"] == 0
