"""POST /v1/chat/completions."""

from __future__ import annotations

import json
import time
from typing import Any

from fastapi import APIRouter, Response

from sglang.server.errors import ApiError
from sglang.server.limits import LogprobsWanted
from sglang.server.openai import writing
from sglang.server.openai.logprobs import chat_logprobs
from sglang.server.openai.reasoning import ReasoningSplitter
from sglang.server.openai.replies import ChatCompletion, ChatCompletionChunk
from sglang.server.openai.schemas import ChatMessage, ChatRequest
from sglang.server.openai.tool_calls import CallDelta, ToolParser, whole_calls
from sglang.server.openai.writing import dumps
from sglang.server.openapi import generates
from sglang.server.responses import DONE, GenerationResponse
from sglang.server.service import Service, new_id
from sglang.server.tokenizer_manager import Generation, Sequence
from sglang.tokenizer import Tokenizer


class _Parsing:
    """One sequence's text, split into reasoning, content and tool calls."""

    def __init__(
        self,
        splitter: ReasoningSplitter | None,
        parser: ToolParser | None,
        max_calls: int | None,
    ) -> None:
        """max_calls: those beyond are not told."""
        self._splitter, self._parser, self._max_calls = splitter, parser, max_calls
        self.has_called = False

    def push(self, text: str, is_last: bool) -> tuple[str, str, list[CallDelta]]:
        """(reasoning, content, pieces of calls) that are new."""
        reasoning: str = ""
        calls: list[CallDelta] = []
        if self._splitter is not None:
            reasoning, text = self._splitter.push(text)
            if is_last:
                more = self._splitter.finish()
                reasoning, text = reasoning + more[0], text + more[1]
        if self._parser is not None:
            text, calls = self._parser.push(text)
            if is_last:
                more_text, more_calls = self._parser.finish()
                text, calls = text + more_text, calls + more_calls
        if self._max_calls is not None:
            calls = [call for call in calls if call.index < self._max_calls]
        self.has_called = self.has_called or bool(calls)
        return reasoning, text, calls


