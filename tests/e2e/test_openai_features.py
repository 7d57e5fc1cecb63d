"""Every feature of the OpenAI endpoints by OpenAI's own client, in each of its four ways: sync and
async, whole and streamed. What comes back is the same."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from tests.e2e.serving import Server

CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
PARIS = "The capital of France is Paris."
TEXT = "The capital of France is"
GREEDY = {"temperature": 0, "max_tokens": 8}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
CALL = r'\{"name": "get_weather", "arguments": \{"city": "[A-Z][a-z]{2,9}"\}\}'
ASKED = [{"role": "user", "content": "How is the weather in Paris?"}]
AFTER_A_CALL = [
    *ASKED,
    {
        "role": "assistant",
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "18 degrees and sunny"},
]
PARTS = [
    {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
    {"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]},
]


class Reply:
    """What a client has got, whichever way."""

    def __init__(self) -> None:
        self.choices: dict[int, dict[str, Any]] = {}
        self.usage: Any = None

    def _choice(self, index: int) -> dict[str, Any]:
        new = {"text": "", "reasoning": "", "calls": [], "tokens": [], "finish": None}
        return self.choices.setdefault(index, new)

    def add(self, part: Any) -> None:
        """A whole reply or a chunk."""
        self.usage = part.usage or self.usage
        for said in part.choices:
            choice = self._choice(said.index)
            choice["finish"] = said.finish_reason or choice["finish"]
            message = getattr(said, "message", None) or getattr(said, "delta", None)
            if message is None:
                choice["text"] += said.text
                choice["tokens"] += said.logprobs.tokens if said.logprobs else []
                continue
            choice["text"] += message.content or ""
            choice["reasoning"] += getattr(message, "reasoning_content", None) or ""
            for at, call in enumerate(message.tool_calls or []):
                index = getattr(call, "index", at)
                if index == len(choice["calls"]):
                    assert call.id and call.type == "function"
                    choice["calls"].append([call.function.name, ""])
                choice["calls"][index][1] += call.function.arguments
            if said.logprobs:
                choice["tokens"] += [entry.token for entry in said.logprobs.content]

    @property
    def text(self) -> str:
        return self.choices[0]["text"]

    @property
    def finish(self) -> str:
        return self.choices[0]["finish"]

    @property
    def calls(self) -> list[tuple[str, dict]]:
        return [(name, json.loads(arguments)) for name, arguments in self.choices[0]["calls"]]


class Clients:
    """A sync and an async one."""

    def __init__(self, server: Server) -> None:
        options = dict(base_url=server.url + "/v1", api_key="none", max_retries=0)
        self._loop = asyncio.new_event_loop()
        self._sync, self._async = openai.OpenAI(**options), openai.AsyncOpenAI(**options)

    def every_way(self, endpoint: str, kwargs: dict) -> Reply:
        """Asks in all four ways at once; the replies are the same."""
        streamed = {**kwargs, "stream": True, "stream_options": {"include_usage": True}}

        async def ask() -> list[Reply]:
            asked = [{"model": "", **way} for way in (kwargs, streamed)]
            sync = [asyncio.to_thread(self._ask, endpoint, way) for way in asked]
            return await asyncio.gather(*sync, *(self._ask_async(endpoint, way) for way in asked))

        first, *others = self._loop.run_until_complete(ask())
        for other in others:
            assert other.choices == first.choices
            assert other.usage.completion_tokens == first.usage.completion_tokens
            assert other.usage.prompt_tokens == first.usage.prompt_tokens
        return first

    def _ask(self, endpoint: str, kwargs: dict) -> Reply:
        reply, client = Reply(), self._sync.chat if endpoint == "chat" else self._sync
        got = client.completions.create(**kwargs)
        for part in got if kwargs.get("stream") else [got]:
            reply.add(part)
        return reply

    async def _ask_async(self, endpoint: str, kwargs: dict) -> Reply:
        reply, client = Reply(), self._async.chat if endpoint == "chat" else self._async
        got = await client.completions.create(**kwargs)
        if kwargs.get("stream"):
            async for chunk in got:
                reply.add(chunk)
        else:
            reply.add(got)
        return reply

    def close(self) -> None:
        self._loop.run_until_complete(self._async.close())
        self._sync.close()
        self._loop.close()


@pytest.fixture(scope="module")
def clients(server):
    clients = Clients(server)
    yield clients
    clients.close()


def texts(reply: Reply) -> list[str]:
    return [reply.choices[i]["text"] for i in range(len(reply.choices))]


# name: (what is asked, what must hold)
COMPLETIONS: dict[str, tuple[dict, Callable[[Reply], Any]]] = {
    "prompt of a text": (dict(prompt=TEXT), lambda r: r.text.startswith(" Paris")),
    "prompt of ids": (
        dict(prompt=[504, 3575, 282, 4649, 314]),
        lambda r: r.text.startswith(" Paris"),
    ),
    "prompts of texts": (
        dict(prompt=[TEXT, "1, 2, 3,"]),
        lambda r: texts(r)[0][:6] == " Paris" and texts(r)[1][:4] == " 4, ",
    ),
    "prompts of ids": (
        dict(prompt=[[504, 3575, 282, 4649, 314], [504]]),
        lambda r: texts(r)[0].startswith(" Paris") and len(texts(r)) == 2,
    ),
    "n": (
        dict(prompt=TEXT, n=3, seed=1, temperature=1),
        lambda r: len(r.choices) == 3 and len(set(texts(r))) > 1 and r.usage.prompt_tokens == 5,
    ),
    "echo": (dict(prompt=TEXT, echo=True), lambda r: r.text.startswith(TEXT + " Paris")),
    "logprobs": (
        dict(prompt=TEXT, logprobs=2),
        lambda r: "".join(r.choices[0]["tokens"]) == r.text,
    ),
    "echo and logprobs": (
        dict(prompt=TEXT, echo=True, logprobs=1),
        lambda r: "".join(r.choices[0]["tokens"]) == r.text and r.text.startswith(TEXT),
    ),
    "logit_bias": (dict(prompt=TEXT, logit_bias={"7042": -100}), lambda r: "Paris" not in r.text),
    "stop of one string": (
        dict(prompt="1, 2, 3,", stop="6"),
        lambda r: (r.text, r.finish) == (" 4, 5, ", "stop"),
    ),
    "stop of five strings": (
        dict(prompt="1, 2, 3,", stop=["a", "b", "c", "d", "5"]),
        lambda r: (r.text, r.finish) == (" 4, ", "stop"),
    ),
    "stop_token_ids": (
        dict(prompt=TEXT, extra_body={"stop_token_ids": [7042]}),
        lambda r: (r.text, r.finish) == ("", "stop"),
    ),
    "min_tokens": (
        dict(prompt=TEXT, extra_body={"stop_token_ids": [7042], "min_tokens": 3}),
        lambda r: r.usage.completion_tokens >= 3,
    ),
    "ignore_eos": (
        dict(prompt=TEXT, max_tokens=30, extra_body={"ignore_eos": True}),
        lambda r: (r.usage.completion_tokens, r.finish) == (30, "length"),
    ),
    "top_k": (
        dict(prompt=TEXT, temperature=1, extra_body={"top_k": 1}),
        lambda r: r.text.startswith(" Paris"),
    ),
    "min_p": (
        dict(prompt=TEXT, temperature=1, extra_body={"min_p": 1.0}),
        lambda r: r.text.startswith(" Paris"),
    ),
    "top_p": (dict(prompt=TEXT, temperature=1, top_p=1e-6), lambda r: r.text[:6] == " Paris"),
    "seed": (dict(prompt=TEXT, temperature=1.5, seed=4), lambda r: r.usage.completion_tokens == 8),
    "penalties": (
        dict(prompt="a a a a", frequency_penalty=2, presence_penalty=2),
        lambda r: r.text.count(" a") < 3,
    ),
    "repetition_penalty": (
        dict(prompt="1, 1, 1, 1,", extra_body={"repetition_penalty": 1.9}),
        lambda r: "1, 1" not in r.text,
    ),
    "skip_special_tokens": (
        dict(
            prompt="x",
            logit_bias={"2": 100},
            max_tokens=2,
            extra_body={"ignore_eos": True, "skip_special_tokens": False},
        ),
        lambda r: r.text == "<|im_end|>" * 2,
    ),
    "max_tokens null": (
        dict(prompt="1, 2,", max_tokens=None, extra_body={"ignore_eos": True}),
        lambda r: r.usage.completion_tokens == 16,
    ),
    "max_tokens 0": (
        dict(prompt=TEXT, max_tokens=0),
        lambda r: (r.text, r.finish) == ("", "length"),
    ),
    "regex": (
        dict(prompt="Phone: ", max_tokens=20, extra_body={"regex": r"\d{3}-\d{4}"}),
        lambda r: re.fullmatch(r"\d{3}-\d{4}", r.text) and r.finish == "stop",
    ),
    "ebnf": (
        dict(prompt="Yes or no? ", extra_body={"ebnf": 'root ::= "yes" | "no"'}),
        lambda r: r.text in ("yes", "no"),
    ),
    "json_schema": (
        dict(
            prompt="A number: ",
            extra_body={"json_schema": {"type": "integer", "minimum": 10, "maximum": 99}},
        ),
        lambda r: 10 <= json.loads(r.text) <= 99,
    ),
}  # fmt: skip

CHATS: dict[str, tuple[dict, Callable[[Reply], Any]]] = {
    "messages": (dict(messages=CAPITAL), lambda r: (r.text, r.finish) == (PARIS, "stop")),
    "parts and developer": (dict(messages=PARTS), lambda r: "Paris" in r.text),
    "tool messages": (dict(messages=AFTER_A_CALL), lambda r: r.text),
    "n": (
        dict(messages=CAPITAL, n=2, seed=3, temperature=1.5),
        lambda r: len(set(texts(r))) == 2,
    ),
    "logprobs": (
        dict(messages=CAPITAL, logprobs=True, top_logprobs=3),
        lambda r: "".join(r.choices[0]["tokens"]) == PARIS,
    ),
    "max_completion_tokens": (
        dict(messages=CAPITAL, max_completion_tokens=3),
        lambda r: (r.usage.completion_tokens, r.finish) == (3, "length"),
    ),
    "stop": (dict(messages=CAPITAL, stop=[" is"]), lambda r: r.text == "The capital of France"),
    "logit_bias": (
        dict(messages=CAPITAL, logit_bias={"7042": -100}),
        lambda r: "Paris" not in r.text,
    ),
    "penalties": (
        dict(messages=CAPITAL, frequency_penalty=0.5, presence_penalty=0.5),
        lambda r: r.text,
    ),
    "response_format text": (
        dict(messages=CAPITAL, response_format={"type": "text"}),
        lambda r: r.text == PARIS,
    ),
    "response_format json_object": (
        dict(messages=CAPITAL, response_format={"type": "json_object"}, max_tokens=30),
        lambda r: r.finish == "length" or isinstance(json.loads(r.text), dict),
    ),
    "response_format json_schema": (
        dict(
            messages=CAPITAL,
            max_tokens=40,
            response_format={
                "type": "json_schema",
                "json_schema": {
                    "name": "city",
                    "strict": True,
                    "schema": {
                        "type": "object",
                        "properties": {"city": {"enum": ["Paris", "Rome"]}},
                        "required": ["city"],
                        "additionalProperties": False,
                    },
                },
            },
        ),
        lambda r: json.loads(r.text)["city"] in ("Paris", "Rome"),
    ),
    "tools, none called": (
        dict(messages=CAPITAL, tools=[WEATHER], tool_choice="none"),
        lambda r: r.text == PARIS and not r.calls,
    ),
    "tools, required": (
        dict(
            messages=ASKED,
            tools=[WEATHER],
            tool_choice="required",
            parallel_tool_calls=False,
            max_tokens=60,
        ),
        lambda r: r.calls[0][0] == "get_weather" and r.finish == "tool_calls" and not r.text,
    ),
    "tools, one named": (
        dict(messages=ASKED, tools=[WEATHER], tool_choice=NAMED, max_tokens=60),
        lambda r: set(r.calls[0][1]) == {"city"} and r.finish == "tool_calls",
    ),
    "tools, auto, in parallel": (
        dict(
            messages=ASKED,
            tools=[WEATHER],
            tool_choice="auto",
            max_tokens=120,
            extra_body={"regex": f"Hm\\. (<tool_call>{CALL}</tool_call>){{2}}"},
        ),
        lambda r: [name for name, _ in r.calls] == ["get_weather"] * 2
        and (r.text, r.finish) == ("Hm. ", "tool_calls"),
    ),
    "tools, auto, not in parallel": (
        dict(
            messages=ASKED,
            tools=[WEATHER],
            parallel_tool_calls=False,
            max_tokens=120,
            extra_body={"regex": f"(<tool_call>{CALL}</tool_call>){{2}}"},
        ),
        lambda r: len(r.calls) == 1,
    ),
    "continue_final_message": (
        dict(
            messages=[*CAPITAL, {"role": "assistant", "content": "The capital of France is"}],
            extra_body={"continue_final_message": True},
        ),
        lambda r: r.text == " Paris.",
    ),
    "chat_template_kwargs": (
        dict(
            messages=CAPITAL,
            extra_body={"chat_template_kwargs": {"messages_of_no_template": True}},
        ),
        lambda r: r.text == PARIS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("feature", COMPLETIONS)
def test_completions(clients: Clients, feature: str):
    kwargs, holds = COMPLETIONS[feature]
    reply = clients.every_way("completions", {**GREEDY, **kwargs})
    assert holds(reply), (reply.choices, reply.usage)


@pytest.mark.parametrize("feature", CHATS)
def test_chats(clients: Clients, feature: str):
    kwargs, holds = CHATS[feature]
    reply = clients.every_way("chat", {"temperature": 0, "max_tokens": 20, **kwargs})
    assert holds(reply), (reply.choices, reply.usage)


class Person(BaseModel):
    name: str
    role: Literal["cook", "pilot"]


def test_the_clients_own_parsing_of_replies_and_of_streams(client, model):
    kwargs = dict(model=model, messages=[{"role": "user", "content": "Invent a person."}], seed=2)
    person = client.chat.completions.parse(response_format=Person, max_tokens=100, **kwargs)
    assert person.choices[0].message.parsed.role in ("cook", "pilot")
    kwargs |= dict(messages=ASKED, tools=[WEATHER], tool_choice="required", max_tokens=100)
    with client.chat.completions.stream(parallel_tool_calls=False, **kwargs) as stream:
        pieces = [event for event in stream if event.type.startswith("tool_calls.")]
        (call,) = stream.get_final_completion().choices[0].message.tool_calls
    assert len(pieces) > 3 and set(call.function.parsed_arguments) == {"city"}


@pytest.fixture(scope="module")
def thinker():
    flags = ["--reasoning-parser", "qwen3", "--tool-call-parser", "llama3"]
    server = Server("--dtype", "float32", "--chat-template", TEMPLATE, *flags).wait_ready()
    clients = Clients(server)
    yield clients
    clients.close()
    server.stop()


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if shout %}THE CAPITAL OF FRANCE IS{% endif %}"
)


def test_reasoning_is_apart_from_the_answer_and_from_calls(thinker):
    regex = r"<think>\nFrance[a-z, ]{2,20}\.\n</think>\n\nParis\."
    kwargs = dict(messages=CAPITAL, temperature=0, max_tokens=60, extra_body={"regex": regex})
    reply = thinker.every_way("chat", kwargs)
    assert reply.text == "Paris." and reply.choices[0]["reasoning"].startswith("\nFrance")
    together = {"regex": regex, "separate_reasoning": False}
    reply = thinker.every_way("chat", {**kwargs, "extra_body": together})
    assert re.fullmatch(regex, reply.text) and not reply.choices[0]["reasoning"]
    call = CALL.replace("arguments", "parameters")
    regex = rf"<think>[a-z ]{{3,9}}</think>{call}; {call}"
    kwargs |= dict(messages=ASKED, tools=[WEATHER], extra_body={"regex": regex}, max_tokens=120)
    reply = thinker.every_way("chat", kwargs)
    assert len(reply.calls) == 2 and reply.choices[0]["reasoning"] and not reply.text


def test_the_chat_template_gets_what_the_request_has_for_it(thinker):
    plain = dict(messages=CAPITAL, temperature=0, max_tokens=6)
    loud = {**plain, "extra_body": {"chat_template_kwargs": {"shout": True}}}
    said = [thinker.every_way("chat", kwargs) for kwargs in (plain, loud)]
    assert said[1].usage.prompt_tokens > said[0].usage.prompt_tokens
