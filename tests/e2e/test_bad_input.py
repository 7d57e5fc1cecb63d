"""What is wrong with a request is said in OpenAI's shape, naming the field; the server goes on."""

from __future__ import annotations

import time
from typing import Any

import pytest
import requests

from tests.e2e.serving import Server

COMPLETIONS, CHAT, GENERATE = "/v1/completions", "/v1/chat/completions", "/generate"
HI = [{"role": "user", "content": "hi"}]
MANY = 10**9


def c(**fields: Any) -> tuple[str, dict]:
    return COMPLETIONS, {"prompt": "hi", **fields}


def chat(**fields: Any) -> tuple[str, dict]:
    return CHAT, {"messages": HI, **fields}


def g(**params: Any) -> tuple[str, dict]:
    return GENERATE, {"text": "hi", "sampling_params": params}


# (path, body), the field that the error names, a part of its message
TABLE = [
    (c(max_tokens=-1), "max_tokens", "must be >= 0"),
    (c(max_tokens="ten"), "max_tokens", "integer"),
    (c(max_tokens=1.5), "max_tokens", "integer"),
    (c(max_tokens=True), "max_tokens", "integer"),
    (c(max_tokens=MANY), "max_tokens", "8192"),
    (c(max_tokens=10**30), "max_tokens", "8192"),
    (c(temperature=-0.1), "temperature", ">= 0"),
    (c(temperature="hot"), "temperature", "number"),
    (c(temperature=None, top_p=0), "top_p", "(0, 1]"),
    (c(top_p=1.01), "top_p", "(0, 1]"),
    (c(top_k=-2), "top_k", ">= 0"),
    (c(top_k=2**31), "top_k", "32 bits"),
    (c(top_k=2**64), "top_k", "32 bits"),
    (c(min_p=2), "min_p", "[0, 1]"),
    (c(frequency_penalty=3), "frequency_penalty", "[-2, 2]"),
    (c(presence_penalty=-3), "presence_penalty", "[-2, 2]"),
    (c(repetition_penalty=0), "repetition_penalty", "(0, 2]"),
    (c(n=0), "n", "greater than or equal to 1"),
    (c(n=MANY), "n", "128"),
    (c(n="2"), "n", "integer"),
    (c(seed=2**70), "seed", "64-bit"),
    (c(stop=5), "stop", "string"),
    (c(stop=["a", 5]), "stop", "string"),
    (c(stop=["a", ""]), "stop", "empty"),
    (c(stop="\ud800"), "stop", "Unicode"),
    (c(rid="\ud800"), "rid", "Unicode"),
    (c(stop=[str(i) for i in range(17)]), "stop", "16"),
    (c(stop_token_ids=[49152]), "stop_token_ids", "[0, 49152)"),
    (c(stop_token_ids=["a"]), "stop_token_ids", "integer"),
    (c(stop_token_ids=[5] * 257), "stop_token_ids", "256"),
    (c(logit_bias={"x": 1}), "logit_bias", "token ids"),
    (c(logit_bias={"1": 1, "01": 2}), "logit_bias", "token ids"),
    (c(bad_words=["x"]), "bad_words", "not supported"),
    (c(logit_bias={"5": 101}), "logit_bias", "[-100, 100]"),
    (c(logit_bias={"99999": 1}), "logit_bias", "[0, 49152)"),
    (c(logit_bias=[1]), "logit_bias", "dictionary"),
    (c(min_tokens=5, max_tokens=4), "min_tokens", "<= max_tokens (4)"),
    (c(min_tokens=-1), "min_tokens", ">= 0"),
    (c(stream="yes"), "stream", "boolean"),
    (c(stream_options={"include_usage": True}), "stream_options", "stream"),
    (c(stream=True, stream_options={"include_usage": 1}), "stream_options", "boolean"),
    (c(ignore_eos=1), "ignore_eos", "boolean"),
    (c(model=5), "model", "string"),
    (c(logprobs=21), "logprobs", "20"),
    (c(logprobs=True), "logprobs", "integer"),
    (c(suffix="x"), "suffix", "not supported"),
    (c(best_of=1, n=2), "best_of", "at least n"),
    (c(best_of=3, stream=True), "best_of", "streamed"),
    (c(regex="("), "regex", "unclosed"),
    (c(regex="a", ebnf="root ::= x"), "ebnf", "combined"),
    (c(regex="a+", min_tokens=2), "min_tokens", "combined"),
    (c(json_schema="{"), "json_schema", "follow"),
    (c(ebnf="root ::= x"), "ebnf", "not found"),
    ((COMPLETIONS, {}), "prompt", "required"),
    ((COMPLETIONS, {"prompt": None}), "prompt", "must be a string"),
    ((COMPLETIONS, {"prompt": 5}), "prompt", "must be a string"),
    ((COMPLETIONS, {"prompt": ""}), "prompt", "empty"),
    ((COMPLETIONS, {"prompt": []}), "prompt", "empty"),
    ((COMPLETIONS, {"prompt": [[]]}), "prompt", "empty"),
    ((COMPLETIONS, {"prompt": ["a", ""]}), "prompt", "empty"),
    ((COMPLETIONS, {"prompt": ["a", 5]}), "prompt", "must be a string"),
    ((COMPLETIONS, {"prompt": [1.5]}), "prompt", "must be a string"),
    ((COMPLETIONS, {"prompt": [True]}), "prompt", "must be a string"),
    ((COMPLETIONS, {"prompt": [49152]}), "prompt", "[0, 49152), got 49152"),
    ((COMPLETIONS, {"prompt": [-1]}), "prompt", "[0, 49152), got -1"),
    ((COMPLETIONS, {"prompt": [2**80]}), "prompt", "[0, 49152)"),
    ((COMPLETIONS, {"prompt": "\ud800"}), "prompt", "Unicode"),
    ((COMPLETIONS, {"prompt": [5] * 8193}), "prompt", "8192"),
    ((COMPLETIONS, {"prompt": "word " * 9000}), "prompt", "8192"),
    ((COMPLETIONS, {"prompt": [5] * 8190, "max_tokens": 3}), "max_tokens", "8192"),
    ((COMPLETIONS, {"prompt": ["hi"] * 1000, "n": 3}), "n", "2048"),
    ((CHAT, {}), "messages", "required"),
    ((CHAT, {"messages": []}), "messages", "at least 1"),
    ((CHAT, {"messages": "hi"}), "messages", "list"),
    ((CHAT, {"messages": ["hi"]}), "messages", "messages[0]"),
    ((CHAT, {"messages": [{"content": "hi"}]}), "messages", "role"),
    ((CHAT, {"messages": [{"role": "wizard", "content": "hi"}]}), "messages", "'system'"),
    ((CHAT, {"messages": [{"role": "user"}]}), "messages", "null"),
    ((CHAT, {"messages": [{"role": "user", "content": 5}]}), "messages", "string"),
    ((CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}), "messages", "nicode"),
    (
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        "messages",
        "only parts",
    ),
    ((CHAT, {"messages": [{"role": "user", "content": "word " * 9000}]}), "messages", "8192"),
    (
        (CHAT, {"messages": [{"role": "assistant", "content": "x", "tool_calls": 5}]}),
        "messages",
        "list",
    ),
    (chat(chat_template="{{ messages }}"), "chat_template", "not supported"),
    (chat(max_tokens=-5), "max_tokens", ">= 0"),
    (chat(max_completion_tokens=-5), "max_completion_tokens", ">= 0"),
    (chat(max_completion_tokens=MANY), "max_completion_tokens", "8192"),
    (chat(tools=[{"type": "function", "function": {}}]), "tools", "required"),
    (chat(tool_choice="required"), "tool_choice", "no tool"),
    (chat(tool_choice="sometimes"), "tool_choice", "'required'"),
    (chat(response_format={"type": "xml"}), "response_format", "'json_schema'"),
    (chat(response_format={"type": "json_schema"}), "response_format", "needs"),
    (chat(response_format={"type": "json_object"}, regex="a"), "response_format", "combined"),
    (chat(guided_choice=["yes"], regex="a"), "guided_choice", "cannot be combined with regex"),
    (chat(guided_json={}, json_schema="{}"), "guided_json", "combined with json_schema"),
    (chat(logprobs=3), "logprobs", "boolean"),
    (chat(top_logprobs=3), "top_logprobs", "logprobs"),
    (chat(logprobs=True, top_logprobs=21), "top_logprobs", "20"),
    (chat(continue_final_message=True), "continue_final_message", "assistant"),
    (chat(chat_template_kwargs={"messages": []}), "chat_template_kwargs", "must not hold"),
    (chat(modalities=["audio"]), "modalities", "not supported"),
    ((GENERATE, {}), "text", "either text or input_ids"),
    ((GENERATE, {"text": "a", "input_ids": [1]}), "text", "either text or input_ids"),
    ((GENERATE, {"text": [1, 2]}), "text", "strings"),
    ((GENERATE, {"text": 5}), "text", "string"),
    ((GENERATE, {"input_ids": "a"}), "input_ids", "token ids"),
    ((GENERATE, {"input_ids": []}), "input_ids", "empty"),
    ((GENERATE, {"input_ids": [49152]}), "input_ids", "[0, 49152)"),
    ((GENERATE, {"text": "a", "sampling_params": 5}), "sampling_params", "dictionary"),
    ((GENERATE, {"text": "a", "sampling_params": [{}, {}]}), "sampling_params", "1 prompts"),
    ((GENERATE, {"text": "a", "rid": "\ud800"}), "rid", "Unicode"),
    (g(stop="\ud800"), "stop", "Unicode"),
    ((GENERATE, {"text": "a", "return_logprob": 1}), "return_logprob", "boolean"),
    ((GENERATE, {"text": "a", "top_logprobs_num": 2}), "top_logprobs_num", "return_logprob"),
    (g(max_new_tokens=-1), "max_new_tokens", ">= 0"),
    (g(max_new_tokens="x"), "max_new_tokens", "int"),
    (g(temprature=1), "temprature", "not a sampling parameter"),
    (g(stop_regex="a+"), "stop_regex", "not supported"),
    ((GENERATE, {"text": "a", "video_data": "http://x"}), "video_data", "not supported"),
    ((GENERATE, {"text": "a", "return_hidden_states": True}), "return_hidden_states", "supported"),
    (g(stop=[1]), "stop", "str"),
    (g(n=0), "n", "integer"),
    (g(n="2"), "n", "integer"),
    (g(n=[]), "n", "integer"),
    (g(json_schema="[]"), "json_schema", "follow"),
    (g(**{"\ud800": 1}), None, "not a sampling parameter"),
    (("/tokenize", {"text": 5}), "text", "string"),
    (("/detokenize", {"tokens": [-1]}), "tokens", "[0, 49152)"),
    (("/abort_request", {}), "rid", "must be given"),
]


