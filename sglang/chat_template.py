"""Chat templates: Jinja, with what transformers gives the templates that model makers write."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Generation(Extension):
    """{% generation %}...{% endgeneration %} marks what the assistant said, for training. Here it
    is only let through."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **kwargs: Any) -> str:
    """Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **kwargs)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment


class ChatTemplate:
    def __init__(self, text: str, variables: dict[str, str]) -> None:
        """variables: known to every rendering, such as bos_token. Raises ValueError where the text
        is no template."""
        self._variables = variables
        try:
            self._template = _environment().from_string(text)
        except TemplateSyntaxError as error:
            raise ValueError(f"the chat template, line {error.lineno}: {error.message}") from None

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **kwargs: Any,
    ) -> str:
        """Raises ValueError where the template refuses the messages, or stumbles over them."""
        variables = {**self._variables, "documents": None, **kwargs}
        variables |= {"tools": tools, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(messages=messages, **variables)
        except Exception as error:  # a template computes, and so can fail, with anything
            raise ValueError(f"the chat template refuses these messages: {error}") from None

    def render_unfinished(self, messages: list[dict[str, Any]], **kwargs: Any) -> str:
        """The prompt up to the end of the last message's text, for the model to go on from."""
        last = messages[-1].get("content") if messages else None
        if not isinstance(last, str) or not last.strip():
            raise ValueError("continue_final_message needs a last message with text")
        rendered = self.render(messages, **kwargs)
        # Templates may strip a message: then the space at its end is not to be found.
        text = last.lstrip() if last.lstrip() in rendered else last.strip()
        at = rendered.rfind(text)
        if at < 0:
            raise ValueError("continue_final_message: the chat template changes the last message")
        return rendered[: at + len(text)]
