"""Tool calls and reasoning are found however the text is cut."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sglang.server.openai.reasoning import ReasoningSplitter
from sglang.server.openai.tool_calls import ToolParser, whole_calls

HERMES = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
LLAMA = '{"name": "f", "parameters": {"x": 1}}'
MISTRAL = '{"name": "f", "arguments": {"x": 1}}'
CASES = {
    "hermes": f"Let me see. {HERMES}\n{HERMES}",
    "llama3": f"<|python_tag|>{LLAMA}; {LLAMA}",
    "pythonic": "[f(x=1), f(x=1)]",
    "mistral": f"Let me see. [TOOL_CALLS][{MISTRAL}, {MISTRAL}]",
    "mistral v11": 'Let me see. [TOOL_CALLS]f[ARGS]{"x": 1}[TOOL_CALLS]f[ARGS]{"x": 1}',
    "hermes, whole": r'<tool_call>{"name": "f", "arguments": "{\"x\": 1}"}</tool_call>'
    '<tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call>',
    "json": f"[{LLAMA}, {LLAMA}]",
}


def parse(kind, pieces):
    """(content, calls as a whole reply has them, their deltas)."""
    kind = kind.replace(",", " ").split()[0]
    parser, content, deltas = ToolParser(kind, {"f"}), "", []
    for text, found in [*map(parser.push, pieces), parser.finish()]:
        content, deltas = content + text, deltas + found
    return content, whole_calls(deltas, kind), deltas


def cut(text, cuts):
    borders = [0, *sorted(c for c in cuts if c < len(text)), len(text)]
    return [text[a:b] for a, b in pairwise(borders)]


@pytest.mark.parametrize("kind", CASES)
@given(cuts=st.lists(st.integers(0, 120), max_size=12))
@example(cuts=list(range(120)))
def test_calls_are_found_wherever_the_text_is_cut(kind, cuts):
    content, calls, _ = parse(kind, cut(CASES[kind], cuts))
    assert content == ("Let me see. " if CASES[kind].startswith("Let") else "")
    assert [c["function"]["name"] for c in calls] == ["f", "f"]
    assert [json.loads(c["function"]["arguments"]) for c in calls] == [{"x": 1}] * 2
    assert len({c["id"] for c in calls}) == 2


@pytest.mark.parametrize("kind", CASES)
@given(text=st.text("<tool_cal>[]{}f(x=1) ", max_size=40), cuts=st.lists(st.integers(0, 40)))
def test_what_is_no_call_is_all_content(kind, text, cuts):
    content, calls, _ = parse(kind, cut(text, cuts))
    if not calls:
        is_begun = kind == "json" and not content  # where nothing but calls is allowed
        assert content == text or is_begun


@pytest.mark.parametrize("kind", ["hermes", "llama3", "mistral", "json", "mistral v11"])
def test_arguments_are_told_as_they_come(kind):
    _, _, deltas = parse(kind, list(CASES[kind]))
    pieces = [d.arguments for d in deltas if d.index == 0 and d.name is None]
    assert len(pieces) == len('{"x": 1}') and "".join(pieces) == '{"x": 1}'


def test_a_call_that_is_cut_off_is_a_call_as_far_as_it_goes():
    content, calls, _ = parse("hermes", [HERMES[:43]])
    assert content == "" and calls[0]["function"] == {"name": "f", "arguments": '{"x"'}


def test_calls_of_tools_that_do_not_exist_are_content_and_those_after_them_calls():
    unknown = HERMES.replace('"f"', '"g"')
    content, calls, _ = parse("hermes", list(f"{unknown} and {HERMES}"))
    assert content == f"{unknown} and " and len(calls) == 1
    content, calls, _ = parse("llama3", list(LLAMA.replace('"f"', '"g"')))
    assert content == LLAMA.replace('"f"', '"g"') and calls == []


def test_an_object_whose_name_is_no_name_is_content():
    for kind, text in (
        ("llama3", '{"name": {"first": "A"}, "age": 3}'),
        ("mistral", '[TOOL_CALLS][{"name": ["f"], "arguments": {}}]'),
        ("hermes", '<tool_call>{"name": {"f": 1}, "arguments": {}}</tool_call>'),
        ("pythonic", '[f("Paris")]'),
    ):
        content, calls, _ = parse(kind, list(text))
        assert content == text and calls == []


def test_brackets_in_the_strings_of_arguments_do_not_end_them():
    text = HERMES.replace("1", '"}]\\\\\\"{"')
    _, calls, _ = parse("hermes", list(text))
    assert json.loads(calls[0]["function"]["arguments"]) == {"x": '}]\\"{'}


def test_ids_of_mistrals_calls_are_such_as_its_templates_take():
    (id,) = {len(c["id"]) for c in parse("mistral", [CASES["mistral"]])[1]}
    assert id == 9


@given(cuts=st.lists(st.integers(0, 60), max_size=8), begun=st.booleans())
def test_reasoning_is_told_apart_wherever_the_text_is_cut(cuts, begun):
    splitter = ReasoningSplitter(begun)
    text = ("" if begun else "<think>") + "a < b, so</think>\n\nIt is <b>."
    reasoning, answer = "", ""
    for r, a in [*map(splitter.push, cut(text, cuts)), splitter.finish()]:
        reasoning, answer = reasoning + r, answer + a
    assert (reasoning, answer.lstrip("\n")) == ("a < b, so", "It is <b>.")
