"""OpenAI's requests, with the extras that SGLang and vLLM clients send.

Unknown fields are ignored, as other servers do; those that name a feature which is missing here are
refused. A field of the wrong type is an error: nothing is converted.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema

from sglang.messages import Pooling
from sglang.sampling_params import MAX_STOP_STRINGS, MAX_TOP_LOGPROBS
from sglang.server.errors import ApiError
from sglang.server.openai.tool_calls import forced_calls_schema

_UNSUPPORTED = "Not supported: refused unless null."
Unsupported = Annotated[
    Any, Field(description=_UNSUPPORTED), WithJsonSchema({"enum": [None, False, []]})
]


def check_unicode(text: str) -> str:
    """JSON can spell half a surrogate pair, which is no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode: it holds half a surrogate pair") from None
    return text


Text = Annotated[str, AfterValidator(check_unicode)]
LIMITS: dict[str, dict[str, Any]] = {
    "max_tokens": {"minimum": 0},
    "max_completion_tokens": {"minimum": 0},
    "max_new_tokens": {"minimum": 0},
    "min_tokens": {"minimum": 0},
    "min_new_tokens": {"minimum": 0},
    "temperature": {"minimum": 0},
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"minimum": -1},
    "min_p": {"minimum": 0, "maximum": 1},
    "frequency_penalty": {"minimum": -2, "maximum": 2},
    "presence_penalty": {"minimum": -2, "maximum": 2},
    "repetition_penalty": {"exclusiveMinimum": 0, "maximum": 2},
    "seed": {"minimum": -(2**63), "maximum": 2**63 - 1},
    "n": {"minimum": 1},
}
"""For readers of the OpenAPI schema: SamplingParams checks them, and says more in its errors."""

TOKEN_ID = {"type": "integer", "format": "token-id"}
MODEL_NAME = {"type": ["string", "null"], "format": "model-name"}
"""Formats that openapi.py replaces by what this server has."""

TokenIds = list[Annotated[int, WithJsonSchema(TOKEN_ID)]]
ModelName = Annotated[str | None, WithJsonSchema(MODEL_NAME)]
BIASES = {
    "type": "object",
    "propertyNames": {"pattern": "^[0-9]{1,4}$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
}
STOPS = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {
            "type": "array",
            "items": {"type": "string", "minLength": 1},
            "maxItems": MAX_STOP_STRINGS,
        },
        {"type": "null"},
    ]
}


def within(name: str) -> Any:
    """A field that may be left out, with its limits."""
    return Field(None, json_schema_extra=LIMITS[name])


def refuse_unsupported(body: BaseModel) -> None:
    """Raises ApiError naming the field."""
    for name, field in type(body).model_fields.items():
        if field.description == _UNSUPPORTED:
            value = getattr(body, name)
            if value is not None and value is not False and value not in ([], ""):
                raise ApiError(f"{name} is not supported by this server", name)


def parse_prompts(value: Any) -> list[str | list[int]]:
    """One prompt or several, as texts or as token ids -> a list of prompts."""
    wrong = "must be a string, a list of strings, a list of token ids or a list of such lists"
    if isinstance(value, str):
        prompts: list[str | list[int]] = [value]
    elif not isinstance(value, list):
        raise ValueError(wrong)
    elif value and all(type(item) is int for item in value):
        prompts = [value]
    elif all(isinstance(item, str) for item in value) or all(
        isinstance(item, list) and all(type(token) is int for token in item) for item in value
    ):
        prompts = value
    else:
        raise ValueError(wrong)
    if not prompts or not all(prompts):
        raise ValueError("must not be empty")
    for prompt in prompts:
        if isinstance(prompt, str) and not prompt.isascii():
            check_unicode(prompt)
    return prompts