def test_a_conversation_that_is_too_long_is_told_as_clients_expect(server: Server):
    """Some shorten it then."""
    for path, body in (
        (CHAT, {"messages": [{"role": "user", "content": "word " * 9000}]}),
        (COMPLETIONS, {"prompt": "word " * 8000, "max_tokens": 1000}),
    ):
        error = server.post(path, body).json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert "maximum context length is 8192 tokens" in error["message"]


@pytest.mark.parametrize("what", ["messages", "one text", "prompts"])
def test_what_cannot_fit_is_not_tokenized_first(server: Server, what: str):
    """Some megabytes, which would take seconds."""
    if what == "messages":
        path, body = CHAT, {"messages": [{"role": "user", "content": "a"}] * 20_000}
    elif what == "one text":
        path, body = COMPLETIONS, {"prompt": "word " * 2_000_000}
    else:
        path, body = COMPLETIONS, {"prompt": ["word " * 100] * 20_000}
    asked = time.monotonic()
    reply = server.post(path, body)
    assert reply.status_code == 400
    assert time.monotonic() - asked < 2.5
    error = reply.json()["error"]
    if what == "prompts":
        assert error["param"] == "n" and "at most 2048" in error["message"]
    else:
        assert error["code"] == "context_length_exceeded"
        assert "maximum context length is 8192 tokens" in error["message"]


