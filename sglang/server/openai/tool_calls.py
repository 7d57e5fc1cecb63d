"""Tool calls in a model's text, as it streams.

Each model family writes its calls in a way of its own:

    hermes    <tool_call>{"name": "f", "arguments": {...}}</tool_call>        Qwen, Hermes
    llama3    {"name": "f", "parameters": {...}}; ...                         after <|python_tag|>
    pythonic  [f(x=1), g(y="z")]                                              Llama 3.2 and 4
    mistral   [TOOL_CALLS][{"name": "f", "arguments": {...}}]   or  [TOOL_CALLS]f[ARGS]{...}
    json      [{"name": "f", "parameters": {...}}]    what tool_choice forces
"""

from __future__ import annotations

import ast
import json
import re
import uuid
from dataclasses import dataclass
from typing import Any

from sglang.json_schema import moved
from sglang.server.detokenizer import StopFinder

PARSERS = ("hermes", "llama3", "pythonic", "mistral")
_MARKER = {"hermes": "<tool_call>", "mistral": "[TOOL_CALLS]"}
_HERMES_END = "</tool_call>"
_HEADER = re.compile(
    r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
"""Up to the arguments, if they are an object."""
_BETWEEN = re.compile(r"(?:<\|python_tag\|>|<tool_call>|\[TOOL_CALLS\]|[\s,;\]]|\[(?=[^T]))*")


@dataclass
class CallDelta:
    """A piece of one call; joined, the `arguments` are JSON, as the model wrote it."""

    index: int
    """Which of the reply's calls."""
    arguments: str = ""
    name: str | None = None
    """In the first delta of a call."""

    def message(self, kind: str) -> dict[str, Any]:
        """As a stream tells it."""
        function = {"arguments": self.arguments}
        if self.name is None:
            return {"index": self.index, "function": function}
        function = {"name": self.name, **function}
        return {
            "index": self.index,
            "id": new_call_id(kind),
            "type": "function",
            "function": function,
        }


def new_call_id(kind: str) -> str:
    """Mistral's chat templates take ids of nine letters and digits only."""
    return uuid.uuid4().hex[:9] if kind == "mistral" else f"call_{uuid.uuid4().hex[:24]}"


def whole_calls(deltas: list[CallDelta], kind: str) -> list[dict[str, Any]]:
    """As a reply that is not streamed has them."""
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        if delta.name is not None:
            calls.append({**delta.message(kind), "id": new_call_id(kind)})
            del calls[-1]["index"]
        else:
            calls[delta.index]["function"]["arguments"] += delta.arguments
    return calls


class _Brackets:
    """Finds where a JSON object or array ends, in a text that comes in pieces."""

    def __init__(self, depth: int = 0) -> None:
        """depth: of the brackets that are open already."""
        self._depth = depth
        self._in_string = self._is_escaped = False

    def end(self, text: str, start: int = 0) -> int | None:
        """text: what is new, from `start` on -> the index after the last bracket."""
        for i in range(start, len(text)):
            char = text[i]
            if self._is_escaped:
                self._is_escaped = False
            elif self._in_string:
                self._in_string = char != '"'
                self._is_escaped = char == "\\"
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return i + 1
        return None


class ToolParser:
    """Splits a text that comes in pieces into content and calls. A call is told from its arguments'
    first character on (a pythonic one at the end); what turns out to be none is content."""

    def __init__(self, kind: str, names: set[str]) -> None:
        """names: of the tools that there are."""
        self._kind, self._names = kind, names
        self._text = ""
        """Not told yet."""
        self._inside = kind == "json"
        """Where calls are, or what looks like one."""
        self._is_start = True
        """Nothing has been told."""
        self._after_call = False
        self._arguments: _Brackets | None = None
        """Of the call that is being told."""
        self._rest: _Brackets | None = None
        """Of the object that it is in, after them."""
        self._object: tuple[_Brackets, int] | None = None
        """An object that may be a call, and how much of it has been looked at."""
        self._num_calls = 0

    def push(self, piece: str) -> tuple[str, list[CallDelta]]:
        self._text += piece
        content: list[str] = []
        deltas: list[CallDelta] = []
        while self._advance(content, deltas):
            pass
        return "".join(content), deltas

    def finish(self) -> tuple[str, list[CallDelta]]:
        """When no more text comes."""
        text, self._text = self._text, ""
        deltas: list[CallDelta] = []
        if self._inside and self._kind == "pythonic":
            self._tell(_pythonic_calls(text.replace("<|python_tag|>", "", 1)), deltas)
        is_told = self._rest is not None or (self._num_calls and _BETWEEN.fullmatch(text))
        is_cut = self._kind == "json"  # the beginning of a call: there is nothing else
        return "" if deltas or is_told or is_cut else text, deltas

    def _advance(self, content: list[str], deltas: list[CallDelta]) -> bool:
        """One step; False if it takes more text."""
        if self._arguments is not None:
            return self._read_arguments(deltas)
        if self._rest is not None:
            end = self._rest.end(self._text)
            self._text = "" if end is None else self._text[end:]
            self._rest = None if end is not None else self._rest
            return end is not None
        if self._inside:
            return self._kind != "pythonic" and self._read_call(content, deltas)
        return self._read_content(content)

    def _read_content(self, content: list[str]) -> bool:
        """What is surely no call; goes inside where one begins."""
        if self._is_start and self._kind in ("llama3", "pythonic"):  # a call is the whole reply
            text = self._text.lstrip()
            if not text or "<|python_tag|>".startswith(text):
                return False
            if text.startswith(("<|python_tag|>", "{" if self._kind == "llama3" else "[")):
                self._inside = True
                return True
        at = len(self._text)
        if (marker := _MARKER.get(self._kind)) is not None:
            at = self._text.find(marker)
            self._inside = at >= 0
            if not self._inside:
                at = StopFinder.first_prefix(self._text, marker)
        said, self._text = self._text[:at], self._text[at:]
        if self._after_call:  # line breaks between calls
            said = said.lstrip()
            self._after_call = not said
        if said:
            self._is_start = False
            content.append(said)
        return self._inside

    def _read_call(self, content: list[str], deltas: list[CallDelta]) -> bool:
        """Up to a call's arguments, or all of it."""
        between = _BETWEEN.match(self._text)
        assert between is not None
        start, text = between.end(), self._text[between.end() :]
        if self._kind == "hermes" and self._num_calls and text.startswith(_HERMES_END):
            self._text, self._inside, self._after_call = text[len(_HERMES_END) :], False, True
            return True
        header = _HEADER.match(text)
        if header is not None and (name := _unquote(header[1])) in self._names:
            self._begin(name, text[header.end() :], _Brackets(1), deltas)
            return True
        if self._kind == "mistral" and (header := re.match(r"([\w.-]+)\[ARGS\]\s*(?=\{)", text)):
            if header[1] in self._names:
                self._begin(header[1], text[header.end() :], None, deltas)
                return True
        elif self._may_become_call(text):
            return False
        if text.startswith("{"):
            brackets, seen = self._object or (_Brackets(), 0)
            end = brackets.end(text, seen)
            self._object = (brackets, len(text))
            if end is None:
                return False
            self._object = None
            if self._tell(_json_call(text[:end]), deltas):
                self._text = text[end:]
                return True
        self._give_up(start, content)
        return True

    def _may_become_call(self, text: str) -> bool:
        """It is the beginning of something other than an object that belongs to calls."""
        if text in ("", "["):
            return True
        ends = {"hermes": [_HERMES_END], "llama3": ["<|python_tag|>"]}.get(self._kind, [])
        if self._kind == "mistral":
            ends = ["[TOOL_CALLS]", *(f"{name}[ARGS]" for name in self._names)]
        return any(end.startswith(text.rstrip()) for end in ends)

    def _begin(self, name: str, text: str, rest: _Brackets | None, deltas: list[CallDelta]) -> None:
        deltas.append(CallDelta(self._num_calls, name=name))
        self._num_calls += 1
        self._text, self._arguments, self._rest = text, _Brackets(), rest
        self._object = None
        self._is_start = False

    def _read_arguments(self, deltas: list[CallDelta]) -> bool:
        assert self._arguments is not None
        end = self._arguments.end(self._text)
        piece = self._text if end is None else self._text[:end]
        if piece:
            deltas.append(CallDelta(self._num_calls - 1, piece))
        self._text = self._text[len(piece) :]
        if end is None:
            return False
        self._arguments = None
        return True

    def _tell(self, calls: list[tuple[str, str]], deltas: list[CallDelta]) -> bool:
        """False, and nothing told, where one of the tools does not exist."""
        if not calls or any(name not in self._names for name, _ in calls):
            return False
        for name, arguments in calls:
            deltas += [CallDelta(self._num_calls, name=name), CallDelta(self._num_calls, arguments)]
            self._num_calls += 1
        self._is_start = False
        return True

    def _give_up(self, start: int, content: list[str]) -> None:
        """What is next, at `start`, is no call. Another one may follow where calls are marked."""
        end = start if self._kind == "hermes" else len(self._text)
        content.append(self._text[:end])
        self._text, self._inside, self._is_start = self._text[end:], False, False
        if self._kind != "hermes":
            self._kind = "none"


def _unquote(string: str) -> str | None:
    try:
        return json.loads(string)
    except ValueError:
        return None


def _json_call(text: str) -> list[tuple[str, str]]:
    """[(name, arguments as JSON)]; [] where it is no call."""
    try:
        value = json.loads(text)
        arguments = value.get("arguments", value.get("parameters", {}))
        if not isinstance(value["name"], str):
            return []
        return [(value["name"], arguments if isinstance(arguments, str) else json.dumps(arguments))]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []


def _pythonic_calls(text: str) -> list[tuple[str, str]]:
    """[(name, arguments as JSON), ...]; [] where it is no list of calls."""
    calls = []
    try:
        for node in ast.parse(text.strip(), mode="eval").body.elts:  # type: ignore[attr-defined]
            if node.args:  # which of its parameters they are, nobody says
                return []
            arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
            calls.append((node.func.id, json.dumps(arguments)))
    except (ValueError, TypeError, AttributeError, SyntaxError, RecursionError, MemoryError):
        return []
    return calls


def forced_calls_schema(functions: list[dict[str, Any]], parallel: bool) -> dict[str, Any]:
    """Of a list of calls of these functions, for tool_choice "required" or a named one."""
    none = {"type": "object", "additionalProperties": False}
    items = [
        {
            "type": "object",
            "properties": {
                "name": {"const": function["name"]},
                "parameters": moved(
                    function.get("parameters") or none, f"/items/anyOf/{i}/properties/parameters"
                ),
            },
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for i, function in enumerate(functions)
    ]
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": items}}
    return schema if parallel else {**schema, "maxItems": 1}
