"""Logprobs, of generated and of prompt tokens, are those of `transformers` in float32."""

from __future__ import annotations

import json
from functools import lru_cache

import openai
import pytest
import torch

from tests.reference import demo_model_in_transformers

IDS = [504, 3575, 282, 4649, 314]  # "The capital of France is"
TEXT = "The capital of France is"
TOLERANCE = 1e-4


def reference(ids: list[int]) -> torch.Tensor:
    """[len(ids), V]: row i has the logprobs of what follows ids[: i + 1]."""
    return _reference(*ids)


@lru_cache(maxsize=1)
def _reference(*ids: int) -> torch.Tensor:
    model, _ = demo_model_in_transformers()
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].float().log_softmax(-1)


def assert_same(entries, expected: torch.Tensor) -> None:
    """entries: [logprob, id, ...] against a row [V] each."""
    for (logprob, id, *_), row in zip(entries, expected, strict=True):
        assert abs(logprob - float(row[id])) < TOLERANCE


def test_native_logprobs_of_prompt_and_output_are_those_of_transformers(server):
    reply = server.generate(
        input_ids=IDS,
        sampling_params={"temperature": 0, "max_new_tokens": 8},
        return_logprob=True,
        top_logprobs_num=5,
        logprob_start_len=0,
        return_text_in_logprobs=True,
    )
    meta = reply["meta_info"]
    rows = reference(IDS + reply["output_ids"])
    first, *prompt = meta["input_token_logprobs"]
    assert first == [None, IDS[0], "The"] and meta["input_top_logprobs"][0] is None
    assert [id for _, id, _ in prompt] == IDS[1:]
    assert_same(prompt, rows[: len(IDS) - 1])
    output = meta["output_token_logprobs"]
    assert [id for _, id, _ in output] == reply["output_ids"]
    assert output[0][2] == " Paris"
    assert_same(output, rows[len(IDS) - 1 : -1])
    tops = [*meta["input_top_logprobs"][1:], *meta["output_top_logprobs"]]
    for top, row in zip(tops, rows[:-1], strict=True):
        assert [id for _, id, _ in top] == row.topk(5).indices.tolist()
        assert_same(top, row.expand(5, -1))


@pytest.mark.parametrize("start", [0, 1, 3, 700])
def test_prompt_logprobs_are_right_beyond_a_chunk_and_whatever_is_cached(server, start):
    """The chunks are of 512 tokens; positions before `start` may come from the cache."""
    ids = [(7 * i * i + i) % 40000 + 100 for i in range(1100)]
    greedy = {"temperature": 0, "max_new_tokens": 2}
    server.generate(input_ids=ids, sampling_params=greedy)
    reply = server.generate(
        input_ids=ids, sampling_params=greedy, return_logprob=True, logprob_start_len=start
    )
    scored = reply["meta_info"]["input_token_logprobs"]
    assert [id for _, id, _ in scored] == ids[start:]
    rows = reference(ids)
    first = max(start, 1)
    assert_same(scored[first - start :], rows[first - 1 : -1])
    assert reply["meta_info"]["cached_tokens"] == max(start - 1, 0)


def test_a_prompt_alone_can_be_scored(server):
    """What evaluation harnesses do: echo, logprobs, and no token of output."""
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
    model = client.models.list().data[0].id
    reply = client.completions.create(
        model=model, prompt=[IDS, IDS[:3]], max_tokens=0, echo=True, logprobs=1
    )
    rows = reference(IDS)
    for choice, length in zip(reply.choices, (5, 3), strict=True):
        said = choice.logprobs
        assert choice.text == TEXT[: len(choice.text)] and choice.finish_reason == "length"
        assert "".join(said.tokens) == choice.text and len(said.tokens) == length
        assert said.token_logprobs[0] is None and said.top_logprobs[0] is None
        assert said.text_offset == [0, 3, 11, 14, 21][:length]
        for i in range(1, length):
            assert abs(said.token_logprobs[i] - float(rows[i - 1, IDS[i]])) < TOLERANCE
            assert max(said.top_logprobs[i].values()) == pytest.approx(
                float(rows[i - 1].max()), abs=TOLERANCE
            )


