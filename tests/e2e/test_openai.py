"""The OpenAI endpoints, with OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.serving import at_once

CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
PROMPTS = [
    "The capital of France is",
    "Once upon a time, there was",
    "def fibonacci(n):\n",
    "1, 2, 3, 4,",
    "Die Hauptstadt von",
    "こんにちは",
]


def completion_stream_text(client: openai.OpenAI, **kwargs) -> tuple[str, str]:
    """(joined text, finish reason)."""
    text, reason = "", ""
    for chunk in client.completions.create(stream=True, **kwargs):
        text += chunk.choices[0].text
        assert "�" not in chunk.choices[0].text or kwargs.get("temperature"), "half a character"
        reason = chunk.choices[0].finish_reason or reason
    return text, reason


def test_chat_answers(client, model):
    reply = client.chat.completions.create(model=model, messages=CAPITAL, temperature=0)
    choice = reply.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content == "The capital of France is Paris."
    assert choice.finish_reason == "stop"
    assert reply.object == "chat.completion" and reply.model == model
    usage = reply.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.completion_tokens == 8  # with the end-of-turn token


def test_a_chat_stream_says_what_the_whole_reply_says_and_ends_with_its_usage(client, model):
    stream = client.chat.completions.create(
        model=model,
        messages=CAPITAL,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(deltas) == "The capital of France is Paris."
    assert len([d for d in deltas if d]) > 2, "it comes in pieces"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 8
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_repeated_prompt_is_cached(server, client, model):
    messages = [{"role": "user", "content": "Name a colour that nobody has named before."}]
    for expected in (False, True):
        reply = client.chat.completions.create(model=model, messages=messages, max_tokens=2)
        cached = reply.usage.prompt_tokens_details.cached_tokens
        # The template's default system prompt may be in the cache already.
        assert (cached >= reply.usage.prompt_tokens - 1) == expected


def test_content_parts_and_developer_messages_are_understood(client, model):
    plain = [{"role": "system", "content": "Be brief."}, *CAPITAL]
    plain += [{"role": "assistant", "content": "I cannot say."}, *CAPITAL]
    parts = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        *CAPITAL,
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "I cannot say."}]},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is the capital"},
                {"type": "text", "text": " of France?"},
            ],
        },
    ]
    replies = [
        client.chat.completions.create(model=model, messages=m, temperature=0, max_tokens=12)
        for m in (plain, parts)
    ]
    assert replies[0].choices[0].message.content == replies[1].choices[0].message.content
    assert replies[0].usage.prompt_tokens == replies[1].usage.prompt_tokens


def test_an_assistants_last_message_can_be_continued(client, model):
    reply = client.chat.completions.create(
        model=model,
        messages=[*CAPITAL, {"role": "assistant", "content": "The capital of France is"}],
        temperature=0,
        extra_body={"continue_final_message": True},
    )
    assert reply.choices[0].message.content.startswith(" Paris")


def wholes_and_streams(client: openai.OpenAI, asked: list[dict]) -> list[tuple]:
    """Of each: (the whole completion, completion_stream_text)."""
    wholes = [partial(client.completions.create, **kwargs) for kwargs in asked]
    streams = [partial(completion_stream_text, client, **kwargs) for kwargs in asked]
    replies: list[Any] = at_once([*wholes, *streams])
    return [(w.choices[0], s) for w, s in zip(replies, replies[len(asked) :], strict=False)]


def test_a_completion_stream_joined_is_the_whole_completion(client, model):
    kwargs = {"model": model, "max_tokens": 24, "temperature": 0}
    asked = [{**kwargs, "prompt": prompt} for prompt in PROMPTS]
    for whole, streamed in wholes_and_streams(client, asked):
        assert streamed == (whole.text, whole.finish_reason)
        assert whole.text


def test_a_stream_of_wild_bytes_joined_is_the_whole_completion(client, model):
    """At this temperature there are broken characters, emoji and all scripts."""
    kwargs = {
        "model": model,
        "prompt": "☃",
        "max_tokens": 40,
        "temperature": 2.0,
        "extra_body": {"ignore_eos": True},
    }
    for whole, streamed in wholes_and_streams(client, [{**kwargs, "seed": i} for i in range(4)]):
        assert streamed == (whole.text, "length")


def test_a_stop_string_is_neither_shown_nor_leaked_wherever_tokens_end(client, model):
    kwargs = {"model": model, "prompt": PROMPTS[1], "temperature": 0, "max_tokens": 24}
    full = client.completions.create(**kwargs).choices[0].text

    def check(at: int) -> None:
        stop = full[at : at + 6]
        expected = full[: full.index(stop)]
        whole = client.completions.create(stop=stop, **kwargs).choices[0]
        assert (whole.text, whole.finish_reason) == (expected, "stop")
        assert whole.matched_stop == stop
        assert completion_stream_text(client, stop=[stop], **kwargs) == (expected, "stop")
        kept = client.completions.create(stop=stop, extra_body={"no_stop_trim": True}, **kwargs)
        assert kept.choices[0].text == expected + stop

    at_once(partial(check, at) for at in range(3, 40, 5))


def test_several_stop_strings_end_at_the_first(client, model):
    reply = client.completions.create(
        model=model, prompt="1, 2, 3, 4,", temperature=0, max_tokens=40, stop=["9", "7,", "zzz"]
    )
    assert reply.choices[0].text == " 5, 6, " and reply.choices[0].matched_stop == "7,"


def test_batches_of_texts_and_of_token_ids_answer_in_order(server, client, model):
    kwargs = {"model": model, "max_tokens": 8, "temperature": 0}
    single = [client.completions.create(prompt=p, **kwargs).choices[0].text for p in PROMPTS]
    batch = client.completions.create(prompt=PROMPTS, **kwargs)
    assert [c.index for c in batch.choices] == list(range(len(PROMPTS)))
    assert [c.text for c in batch.choices] == single
    echoes = {}
    for chunk in client.completions.create(prompt=PROMPTS, stream=True, **kwargs):
        choice = chunk.choices[0]
        echoes[choice.index] = echoes.get(choice.index, "") + choice.text
    assert [echoes[i] for i in range(len(PROMPTS))] == single
    ids = [[504, 3575, 282, 4649, 314], [504, 3575]]
    for prompt in (ids, ids[0]):
        reply = client.completions.create(prompt=prompt, **kwargs)
        native = server.generate(
            input_ids=prompt, sampling_params={"max_new_tokens": 8, "temperature": 0}
        )
        native = native if isinstance(native, list) else [native]
        assert [c.text for c in reply.choices] == [r["text"] for r in native]


def test_the_default_length_of_a_completion_is_16_tokens(client, model):
    reply = client.completions.create(model=model, prompt="Once", extra_body={"ignore_eos": True})
    assert reply.usage.completion_tokens == 16 and reply.choices[0].finish_reason == "length"


def test_samples_of_one_prompt_differ_and_repeat_with_their_seed(client, model):
    kwargs = {"model": model, "prompt": "My favourite", "n": 4, "max_tokens": 12, "temperature": 1}
    first = [c.text for c in client.completions.create(seed=11, **kwargs).choices]
    again = client.completions.create(seed=11, **kwargs)
    assert [c.text for c in again.choices] == first
    assert len(set(first)) > 1
    assert again.usage.prompt_tokens < 10, "the prompt counts once"


def test_echo_puts_the_prompt_before_the_text(client, model):
    kwargs = {"model": model, "prompt": PROMPTS[0], "max_tokens": 6, "temperature": 0}
    plain = client.completions.create(**kwargs).choices[0].text
    assert client.completions.create(echo=True, **kwargs).choices[0].text == PROMPTS[0] + plain
    assert completion_stream_text(client, echo=True, **kwargs)[0] == PROMPTS[0] + plain


def test_extras_of_other_servers_are_obeyed(client, model):
    kwargs = {"model": model, "prompt": PROMPTS[0], "max_tokens": 12}
    greedy = client.completions.create(temperature=0, **kwargs).choices[0].text
    top_1 = client.completions.create(extra_body={"top_k": 1}, **kwargs).choices[0].text
    assert top_1 == greedy
    sharp = client.completions.create(extra_body={"min_p": 1.0}, **kwargs).choices[0].text
    assert sharp == greedy
    comma = client.completions.create(
        temperature=0, extra_body={"stop_token_ids": [30], "no_stop_trim": True}, **kwargs
    ).choices[0]
    assert comma.finish_reason == "stop" and comma.matched_stop == 30
    assert greedy.startswith(comma.text) and comma.text.endswith(".")
    longer = client.completions.create(
        temperature=0, extra_body={"stop_token_ids": [30], "min_tokens": 9}, **kwargs
    )
    assert longer.usage.completion_tokens >= 9


def test_many_streams_at_once_say_what_each_says_alone(server, model):
    prompts = [f"{i}, {i + 1}, {i + 2}," for i in range(24)]
    kwargs = {"model": model, "max_tokens": 12, "temperature": 0}

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none") as client:

            async def one(prompt: str) -> str:
                stream = await client.completions.create(prompt=prompt, stream=True, **kwargs)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*map(one, prompts))

    together = asyncio.run(run())
    sync = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
    for i in range(0, 24, 6):
        alone = sync.completions.create(prompt=prompts[i], **kwargs).choices[0].text
        assert together[i] == alone


def test_every_event_of_a_stream_is_one_json_object_with_the_same_head(server, model):
    body = {"model": model, "prompt": 'Say "\\\n', "max_tokens": 8, "stream": True}
    with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=60) as reply:
        assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
        events = "".join(reply.iter_text()).split("\n\n")
    assert events.pop() == "" and events.pop() == "data: [DONE]"
    parsed = [json.loads(event.removeprefix("data: ")) for event in events]
    heads = {(e["id"], e["object"], e["created"], e["model"]) for e in parsed}
    assert len(heads) == 1 and heads.pop()[1] == "text_completion"


def test_a_model_is_listed_and_found_by_its_name(client, model):
    assert client.models.retrieve(model).id == model
    for name in ("default", ""):
        assert client.completions.create(model=name, prompt="x", max_tokens=1).model == model
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt-9")
    assert error.value.code == "model_not_found"


def test_errors_are_openais(client, model):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model=model, prompt="x", temperature=-1)
    assert error.value.param == "temperature"
    assert error.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=CAPITAL)
    assert missing.value.param == "model"
