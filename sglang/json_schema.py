"""JSON schemas, changed before a grammar is made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_VALUES = ("const", "default", "enum", "examples")
"""Keywords with values in them, not schemas."""
_BY_NAME = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")
"""Keywords with schemas by any names, keywords' too."""
_FORMATS = (
    "date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid"
)  # fmt: skip
"""Which a grammar can follow."""


def without_other_formats(schema: Any) -> Any:
    """What is no known format of a string only annotates it, says the standard."""
    return _changed(
        schema, lambda name, text: text if name != "format" or text in _FORMATS else None
    )


def moved(schema: Any, to: str) -> Any:
    """The same inside of another one, at the JSON pointer `to`: its references are from there."""
    return _changed(
        schema,
        lambda name, text: f"#{to}{text[1:]}" if name == "$ref" and text.startswith("#") else text,
    )


def _changed(schema: Any, change: Callable[[str, str], str | None]) -> Any:
    """A copy, with what `change` makes of each keyword and its text; None: the keyword goes."""
    if isinstance(schema, list):
        return [_changed(item, change) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {}
    for name, value in schema.items():
        if name in _VALUES:
            made[name] = value
        elif name in _BY_NAME and isinstance(value, dict):
            made[name] = {key: _changed(item, change) for key, item in value.items()}
        elif not isinstance(value, str):
            made[name] = _changed(value, change)
        elif (text := change(name, value)) is not None:
            made[name] = text
    return made
