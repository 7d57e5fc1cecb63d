"""OpenAI's replies, as /openapi.json describes them. What is sent is written by the endpoints
themselves (no pydantic on the token path), and tested against this."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

FinishReason = Literal["stop", "length", "tool_calls", "abort"]


class CachedTokens(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    """Each prompt once, however many samples it has."""
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class _Choice(BaseModel):
    index: int
    finish_reason: FinishReason | None
    """null while the sequence goes on."""
    matched_stop: int | str | None = None
    """The stop string or token that ended it."""


class _Reply(BaseModel):
    id: str
    created: int
    model: str


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    """null: of a prompt's first token."""
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(_Choice):
    text: str
    logprobs: CompletionLogprobs | None


class Completion(_Reply):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(_Reply):
    """An event of a stream."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None


class CalledFunction(BaseModel):
    name: str
    arguments: str
    """JSON, as the model wrote it."""


class ToolCall(BaseModel):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(_Choice):
    message: AssistantMessage
    logprobs: ChatLogprobs | None


class ChatCompletion(_Reply):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class FunctionDelta(BaseModel):
    name: str | None = None
    arguments: str


class ToolCallDelta(BaseModel):
    """`id`, `type` and the name are in the first one of each call."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class MessageDelta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(_Choice):
    delta: MessageDelta
    logprobs: ChatLogprobs | None


class ChatCompletionChunk(_Reply):
    """An event of a stream."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class EmbeddingData(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str
    """str: base64 of little-endian float32."""


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    object: Literal["list"]
    data: list[EmbeddingData]
    model: str
    usage: EmbeddingUsage


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "sglang"
    root: str
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Error(BaseModel):
    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    """The field at fault."""
    code: str | None


class ErrorReply(BaseModel):
    error: Error


class MetaInfo(BaseModel):
    id: str
    finish_reason: dict[str, Any] | None
    """null while the sequence goes on."""
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    e2e_latency: float | None = Field(None, description="Seconds; at the end.")
    input_token_logprobs: list[list[Any]] | None = None
    """[logprob, token id, text] each."""
    input_top_logprobs: list[list[list[Any]] | None] | None = None
    output_token_logprobs: list[list[Any]] | None = None
    output_top_logprobs: list[list[list[Any]] | None] | None = None


class Generated(BaseModel):
    text: str | None = Field(None, description="Left out where the server has no tokenizer.")
    output_ids: list[int]
    meta_info: MetaInfo
    index: int | None = Field(None, description="In a stream of several sequences.")