def test_a_grammar_that_is_too_long_is_refused(server: Server):
    body = {"text": "hi", "sampling_params": {"regex": "a" * 200_000}}
    check_error(server.post("/generate", body), 400, "regex", "more than 131072 characters")


def check_error(response: requests.Response, status: int, param: str | None, part: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param, error
    assert part in error["message"], error
    assert "\n" not in error["message"]
    if param:
        assert param in error["message"]


@pytest.mark.parametrize(
    ("request_", "param", "part"),
    TABLE,
    ids=[f"{r[0]}-{p}-{i}" for i, (r, p, _) in enumerate(TABLE)],
)
def test_bad_input_is_refused_with_the_field_and_its_limits(server: Server, request_, param, part):
    path, body = request_
    check_error(server.post(path, body), 400, param, part)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, GENERATE])
@pytest.mark.parametrize(
    ("body", "part"),
    [
        (b"{not json", "not valid JSON"),
        (b"", "JSON"),
        (b"[]", "JSON object"),
        (b'"text"', "JSON object"),
        (b"[" * 100_000, ""),
        (b"\xff\xfe", ""),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(server: Server, path, body, part):
    headers = {"Content-Type": "application/json"}
    response = requests.post(server.url + path, data=body, headers=headers, timeout=10)
    check_error(response, 400, None, part)


def test_a_body_of_another_type_is_refused(server: Server):
    response = requests.post(server.url + COMPLETIONS, data={"prompt": "hi"}, timeout=10)
    check_error(response, 400, None, "application/json")


def test_unknown_routes_methods_and_models_are_errors_of_the_same_shape(server: Server):
    check_error(server.get("/v1/nothing"), 404, None, "/v1/nothing")
    check_error(server.get(COMPLETIONS), 405, None, "GET")
    check_error(server.post(COMPLETIONS, {"prompt": "a", "model": "gpt-9"}), 404, "model", "gpt-9")
    check_error(server.post(CHAT, {"messages": HI, "model": "gpt-9"}), 404, "model", "gpt-9")


def test_numbers_at_the_ends_of_what_is_allowed_are_served(server: Server):
    def text(**params: Any) -> str:
        params = {"max_new_tokens": 6, "temperature": 0, **params}
        return server.generate(text="The capital of France is", sampling_params=params)["text"]

    greedy = text()
    for params in (
        *({"temperature": t} for t in (1e-300, 1e-45, 1e-39, 1e-7)),
        *({"temperature": 1, name: 1e-300} for name in ("top_p",)),
        {"temperature": 1, "min_p": 1},
        {"temperature": 1, "top_k": 1},
        {"temperature": 1e300, "top_k": 1},
        *({"seed": seed} for seed in (-(2**63), 2**63 - 1)),
        {"top_k": 2**31 - 1},
        {"repetition_penalty": 1 + 1e-300},
        {"frequency_penalty": 1e-300},
    ):
        assert text(**params) == greedy, params
    for params in (
        *({"temperature": t} for t in (1e30, 1e39, 1e300)),
        *({"repetition_penalty": r} for r in (1e-300, 1e-45, 1e-39, 2)),
        {"frequency_penalty": -2, "presence_penalty": 2},
        {"logit_bias": {"5": 100, "6": -100}},
        {"stop_token_ids": [5] * 256},
        {"temperature": 1, "min_p": 1e-300},
    ):
        text(**params)


def test_nan_is_no_number(server: Server):
    headers = {"Content-Type": "application/json"}
    body = b'{"prompt": "a", "temperature": NaN}'
    response = requests.post(server.url + COMPLETIONS, data=body, headers=headers, timeout=10)
    check_error(response, 400, "temperature", "finite")


def test_unknown_fields_are_ignored_as_openai_clients_expect(server: Server):
    body = {"prompt": "a", "max_tokens": 1, "user": "me", "metadata": {}, "shiny_new": [1]}
    assert server.post(COMPLETIONS, body).status_code == 200


@pytest.mark.parametrize(
    "path, body",
    [
        c(max_tokens=1, suffix="", rid=None, response_format=None),
        ("/v1/embeddings", {"input": "a", "encoding_format": None, "pooling": None}),
        ("/tokenize", {"text": "a", "add_special_tokens": None}),
        ("/detokenize", {"tokens": [5], "skip_special_tokens": None}),
        ("/abort_request", {"rid": "nobody's", "abort_all": None}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_null_is_as_good_as_left_out(server: Server, path, body):
    assert server.post(path, body).status_code == 200


@pytest.mark.parametrize("path, body", [c(), chat()])
def test_any_text_is_an_id(server: Server, path, body):
    """This one is what the streams' writers look for in their own events."""
    body = {**body, "rid": "\0", "stream": True, "max_tokens": 2}
    for _ in range(2):
        reply = server.post(path, body)
        assert reply.status_code == 200 and reply.text.endswith("data: [DONE]\n\n"), reply.text


def test_arguments_that_are_nested_beyond_reason_are_left_as_text(server: Server):
    call = {"type": "function", "function": {"name": "f", "arguments": "[" * 2000}}
    messages = [*HI, {"role": "assistant", "content": None, "tool_calls": [call]}, *HI]
    assert server.post(CHAT, {"messages": messages, "max_tokens": 1}).status_code == 200


def test_after_all_that_the_server_goes_on(server: Server):
    assert server.get("/health").status_code == 200
    assert server.get("/health_generate").status_code == 200
    assert server.wait_idle(1.0)
    assert server.get("/get_server_info").json()["num_requests"] == 0
