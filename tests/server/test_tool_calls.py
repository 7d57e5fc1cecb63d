"""Tool calls and reasoning are found however the text is cut."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang.server.openai.tool_calls import ReasoningSplitter, ToolParser

HERMES = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
LLAMA = '{"name": "f", "parameters": {"x": 1}}'
MISTRAL = '{"name": "f", "arguments": {"x": 1}}'
CASES = {
    "hermes": f"Let me see. {HERMES}\n{HERMES}",
    "llama3": f"<|python_tag|>{LLAMA}; {LLAMA}",
    "pythonic": "[f(x=1), f(x=1)]",
    "mistral": f"Let me see. [TOOL_CALLS][{MISTRAL}, {MISTRAL}]",
    "json": f"[{LLAMA}, {LLAMA}]",
}


def parse(kind, pieces):
    parser, content, calls = ToolParser(kind, {"f"}), "", []
    for text, found in [*map(parser.push, pieces), parser.finish()]:
        content, calls = content + text, calls + found
    return content, calls


def cut(text, cuts):
    borders = [0, *sorted(c for c in cuts if c < len(text)), len(text)]
    return [text[a:b] for a, b in pairwise(borders)]


@pytest.mark.parametrize("kind", CASES)
@given(cuts=st.lists(st.integers(0, 120), max_size=12))
def test_calls_are_found_wherever_the_text_is_cut(kind, cuts):
    content, calls = parse(kind, cut(CASES[kind], cuts))
    assert content == ("Let me see. " if kind in ("hermes", "mistral") else "")
    assert [(c.name, json.loads(c.arguments)) for c in calls] == [("f", {"x": 1})] * 2


@pytest.mark.parametrize("kind", CASES)
@given(text=st.text("<tool_cal>[]{}f(x=1) ", max_size=40), cuts=st.lists(st.integers(0, 40)))
def test_what_is_no_call_is_all_content(kind, text, cuts):
    content, calls = parse(kind, cut(text, cuts))
    if not calls:
        assert content == text


@given(cuts=st.lists(st.integers(0, 60), max_size=8), begun=st.booleans())
def test_reasoning_is_told_apart_wherever_the_text_is_cut(cuts, begun):
    splitter = ReasoningSplitter(begun)
    text = ("" if begun else "<think>") + "a < b, so</think>\n\nIt is <b>."
    reasoning, answer = "", ""
    for r, a in [*map(splitter.push, cut(text, cuts)), splitter.finish()]:
        reasoning, answer = reasoning + r, answer + a
    assert (reasoning, answer.lstrip("\n")) == ("a < b, so", "It is <b>.")