class ChatWriter:
    def __init__(
        self,
        request: ChatRequest,
        generation: Generation,
        model: str,
        tokenizer: Tokenizer,
        reasoning_parser: str | None,
        tool_call_parser: str | None,
        call_ids: str,
    ) -> None:
        """The parsers: None where nothing is to be parsed. call_ids: for which one."""
        self._parsing: list[_Parsing] = []
        self._call_ids = call_ids
        if reasoning_parser or tool_call_parser:
            names = {tool.function.name for tool in request.tools or []}
            self._parsing = [
                _Parsing(
                    ReasoningSplitter(reasoning_parser == "deepseek-r1")
                    if reasoning_parser
                    else None,
                    ToolParser(tool_call_parser, names) if tool_call_parser else None,
                    1 if request.parallel_tool_calls is False else None,
                )
                for _ in generation.sequences
            ]
        self._generation, self._n, self._tokenizer = generation, request.n or 1, tokenizer
        self._wants_logprobs = bool(request.logprobs)
        self._keeps_stop = bool(request.no_stop_trim)
        self._wants_usage = request.include_usage
        self._head = {
            "id": generation.rid,
            "object": "chat.completion.chunk" if request.stream else "chat.completion",
            "created": int(time.time()),
            "model": model,
        }
        self._frames = [
            writing.frame(self._chunk(sequence, {"content": "\0"}))
            for sequence in (generation.sequences if request.stream else [])
        ]

    def _chunk(
        self,
        sequence: Sequence,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        **end: Any,
    ) -> dict[str, Any]:
        end = end or {"finish_reason": None}
        choice = {"index": sequence.index, "delta": delta, "logprobs": logprobs, **end}
        usage = {"usage": None} if self._wants_usage else {}
        return {**self._head, "choices": [choice], **usage}

    def _logprobs(self, sequence: Sequence) -> dict[str, Any] | None:
        """Of the tokens since the last call."""
        if not self._wants_logprobs:
            return None
        return chat_logprobs(self._tokenizer, sequence.take_logprobs(self._keeps_stop))

    def opening(self) -> bytes:
        delta = {"role": "assistant", "content": ""}
        return b"".join(writing.event(self._chunk(s, delta)) for s in self._generation.sequences)

    def event(self, sequence: Sequence) -> bytes:
        if self._parsing:
            return self._parsed_event(sequence)
        text = sequence.take_text()
        said = b""
        if self._wants_logprobs:
            scored = sequence.take_logprobs(self._keeps_stop)
            if text or scored:
                logprobs = chat_logprobs(self._tokenizer, scored)
                said = writing.event(self._chunk(sequence, {"content": text}, logprobs))
        elif text:
            before, after = self._frames[sequence.index]
            said = b"".join((before, dumps(text), after))
        if sequence.end is None:
            return said
        return said + writing.event(self._chunk(sequence, {}, **writing.finish(sequence)))

    def _parsed_event(self, sequence: Sequence) -> bytes:
        parsing, is_last = self._parsing[sequence.index], sequence.end is not None
        reasoning, content, calls = parsing.push(sequence.take_text(), is_last)
        deltas: list[dict[str, Any]] = [
            {name: value}
            for name, value in (("reasoning_content", reasoning), ("content", content))
            if value
        ]
        deltas += [{"tool_calls": [call.message(self._call_ids)]} for call in calls]
        logprobs = self._logprobs(sequence)
        if logprobs and logprobs["content"] and not deltas:
            deltas.append({"content": ""})
        said = b""
        for delta in deltas:
            said += writing.event(self._chunk(sequence, delta, logprobs))
            logprobs = None
        return said + (
            writing.event(self._chunk(sequence, {}, **self._end(sequence))) if is_last else b""
        )

    def _end(self, sequence: Sequence) -> dict[str, Any]:
        end = writing.finish(sequence)
        called = self._parsing and self._parsing[sequence.index].has_called
        is_whole = end["finish_reason"] == "stop"
        return {**end, "finish_reason": "tool_calls"} if called and is_whole else end

    def _message(self, sequence: Sequence) -> dict[str, Any]:
        if not self._parsing:
            return {"role": "assistant", "content": sequence.text}
        reasoning, content, calls = self._parsing[sequence.index].push(sequence.text, True)
        message: dict[str, Any] = {"role": "assistant", "content": content or None}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = whole_calls(calls, self._call_ids)
        else:
            message["content"] = content
        return message

    def closing(self) -> bytes:
        if not self._wants_usage:
            return DONE
        usage = writing.usage(self._generation, self._n)
        return writing.event({**self._head, "choices": [], "usage": usage}) + DONE

    def whole(self) -> bytes:
        choices = [
            {
                "index": sequence.index,
                "message": self._message(sequence),
                "logprobs": self._logprobs(sequence),
                **self._end(sequence),
            }
            for sequence in self._generation.sequences
        ]
        usage = writing.usage(self._generation, self._n)
        return dumps({**self._head, "choices": choices, "usage": usage})


def _for_template(index: int, message: ChatMessage) -> dict[str, Any]:
    """As chat templates want it: the content one string, the role one that templates know."""
    values = message.model_dump(exclude_none=True)
    if isinstance(message.content, list):
        values["content"] = "".join(_part_text(index, part) for part in message.content)
    elif message.content is None and message.role != "assistant":
        raise ApiError(f"messages[{index}].content must not be null", "messages")
    refusal = values.get("refusal")
    values.setdefault("content", refusal if isinstance(refusal, str) else "")
    if values.get("tool_calls"):
        values["tool_calls"] = [_with_parsed_arguments(call) for call in values["tool_calls"]]
    if message.role == "developer":
        values["role"] = "system"
    return values