def test_offsets_are_places_in_a_text_with_special_tokens(client, model):
    prompt = "<|im_start|>user\nhi<|im_end|>\n"
    choice = client.completions.create(
        model=model, prompt=prompt, max_tokens=3, temperature=0, echo=True, logprobs=0
    ).choices[0]
    said = choice.logprobs
    assert said.text_offset[:7] == [0, 12, 16, 17, 19, 29, 30] and choice.text.startswith(prompt)
    for token, at in zip(said.tokens[7:], said.text_offset[7:], strict=True):
        assert choice.text.startswith(token, at) or token == "<|im_start|>", "the reply is without"


@pytest.mark.parametrize("echo", [False, True])
def test_streamed_completion_logprobs_joined_are_the_whole_replys(client, model, echo):
    kwargs = dict(
        model=model, prompt=TEXT, max_tokens=12, temperature=0, logprobs=3, echo=echo, n=2, seed=1
    )
    whole = client.completions.create(**kwargs)
    parts = {i: {"tokens": [], "token_logprobs": [], "text_offset": []} for i in (0, 1)}
    texts = {0: "", 1: ""}
    for chunk in client.completions.create(stream=True, **kwargs):
        choice = chunk.choices[0]
        texts[choice.index] += choice.text
        for field, values in parts[choice.index].items():
            values += getattr(choice.logprobs, field)
    for choice in whole.choices:
        said = parts[choice.index]
        assert texts[choice.index] == choice.text == "".join(said["tokens"])
        assert said["tokens"] == choice.logprobs.tokens
        assert said["text_offset"] == choice.logprobs.text_offset
        for a, b in zip(said["token_logprobs"], choice.logprobs.token_logprobs, strict=True):
            assert a == b or abs(a - b) < TOLERANCE


def test_chat_logprobs_have_tokens_bytes_and_alternatives(client, model):
    kwargs = dict(
        model=model,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    choice = client.chat.completions.create(**kwargs).choices[0]
    content = choice.logprobs.content
    assert "".join(entry.token for entry in content) == choice.message.content
    assert b"".join(bytes(entry.bytes) for entry in content).decode() == choice.message.content
    for entry in content:
        assert len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].token == entry.token, "it is greedy"
        assert entry.top_logprobs[0].logprob == entry.logprob <= 0
    streamed = [
        entry
        for chunk in client.chat.completions.create(stream=True, **kwargs)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in content]
    plain = client.chat.completions.create(**{**kwargs, "top_logprobs": None}).choices[0]
    assert plain.logprobs.content[0].top_logprobs == []


def test_tokens_that_are_parts_of_characters_keep_their_bytes(client, model):
    kwargs = dict(model=model, prompt="☃", max_tokens=30, temperature=2.0, seed=2, logprobs=0)
    reply = client.completions.create(extra_body={"ignore_eos": True}, **kwargs)
    choice = reply.choices[0]
    raw = b"".join(
        bytes(int(h, 16) for h in token[6:].split("\\x")[1:])
        if token.startswith("bytes:")
        else token.encode()
        for token in choice.logprobs.tokens
    )
    assert raw.decode("utf-8", "replace").replace("<|im_end|>", "") == choice.text
    json.dumps(choice.logprobs.model_dump())


def test_logprobs_do_not_change_what_is_sampled_nor_other_requests(client, model):
    kwargs = dict(model=model, prompt=TEXT, max_tokens=16, temperature=1.0, seed=5)
    plain = client.completions.create(**kwargs).choices[0].text
    assert client.completions.create(logprobs=2, echo=False, **kwargs).choices[0].text == plain


def test_the_best_of_several_samples_has_the_highest_mean_logprob(client, model):
    kwargs = dict(model=model, prompt="My favourite", max_tokens=8, temperature=1.5, seed=3)
    samples = client.completions.create(n=4, logprobs=0, **kwargs).choices
    means = {
        s.text: sum(s.logprobs.token_logprobs) / len(s.logprobs.token_logprobs) for s in samples
    }
    best = client.completions.create(n=2, best_of=4, **kwargs)
    ranked = sorted(means, key=means.get, reverse=True)
    assert [c.text for c in best.choices] == ranked[:2]
    assert [c.index for c in best.choices] == [0, 1]
    assert best.usage.completion_tokens > 2 * 8, "all samples count"
