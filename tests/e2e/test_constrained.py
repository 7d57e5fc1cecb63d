"""Grammars and tools: what a reply may look like, it looks like."""

from __future__ import annotations

import json
import re

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "role": {"enum": ["cook", "pilot"]},
    },
    "required": ["name", "age", "role"],
    "additionalProperties": False,
}
ASK = [{"role": "user", "content": "Invent a person."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def test_a_json_schema_is_obeyed_at_any_temperature_and_forced_tokens_are_prefilled(
    server, client, model
):
    before = server.stats()["forced_tokens"]
    schema = {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON, "strict": True}}
    for seed in range(4):
        kwargs = dict(
            model=model, messages=ASK, response_format=schema, max_tokens=200, temperature=1.5
        )
        reply = client.chat.completions.create(seed=seed, **kwargs)
        person = json.loads(reply.choices[0].message.content)
        assert reply.choices[0].finish_reason == "stop"
        assert set(person) == {"name", "age", "role"} and person["role"] in ("cook", "pilot")
        assert isinstance(person["age"], int) and 0 <= person["age"] <= 120
    assert server.stats()["forced_tokens"] > before


def test_penalties_count_what_a_grammar_leaves_no_choice_about(server):
    before = server.stats()["forced_tokens"]
    params = {"json_schema": PERSON, "max_new_tokens": 60, "temperature": 0}
    server.generate(text="A person:", sampling_params={**params, "frequency_penalty": 0.5})
    assert server.stats()["forced_tokens"] == before, "each is drawn, and so counted"
    server.generate(text="A person:", sampling_params=params)
    assert server.stats()["forced_tokens"] > before


def test_the_schema_of_anything_is_a_schema_and_completions_have_formats_too(client, model):
    anything = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}
    said = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Say hi."}], max_tokens=200,
        temperature=0, response_format=anything,
    ).choices[0]  # fmt: skip
    assert said.finish_reason == "length" or json.loads(said.message.content) is not ...
    assert not said.message.content.startswith("Hello")
    completed = client.completions.create(
        model=model, prompt="A person as JSON:", max_tokens=200, temperature=0,
        extra_body={"response_format": {"type": "json_schema", "json_schema": {"schema": PERSON}}},
    ).choices[0]  # fmt: skip
    assert set(json.loads(completed.text)) == {"name", "age", "role"}


def test_a_format_that_is_no_known_one_is_an_annotation(server):
    schema = {"type": "object", "properties": {"format": {"type": "string", "format": "password",
              "maxLength": 5}}, "required": ["format"], "additionalProperties": False}  # fmt: skip
    params = {"json_schema": schema, "max_new_tokens": 30, "temperature": 0}
    reply = server.generate(text="Secret:", sampling_params=params)
    assert len(json.loads(reply["text"])["format"]) <= 5


def test_regex_and_ebnf_are_obeyed_beside_unconstrained_prompts(server):
    def params(**grammar):
        return {"temperature": 1.0, "max_new_tokens": 24, **grammar}

    replies = server.generate(
        text=["Call me at ", "Yes or no? ", "Once upon"] * 4,
        sampling_params=[
            params(regex=r"\d{3}-\d{4}"), params(ebnf='root ::= "yes" | "no"'), params()
        ] * 4,
    )  # fmt: skip
    for i in range(0, 12, 3):
        assert re.fullmatch(r"\d{3}-\d{4}", replies[i]["text"])
        assert replies[i + 1]["text"] in ("yes", "no")
        assert replies[i + 2]["meta_info"]["completion_tokens"] > 0
    assert server.wait_idle(1.0)


def test_free_requests_say_beside_constrained_ones_what_they_say_alone(server):
    greedy = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
    free = [f"{i}, {i + 1}, {i + 2}," for i in range(4)]
    alone = [server.generate(text=text, sampling_params=greedy)["text"] for text in free]
    constrained = {**greedy, "json_schema": json.dumps(PERSON), "ignore_eos": False}
    replies = server.generate(
        text=[text for text in free for _ in range(2)], sampling_params=[greedy, constrained] * 4
    )
    assert [reply["text"] for reply in replies[::2]] == alone
    assert all(reply["text"].startswith('{"name": "') for reply in replies[1::2])