_TEXT = {"type": "string", "minLength": 1}
_TOKENS = {"type": "array", "items": TOKEN_ID, "minItems": 1}
TEXTS = {"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "minItems": 1}]}
TOKEN_LISTS = {"anyOf": [_TOKENS, {"type": "array", "items": _TOKENS, "minItems": 1}]}
_EITHER = {"anyOf": TEXTS["anyOf"] + TOKEN_LISTS["anyOf"]}
Prompts = Annotated[Any, PlainValidator(parse_prompts), WithJsonSchema(_EITHER)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = False


class JsonSchema(BaseModel):
    model_config = ConfigDict(strict=True, protected_namespaces=())

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def schema_text(self) -> dict[str, Any] | None:
        """The schema that the reply must satisfy. A schema that is not `strict` is obeyed too."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return {"type": "object"}
        if self.json_schema is None or self.json_schema.schema_ is None:
            message = "response_format of type json_schema needs json_schema.schema"
            raise ApiError(message, "response_format")
        return self.json_schema.schema_


class _Sampling(BaseModel):
    """What both endpoints take. None: the model's default."""

    model_config = ConfigDict(strict=True, protected_namespaces=())

    model: ModelName = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: int | None = Field(1, ge=1, le=128)
    max_tokens: int | None = within("max_tokens")
    temperature: float | None = within("temperature")
    top_p: float | None = within("top_p")
    frequency_penalty: float | None = within("frequency_penalty")
    presence_penalty: float | None = within("presence_penalty")
    seed: int | None = within("seed")
    stop: Annotated[str | list[str] | None, WithJsonSchema(STOPS)] = None
    logit_bias: Annotated[
        dict[str, float] | None, WithJsonSchema({"anyOf": [BIASES, {"type": "null"}]})
    ] = None
    # SGLang's and vLLM's
    top_k: int | None = within("top_k")
    min_p: float | None = within("min_p")
    repetition_penalty: float | None = within("repetition_penalty")
    min_tokens: int | None = within("min_tokens")
    ignore_eos: bool | None = None
    stop_token_ids: TokenIds | None = None
    skip_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    rid: Text | None = None

    regex: str | None = None
    ebnf: str | None = None
    json_schema: str | dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    response_format: ResponseFormat | None = None

    structured_outputs: Unsupported = None
    structural_tag: Unsupported = None
    lora_path: Unsupported = None
    use_beam_search: Unsupported = None
    bad_words: Unsupported = None
    allowed_token_ids: Unsupported = None
    truncate_prompt_tokens: Unsupported = None
    include_stop_str_in_output: Unsupported = None
    prompt_logprobs: Unsupported = None

    def refuse_unsupported(self) -> None:
        refuse_unsupported(self)
        if self.stream_options is not None and not self.stream:
            raise ApiError("stream_options is only allowed with stream", "stream_options")
        if self.response_format is not None and self.response_format.schema_text() is not None:
            given = [name for name, value in self._grammar().items() if value is not None]
            if given:
                message = f"response_format cannot be combined with {given[0]}"
                raise ApiError(message, "response_format")

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, max_new_tokens: int | None) -> dict[str, Any]:
        """In SGLang's names."""
        return {
            "max_new_tokens": max_new_tokens,
            "min_new_tokens": self.min_tokens,
            **self.grammar(),
            **{name: getattr(self, name) for name in _SAME_NAME},
        }

    def grammar(self) -> dict[str, Any]:
        given = self._grammar()
        if self.response_format is not None and given["json_schema"] is None:
            given["json_schema"] = self.response_format.schema_text()
        return given

    def _grammar(self) -> dict[str, Any]:
        """Without response_format. vLLM's names for the three come to the same."""
        choices = "|".join(re.escape(choice) for choice in self.guided_choice or ()) or None
        given = {
            "regex": {
                "regex": self.regex, "guided_regex": self.guided_regex, "guided_choice": choices,
            },
            "json_schema": {"json_schema": self.json_schema, "guided_json": self.guided_json},
            "ebnf": {"ebnf": self.ebnf, "guided_grammar": self.guided_grammar},
        }  # fmt: skip
        return {kind: _only_one(names) for kind, names in given.items()}


def _only_one(values: dict[str, Any]) -> Any:
    given = [name for name, value in values.items() if value is not None]
    if len(given) > 1:
        raise ApiError(f"{given[1]} cannot be combined with {given[0]}", given[1])
    return values[given[0]] if given else None


_SAME_NAME = (
    "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty",
    "repetition_penalty", "seed", "stop", "stop_token_ids", "logit_bias", "ignore_eos",
    "skip_special_tokens", "no_stop_trim",
)  # fmt: skip


class CompletionRequest(_Sampling):
    prompt: Prompts
    echo: bool | None = False
    best_of: int | None = Field(None, ge=1, le=128)
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    suffix: Unsupported = None

    @property
    def num_samples(self) -> int:
        """Of each prompt."""
        return self.best_of or self.n or 1

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise ApiError("best_of must be at least n", "best_of")
        if self.best_of is not None and self.best_of > (self.n or 1) and self.stream:
            raise ApiError("best_of cannot be streamed: the best is known at the end", "best_of")


class EmbeddingRequest(BaseModel):
    model_config = ConfigDict(strict=True)

    model: ModelName = None
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)
    """So many values of each vector, scaled anew to length 1."""
    pooling: Pooling | None = None
    """Of which tokens the hidden states count: the last one's, or the mean of all."""
    user: str | None = None


TEXT_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}


class ChatMessage(BaseModel):
    """Other fields (tool_call_id, name, ...) go to the chat template as they are."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        str | list[dict[str, Any]] | None,
        WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": TEXT_PART}]}),
    ] = None
    """null only for the assistant."""
    tool_calls: list[dict[str, Any]] | None = None


class Function(BaseModel):
    model_config = ConfigDict(strict=True)

    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["function"]
    function: Function


class FunctionName(BaseModel):
    name: str


class NamedTool(BaseModel):
    type: Literal["function"]
    function: FunctionName


class ChatRequest(_Sampling):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = within("max_completion_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    separate_reasoning: bool | None = None
    modalities: list[str] | None = None
    # SGLang's and vLLM's
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = False
    chat_template_kwargs: dict[str, Any] | None = None

    chat_template: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None
    audio: Unsupported = None
    web_search_options: Unsupported = None

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if self.forces_call and not self.usable_tools:
            raise ApiError("tool_choice names no tool that is in tools", "tool_choice")
        if self.forces_call and any(value is not None for value in self._grammar().values()):
            raise ApiError("tool_choice cannot be combined with a grammar", "tool_choice")
        if self.top_logprobs and not self.logprobs:
            raise ApiError("top_logprobs needs logprobs to be true", "top_logprobs")
        if self.modalities not in (None, [], ["text"]):
            raise ApiError("modalities other than text are not supported", "modalities")
        if self.add_generation_prompt and self.continue_final_message:
            message = "continue_final_message excludes add_generation_prompt"
            raise ApiError(message, "continue_final_message")

    @property
    def forces_call(self) -> bool:
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def usable_tools(self) -> list[Tool]:
        if self.tool_choice == "none":
            return []
        tools = self.tools or []
        if isinstance(self.tool_choice, NamedTool):
            return [t for t in tools if t.function.name == self.tool_choice.function.name]
        return tools

    def grammar(self) -> dict[str, Any]:
        if not self.forces_call:
            return super().grammar()
        functions = [tool.function.model_dump() for tool in self.usable_tools]
        parallel = self.tool_choice == "required" and self.parallel_tool_calls is not False
        try:
            return {"json_schema": forced_calls_schema(functions, parallel)}
        except RecursionError:
            raise ApiError("tools are nested too deeply", "tools") from None