def _with_parsed_arguments(call: Any) -> Any:
    """Templates write arguments as JSON themselves."""
    try:
        function = call["function"]
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    except (ValueError, TypeError, KeyError, RecursionError):
        return call


def _part_text(index: int, part: dict[str, Any]) -> str:
    """A refusal is text, too, of an assistant."""
    kind = part.get("type")
    if kind not in ("text", "refusal") or not isinstance(part.get(kind), str):
        message = (
            f'messages[{index}].content: only parts {{"type": "text", "text": ...}} are supported'
        )
        raise ApiError(message, "messages")
    return part[kind]


_OF_THE_REQUEST = {"messages", "tools", "add_generation_prompt", "continue_final_message"}


def _render(service: Service, request: ChatRequest) -> str:
    messages = [_for_template(i, message) for i, message in enumerate(request.messages)]
    continues = bool(request.continue_final_message)
    if continues and messages[-1]["role"] != "assistant":
        message = "continue_final_message wants a last message from the assistant"
        raise ApiError(message, "continue_final_message")
    own = sorted(_OF_THE_REQUEST & set(request.chat_template_kwargs or {}))
    if own:
        message = f"chat_template_kwargs must not hold {own[0]}, which the request has itself"
        raise ApiError(message, "chat_template_kwargs")
    chars = sum(len(message["content"]) for message in messages)
    service.check_can_fit(chars, least_tokens=len(messages))
    try:
        prompt = service.need_tokenizer().render_chat(
            messages,
            tools=[tool.model_dump(exclude_none=True) for tool in request.usable_tools] or None,
            add_generation_prompt=not continues and request.add_generation_prompt is not False,
            continue_final_message=continues,
            **(request.chat_template_kwargs or {}),
        )
        prompt.encode()
    except UnicodeEncodeError:
        raise ApiError(
            "messages hold half a surrogate pair: no valid Unicode", "messages"
        ) from None
    except (ValueError, TypeError) as error:
        raise ApiError(f"messages: the chat template refuses them: {error}", "messages") from None
    return prompt


def chat_router(service: Service) -> APIRouter:
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/chat/completions", responses=generates(ChatCompletion, ChatCompletionChunk))
    async def chat_completions(request: ChatRequest) -> Response:
        """Answers the last message of a conversation."""
        request.refuse_unsupported()
        service.check_model(request.model)
        # The template writes the special tokens that it wants.
        ids = await service.encode(_render(service, request), special_tokens=False)
        wanted = request.max_completion_tokens
        limit_name = "max_tokens" if wanted is None else "max_completion_tokens"
        wanted = request.max_tokens if wanted is None else wanted
        names = {
            "max_new_tokens": limit_name,
            "min_new_tokens": "min_tokens",
            "prompt": "messages",
        }
        if request.response_format is not None:
            names["json_schema"] = "response_format"
        values = request.sampling(wanted)
        reads_calls = None
        if request.usable_tools:
            reads_calls = "json" if request.forces_call else service.args.tool_call_parser
            names["json_schema"] = "tools" if request.forces_call else "response_format"
            if reads_calls in ("llama3", "pythonic", "mistral"):
                values["skip_special_tokens"] = False  # they mark calls
        params = service.sampling(values, names)
        with service.generate(
            request.rid or new_id("chatcmpl"),
            [(ids, params)],
            n=request.n or 1,
            stream=bool(request.stream),
            names=names,
            logprobs=LogprobsWanted(request.top_logprobs or 0 if request.logprobs else -1),
        ) as generation:
            grammar = params.regex or params.ebnf or "</think>"
            may_think = params.json_schema is None and "</think>" in grammar
            wants_apart = may_think and request.separate_reasoning is not False
            reasoning = service.args.reasoning_parser if wants_apart else None
            writer = ChatWriter(
                request,
                generation,
                service.model.name,
                service.need_tokenizer(),
                reasoning,
                reads_calls,
                service.args.tool_call_parser,
            )
            return GenerationResponse(generation, writer, bool(request.stream))

    return router
