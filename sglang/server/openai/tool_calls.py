"""Tool calls and reasoning in a model's text, as it streams.

Each model family writes its calls in a way of its own:

    hermes    <tool_call>{"name": "f", "arguments": {...}}</tool_call>        Qwen, Hermes
    llama3    {"name": "f", "parameters": {...}}; ...                         after <|python_tag|>
    pythonic  [f(x=1), g(y="z")]                                              Llama 3.2 and 4
    mistral   [TOOL_CALLS][{"name": "f", "arguments": {...}}]
    json      [{"name": "f", "parameters": {...}}]    what tool_choice forces
"""

from __future__ import annotations

import ast
import json
import uuid
from dataclasses import dataclass
from typing import Any

from sglang.server.detokenizer import StopFinder

PARSERS = ("hermes", "llama3", "pythonic", "mistral")


@dataclass
class ToolCall:
    name: str
    arguments: str
    """JSON."""

    def message(self, index: int | None = None) -> dict[str, Any]:
        """index: in a stream, which of the reply's calls it is."""
        function = {"name": self.name, "arguments": self.arguments}
        place = {} if index is None else {"index": index}
        id = f"call_{uuid.uuid4().hex[:24]}"
        return {**place, "id": id, "type": "function", "function": function}


class ToolParser:
    """Splits a text that comes in pieces into content and calls. A call is told when it is whole;
    what turns out to be none is content."""

    def __init__(self, kind: str, names: set[str]) -> None:
        """names: of the tools that there are."""
        self._kind, self._names = kind, names
        self._text = ""
        """Not told yet: a call that has begun, or what may be the beginning of one."""
        self._begun = kind == "json"
        self._said = self._after_call = False

    def push(self, piece: str) -> tuple[str, list[ToolCall]]:
        self._text += piece
        content, calls = "", []
        while True:
            if not self._begun:
                content += self._take_content()
            if not self._begun or self._kind != "hermes":
                return content, calls
            end = self._text.find("</tool_call>")
            if end < 0:
                return content, calls
            raw, self._text = self._text[:end], self._text[end + len("</tool_call>") :]
            found = self._parse(raw[len("<tool_call>") :])
            calls += found
            content += "" if found else raw + "</tool_call>"
            self._after_call = bool(found)
            self._begun = False

    def _take_content(self) -> str:
        """What is surely no call; sets `_begun` where one begins."""
        if self._kind in ("llama3", "pythonic"):  # a call is the whole reply
            text = self._text.lstrip()
            if not text or "<|python_tag|>".startswith(text):
                return ""
            starts = ("<|python_tag|>", "{") if self._kind == "llama3" else ("<|python_tag|>", "[")
            if not self._said and text.startswith(starts):
                self._begun = True
                return ""
            content, self._text = self._text, ""
        else:
            marker = "<tool_call>" if self._kind == "hermes" else "[TOOL_CALLS]"
            at = self._text.find(marker)
            if at < 0:
                at = StopFinder._first_prefix(self._text, marker)
            else:
                self._begun = True
            content, self._text = self._text[:at], self._text[at:]
            if self._after_call:  # line breaks between calls
                content = content.lstrip()
                self._after_call = not content
        self._said = self._said or bool(content.strip()) or self._begun
        return content

    def finish(self) -> tuple[str, list[ToolCall]]:
        """When no more text comes."""
        text, self._text = self._text, ""
        if not self._begun:
            return text, []
        raw = text
        for marker in ("<tool_call>", "<|python_tag|>", "[TOOL_CALLS]"):
            raw = raw.replace(marker, "", 1)
        calls = self._parse(raw)
        return ("", calls) if calls else (text, [])

    def _parse(self, raw: str) -> list[ToolCall]:
        """[] where it is no call, or one of a tool that does not exist."""
        try:
            calls = _pythonic_calls(raw) if self._kind == "pythonic" else _json_calls(raw)
        except (ValueError, TypeError, KeyError, AttributeError, SyntaxError, RecursionError):
            return []
        return calls if all(call.name in self._names for call in calls) else []


def _json_calls(raw: str) -> list[ToolCall]:
    """Objects, one after the other or in a list."""
    decoder, values, raw = json.JSONDecoder(), [], raw.strip()
    while raw:
        value, end = decoder.raw_decode(raw)
        values += value if isinstance(value, list) else [value]
        raw = raw[end:].lstrip("; \n")
    calls = []
    for value in values:
        arguments = value.get("arguments", value.get("parameters", {}))
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        calls.append(ToolCall(value["name"], text))
    return calls


def _pythonic_calls(raw: str) -> list[ToolCall]:
    body = ast.parse(raw.strip(), mode="eval").body
    calls = []
    for node in body.elts:  # type: ignore[attr-defined]
        arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
        calls.append(ToolCall(node.func.id, json.dumps(arguments)))
    return calls


def forced_calls_schema(functions: list[dict[str, Any]], parallel: bool) -> dict[str, Any]:
    """Of a list of calls of these functions, for tool_choice "required" or a named one."""
    items = [
        {
            "type": "object",
            "properties": {
                "name": {"const": function["name"]},
                "parameters": function.get("parameters") or {"type": "object"},
            },
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for function in functions
    ]
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": items}}
    return schema if parallel else {**schema, "maxItems": 1}


class ReasoningSplitter:
    """<think>...</think> and then the answer, told apart as they stream."""

    def __init__(self, begun: bool) -> None:
        """begun: the prompt ends within the reasoning."""
        self._state = "thinking" if begun else "start"
        self._text = ""

    def push(self, piece: str) -> tuple[str, str]:
        """(reasoning, answer)."""
        self._text += piece
        if self._state == "start":
            text = self._text.lstrip()
            if text.startswith("<think>"):
                self._state, self._text = "thinking", text[len("<think>") :]
            elif "<think>".startswith(text):
                return "", ""
            else:
                self._state = "answer"
        reasoning = ""
        if self._state == "thinking":
            if self._text.startswith("<think>"):
                self._text = self._text[len("<think>") :]
            at = self._text.find("</think>")
            if at < 0:
                at = StopFinder._first_prefix(self._text, "</think>")
                reasoning, self._text = self._text[:at], self._text[at:]
                return reasoning, ""
            reasoning, self._text = self._text[:at], self._text[at + len("</think>") :].lstrip("\n")
            self._state = "answer"
        answer, self._text = self._text, ""
        return reasoning, answer

    def finish(self) -> tuple[str, str]:
        text, self._text = self._text, ""
        return (text, "") if self._state == "thinking" else ("", text)
