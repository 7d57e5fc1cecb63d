"""SGLang's native endpoints, and what becomes of requests whose clients leave."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from urllib.parse import urlsplit

import pytest
import requests

from tests.e2e.serving import Server

GREEDY = {"temperature": 0, "max_new_tokens": 12}
LONG = {"temperature": 0, "max_new_tokens": 4000, "ignore_eos": True}


def events(response: requests.Response) -> list[dict]:
    lines = [line[6:] for line in response.iter_lines(decode_unicode=True) if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_a_reply_has_text_ids_and_meta_info(server: Server):
    server.post("/flush_cache", {})
    first = server.generate(text="The capital of France is", sampling_params=GREEDY)
    again = server.generate(text="The capital of France is", sampling_params=GREEDY)
    assert set(first) == {"text", "output_ids", "meta_info"}
    assert first["text"].startswith(" Paris") and first["output_ids"][0] == 7042
    meta = first["meta_info"]
    assert (meta["prompt_tokens"], meta["cached_tokens"]) == (5, 0)
    assert meta["completion_tokens"] == len(first["output_ids"])
    assert again["text"] == first["text"] and again["meta_info"]["cached_tokens"] == 4


def test_finish_reasons_are_sglangs(server: Server):
    def reason(**params):
        reply = server.generate(text="1, 2, 3,", sampling_params={**GREEDY, **params})
        return reply["meta_info"]["finish_reason"]

    assert reason(max_new_tokens=3) == {"type": "length", "length": 3}
    assert reason(stop="5") == {"type": "stop", "matched": "5"}
    assert reason(stop_token_ids=[28]) == {"type": "stop", "matched": 28}
    assert reason(max_new_tokens=0) == {"type": "length", "length": 0}


def test_sglangs_newer_spellings_say_the_same(server: Server):
    params = {"max_new_tokens": 8, "temperature": 1}
    old = server.generate(text="Once", sampling_params={**params, "seed": 7})
    new = {**params, "sampling_seed": 7, "spaces_between_special_tokens": True}
    reply = server.generate(text="Once", sampling_params=new, return_logprob=True)
    assert reply["text"] == old["text"]
    assert reply["meta_info"]["input_token_logprobs"] == []


def test_what_sglangs_frontend_sends_empty_is_no_error(server: Server):
    empty = {"stop_regex": [], "structural_tag": "", "custom_params": None, "stream_interval": None}
    reply = server.generate(text="Once", sampling_params={"max_new_tokens": 2, **empty})
    assert reply["meta_info"]["completion_tokens"] == 2


def test_batches_of_texts_and_ids_answer_in_order(server: Server):
    texts = ["The capital of France is", "1, 2, 3,"]
    single = [server.generate(text=text, sampling_params=GREEDY) for text in texts]
    batch = server.generate(text=texts, sampling_params=[GREEDY, {**GREEDY, "max_new_tokens": 4}])
    assert batch[0]["output_ids"] == single[0]["output_ids"]
    assert batch[1]["output_ids"] == single[1]["output_ids"][:4]
    assert isinstance(server.generate(text=texts[:1], sampling_params=GREEDY), list)
    samples = server.generate(text=texts[0], sampling_params={**GREEDY, "n": 2})
    assert [s["text"] for s in samples] == [single[0]["text"]] * 2


def test_the_prompts_of_a_batch_have_ids_and_logprobs_of_their_own(server: Server):
    batch = {"text": ["One", "Two"], "sampling_params": {"max_new_tokens": 3, "temperature": 0}}
    wants = {"return_logprob": [False, True], "top_logprobs_num": 2, "rid": ["a", "b"]}
    one, two = server.generate(**batch, **wants, logprob_start_len=[-1, 0])
    assert [one["meta_info"]["id"], two["meta_info"]["id"]] == ["a", "b"]
    assert "output_token_logprobs" not in one["meta_info"]
    alone = {"return_logprob": True, "top_logprobs_num": 2, "logprob_start_len": 0}
    single = server.generate(text="Two", sampling_params=batch["sampling_params"], **alone)
    for name in ("input_token_logprobs", "output_token_logprobs"):
        got, expected = two["meta_info"][name], single["meta_info"][name]
        assert [id for _, id, _ in got] == [id for _, id, _ in expected] != []
    assert [len(top) for top in two["meta_info"]["output_top_logprobs"]] == [2, 2, 2]
    replies = server.generate(**batch, rid="c")
    assert [reply["meta_info"]["id"] for reply in replies] == ["c_0", "c_1"]
    for wrong in ({"rid": ["a"]}, {"return_logprob": [True] * 3}, {"top_logprobs_num": [1, 99]}):
        assert server.post("/generate", {**batch, **wrong}).status_code == 400


@pytest.mark.parametrize("rid, reasons", [("x_0", ["abort", "length"]), ("x", ["abort"] * 2)])
def test_one_prompt_of_a_batch_can_be_aborted(server: Server, rid: str, reasons: list[str]):
    params = {"temperature": 0, "ignore_eos": True}
    body = {
        "text": ["Once", "Twice"],
        "sampling_params": [{**params, "max_new_tokens": most} for most in (4000, 100)],
        "rid": "x",
    }
    with ThreadPoolExecutor() as pool:
        reply = pool.submit(server.generate, **body)
        while not server.post("/abort_request", {"rid": rid}).json()["aborted"]:
            time.sleep(0.01)
        ends = [one["meta_info"]["finish_reason"]["type"] for one in reply.result()]
    assert ends == reasons
    assert not server.post("/abort_request", {"rid": rid}).json()["aborted"]
    assert server.wait_idle(2.0)


def test_streamed_replies_hold_all_so_far_and_end_as_the_whole_reply(server: Server):
    body = {"text": "The capital of France is", "sampling_params": GREEDY}
    whole = server.generate(**body)
    parts = events(server.post("/generate", {**body, "stream": True}, stream=True))
    assert len(parts) > 3
    for before, after in pairwise(parts):
        assert after["text"].startswith(before["text"])
        assert after["output_ids"][: len(before["output_ids"])] == before["output_ids"]
        assert before["meta_info"]["finish_reason"] is None
    assert parts[-1]["text"] == whole["text"] and parts[-1]["output_ids"] == whole["output_ids"]
    assert parts[-1]["meta_info"]["finish_reason"] == whole["meta_info"]["finish_reason"]
    body["text"] = [body["text"], "1, 2,"]
    last = {
        part["index"]: part for part in events(server.post("/generate", body | {"stream": True}))
    }
    assert last[0]["text"] == whole["text"]
    assert last[1]["text"] == server.generate(text="1, 2,", sampling_params=GREEDY)["text"]


def test_an_aborted_request_ends_with_what_it_has(server: Server):
    replies = []
    body = {"text": "Once", "sampling_params": LONG, "rid": "to-abort"}
    thread = threading.Thread(target=lambda: replies.append(server.generate(**body)))
    thread.start()
    deadline = time.monotonic() + 10
    while server.stats()["running"] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    refused = server.post("/generate", body)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "rid"
    assert server.post("/flush_cache", {}).status_code == 400, "a request is running"
    assert server.post("/abort_request", {"rid": "to-abort"}).json() == {"aborted": True}
    thread.join(5)
    meta = replies[0]["meta_info"]
    assert meta["finish_reason"]["type"] == "abort" and meta["completion_tokens"] < 4000
    assert server.post("/abort_request", {"rid": "to-abort"}).json() == {"aborted": False}
    assert server.wait_idle(1.0)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"text": ["Once", "Twice"], "sampling_params": LONG}),
        ("/v1/completions", {"prompt": "Once", "max_tokens": 4000, "ignore_eos": True}),
    ],
)
def test_a_client_that_goes_away_frees_its_slots_within_a_second(server, path, body, stream):
    address = urlsplit(server.url)
    content = json.dumps({**body, "stream": stream}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(content)}\r\n\r\n"
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(head.encode() + content)
        if stream:
            connection.recv(100)
        deadline = time.monotonic() + 10
        while server.stats()["running"] == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.stats()["running"] > 0
    assert server.wait_idle(1.0), server.stats()


def test_a_client_that_leaves_the_queue_is_not_run(server: Server):
    """More requests than seats; all their clients leave."""
    address = urlsplit(server.url)
    content = json.dumps({"text": ["x"] * 100, "sampling_params": LONG}).encode()
    head = "POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(content)}\r\n\r\n"
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(head.encode() + content)
        deadline = time.monotonic() + 10
        while server.stats()["queued"] == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.stats()["queued"] > 0
    assert server.wait_idle(5), server.stats()


def test_information_says_what_is_served(server: Server):
    info = server.get("/get_model_info").json()
    assert info["is_generation"] is True and info["context_length"] == 8192
    info = server.get("/get_server_info").json()
    assert info["max_total_num_tokens"] == 32768 and info["stats"]["steps"] > 0
    assert server.get("/health").json() == {"status": "ok"}


def test_flushing_forgets_prefixes(server: Server):
    server.generate(text="a b c d e f g", sampling_params=GREEDY)
    assert server.get("/flush_cache").status_code == 200
    assert server.stats()["cached_tokens"] == 0
    reply = server.generate(text="a b c d e f g", sampling_params=GREEDY)
    assert reply["meta_info"]["cached_tokens"] == 0


def test_a_slow_reader_gets_everything(server: Server):
    body = {"text": "Once", "sampling_params": {**LONG, "max_new_tokens": 100}, "stream": True}
    with server.post("/generate", body, stream=True) as response:
        time.sleep(3)
        parts = events(response)
    assert len(parts[-1]["output_ids"]) == 100
