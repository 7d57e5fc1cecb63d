"""/openapi.json is complete and true: schemathesis makes up requests from it, right and wrong ones,
and holds every answer against it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from sglang import demo_model
from sglang.server.openai import replies
from tests.e2e.serving import Server

SECONDS = 30
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A tiny model of random weights, with the demo model's tokenizer: answers cost next to
    nothing."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    flags = ["--model-path", str(folder), "--load-format", "dummy", "--dtype", "float32"]
    flags += ["--tokenizer-path", str(demo_model.fetch()), "--served-model-name", "tiny"]
    server = Server(*flags, "--log-level-http", "warning").wait_ready()
    yield server
    server.stop()


def test_no_request_breaks_the_server_or_is_answered_otherwise_than_described(quick, tmp_path):
    """But for requests that the schema allows and this model cannot serve: those are refused."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", quick.url + "/openapi.json"]
    command += ["--phases", "coverage,fuzzing", "--exclude-checks", "positive_data_acceptance"]
    command += ["--max-time", str(SECONDS), "--max-examples", "50", "--seed", "1", "--no-shrink"]
    command += ["--request-timeout", "60", "--continue-on-failure", "--warnings", "off"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert run.returncode == 0, run.stdout[-8000:]
    assert "22 selected / 22 total" in run.stdout, "every endpoint, but /docs and its schema"
    assert "Traceback" not in quick.stderr()
    assert quick.wait_idle(5.0)


def test_every_endpoint_describes_errors_and_streams(quick):
    schema = quick.get("/openapi.json").json()
    assert schema["openapi"].startswith("3.1")
    ids = [o["operationId"] for methods in schema["paths"].values() for o in methods.values()]
    assert len(ids) == len(set(ids))
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            assert operation.get("description") or operation.get("summary")
            for status, response in operation["responses"].items():
                assert status != "422" and response["content"], path
                if status != "200":
                    ref = response["content"]["application/json"]["schema"]["$ref"]
                    assert ref.endswith("/ErrorReply"), (path, status)
    for path in ("/v1/completions", "/v1/chat/completions", "/generate"):
        described = schema["paths"][path]["post"]["responses"]
        assert {"200", "400", "401", "404", "413", "500", "503", "504"} <= set(described)
        event = described["200"]["content"]["text/event-stream"]["schema"]["properties"]
        for said in event["data"]["anyOf"][0]["contentSchema"]["anyOf"]:
            assert said["$ref"].rsplit("/", 1)[1] in schema["components"]["schemas"]


def test_the_described_names_of_the_model_are_those_that_are_taken(quick):
    schema = quick.get("/openapi.json").json()["components"]["schemas"]["CompletionRequest"]
    for name in [*schema["properties"]["model"]["enum"], "another"]:
        body = {"prompt": "a", "max_tokens": 1, "model": name}
        expected = 404 if name == "another" else 200
        assert quick.post("/v1/completions", body).status_code == expected, name
    assert {"tiny", "", None} < set(schema["properties"]["model"]["enum"])


@pytest.mark.parametrize("extra", [{}, {"n": 2, "logprobs": 2, "echo": True}])
def test_events_of_a_completion_are_as_described(quick, extra):
    for event in events(quick, "/v1/completions", {"prompt": "Once", "seed": 1, **extra}):
        replies.CompletionChunk.model_validate(event, strict=True)


@pytest.mark.parametrize("extra", [{}, {"n": 2, "logprobs": True, "top_logprobs": 2}])
def test_events_of_a_chat_are_as_described(quick, extra):
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, **extra}
    for event in events(quick, "/v1/chat/completions", body):
        replies.ChatCompletionChunk.model_validate(event, strict=True)


def test_events_of_generate_are_as_described(quick):
    body = {"text": ["a", "b"], "return_logprob": True, "logprob_start_len": 0}
    body["sampling_params"] = {"max_new_tokens": 4}
    for event in events(quick, "/generate", {**body, "top_logprobs_num": 2}):
        replies.Generated.model_validate(event, strict=True)


def events(server: Server, path: str, body: dict) -> list[dict]:
    body = {**body, "stream": True}
    if path != "/generate":
        body["stream_options"] = {"include_usage": True}
    reply = server.post(path, body)
    assert reply.status_code == 200, reply.text
    *parts, done = [line[6:] for line in reply.text.split("\n\n") if line]
    assert done == "[DONE]" and len(parts) > 1
    return [json.loads(part) for part in parts]