def test_forced_text_stops_at_stop_strings_and_tokens_and_is_scored_where_that_is_asked_for(server):
    params = {"temperature": 0, "regex": "The capital of France is Paris!"}
    whole = server.generate(text="Say:", sampling_params=params, return_logprob=True)
    assert whole["text"] == "The capital of France is Paris!"
    ids, scores = whole["output_ids"], whole["meta_info"]["output_token_logprobs"]
    assert [score[1] for score in scores] == ids, "each was sampled"
    for scored in (True, False):
        body = {"text": "Say:", "return_logprob": scored}
        stop = server.generate(**body, sampling_params={**params, "stop": "France"})
        assert stop["text"] == "The capital of "
        stop = server.generate(**body, sampling_params={**params, "stop_token_ids": [ids[-2]]})
        assert stop["output_ids"] == ids[:-1]
        assert stop["meta_info"]["finish_reason"] == {"type": "stop", "matched": ids[-2]}


def test_a_forced_tool_call_has_arguments_that_fit_whole_and_streamed(client, model):
    named = {"type": "function", "function": {"name": "get_weather"}}
    for choice in ("required", named):
        kwargs = dict(
            model=model,
            messages=[{"role": "user", "content": "How is the weather in Paris?"}],
            tools=[WEATHER],
            tool_choice=choice,
            parallel_tool_calls=False,
            temperature=0,
        )
        whole = client.chat.completions.create(**kwargs).choices[0]
        (call,) = whole.message.tool_calls
        assert whole.finish_reason == "tool_calls" and call.function.name == "get_weather"
        assert set(json.loads(call.function.arguments)) == {"city"}
        chunks = [c.choices[0] for c in client.chat.completions.create(stream=True, **kwargs)]
        said = [c.delta.tool_calls[0] for c in chunks if c.delta.tool_calls]
        assert "".join(piece.function.arguments for piece in said) == call.function.arguments
        assert len(said) > 2 and {piece.index for piece in said} == {0}
        assert [bool(piece.id and piece.function.name) for piece in said].count(True) == 1
        assert chunks[-1].finish_reason == "tool_calls"


def test_a_forced_call_fits_a_schema_with_references_and_none_has_no_arguments(client, model):
    node = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"],
            "additionalProperties": False}  # fmt: skip
    tree = {"type": "object", "properties": {"p": {"$ref": "#/$defs/P"}}, "required": ["p"],
            "additionalProperties": False, "$defs": {"P": node}}  # fmt: skip
    for parameters, fits in ((tree, {"p": {"x": 1}}), (None, {})):
        function = {"name": "f", **({"parameters": parameters} if parameters else {})}
        kwargs = dict(
            model=model,
            messages=[{"role": "user", "content": "hi"}],
            tools=[WEATHER, {"type": "function", "function": function}],
            tool_choice={"type": "function", "function": {"name": "f"}},
            temperature=0,
        )
        (call,) = client.chat.completions.create(**kwargs).choices[0].message.tool_calls
        arguments = json.loads(call.function.arguments)
        assert arguments.keys() == fits.keys()
        assert not fits or arguments["p"]["x"] in (1, 2)
        cut = client.chat.completions.create(**kwargs, max_tokens=4).choices[0]
        assert cut.finish_reason == "length" and not cut.message.content


def test_tools_that_are_not_called_leave_the_text_as_it_is(client, model):
    kwargs = dict(model=model, messages=ASK, temperature=0, max_tokens=12)
    plain = client.chat.completions.create(**kwargs).choices[0].message.content
    none = client.chat.completions.create(tools=[WEATHER], tool_choice="none", **kwargs)
    assert none.choices[0].message.content == plain
    auto = client.chat.completions.create(tools=[WEATHER], **kwargs).choices[0]
    assert auto.message.content and auto.message.tool_calls is None


def test_texts_become_tokens_and_back(server):
    tokens = server.post("/tokenize", {"text": "héllo 漢字"}).json()
    assert tokens["count"] == len(tokens["tokens"])
    back = server.post("/detokenize", {"tokens": tokens["tokens"]}).json()
    assert back == {"text": "héllo 漢字"}
