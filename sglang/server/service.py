"""What the endpoints share: the model's facts, the tokenizer, and the way to the engine."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import TYPE_CHECKING, Any

from sglang.messages import EngineReady, Pooling
from sglang.router.grammar import check_grammar, grammar_kind
from sglang.sampling_params import SamplingParams
from sglang.server.errors import ApiError, bad_value
from sglang.server.limits import NO_LOGPROBS, ContextOverflow, LogprobsWanted
from sglang.server.loop_lag import LoopLag
from sglang.server.request_log import RequestLog
from sglang.server.tokenizer_manager import Generation, TokenizerManager

if TYPE_CHECKING:
    from sglang.model_config import ModelConfig
    from sglang.server_args import ServerArgs
    from sglang.tokenizer import Tokenizer

MAX_SEQUENCES = 2048
"""Of one request: its prompts times n."""
_LONG_TEXT = 4096
"""Characters (and 100 for each text): tokenizing more than this would hold up every stream, so a
thread does it."""
_SURELY_SHORT = 100_000
"""Characters."""

Prompt = str | list[int]


class Service:
    def __init__(
        self,
        args: ServerArgs,
        model: ModelConfig,
        tokenizer: Tokenizer | None,
        manager: TokenizerManager,
        engine: EngineReady,
    ) -> None:
        self.args, self.model, self.tokenizer = args, model, tokenizer
        self.manager, self.engine = manager, engine
        self.created = int(time.time())
        self.lag = LoopLag()
        self.request_log = None
        if args.log_requests:
            self.request_log = RequestLog(args.log_requests_level, tokenizer)
        self.model_names = list(dict.fromkeys([model.name, args.model_path, "default", "", None]))
        """What a request may call the model; the last three: whatever there is. "default" is what
        SGLang's examples say."""
        self.draining = False
        """The server is about to end."""

    def check_model(self, name: str | None) -> None:
        if name not in self.model_names:
            message = f"model {name!r} does not exist; this server has {self.model.name!r}"
            raise ApiError(message, "model", 404, "model_not_found")

    def need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ApiError(
                "this server has no tokenizer (--skip-tokenizer-init): use /generate with input_ids"
            )
        return self.tokenizer

    async def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        return (await self.encode_prompts([text], special_tokens))[0]

    def check_can_fit(self, num_chars: int, least_tokens: int = 0) -> None:
        """Raises an ApiError for what is so long that there is no need to tokenize it. (What a
        tokenizer leaves out before it cuts text into tokens is less than three quarters of it.)"""
        limit = self.model.context_len
        if num_chars > _SURELY_SHORT and self.tokenizer is not None:
            least_tokens = max(least_tokens, num_chars // (4 * self.tokenizer.longest_token))
        if least_tokens > limit:
            message = (
                f"prompt has {least_tokens} tokens or more: the model's maximum context length is "
                f"{limit} tokens"
            )
            raise bad_value(ContextOverflow(message))

    async def encode_prompts(
        self, prompts: list[Prompt], special_tokens: bool = True
    ) -> list[list[int]]:
        """Texts become token ids; what are ids already stays."""
        if len(prompts) > MAX_SEQUENCES:
            raise ApiError(f"prompts x n must be at most {MAX_SEQUENCES}", "n")
        lengths = [len(prompt) for prompt in prompts if isinstance(prompt, str)]
        self.check_can_fit(max(lengths, default=0))
        if not lengths:
            return prompts  # type: ignore[return-value]
        tokenizer = self.need_tokenizer()

        def encode() -> list[list[int]]:
            return [
                tokenizer.encode(prompt, special_tokens) if isinstance(prompt, str) else prompt
                for prompt in prompts
            ]

        if sum(lengths) + 100 * len(lengths) < _LONG_TEXT:
            return encode()
        return await asyncio.to_thread(encode)

    def sampling(self, values: dict[str, Any], names: dict[str, str]) -> SamplingParams:
        """`values` in SGLang's names; `names` says how the client spells them, for errors."""
        try:
            params = SamplingParams.from_dict(values, self.model.default_sampling)
            if grammar_kind(params) is not None:
                self.need_tokenizer()
                check_grammar(params, self.args.grammar_backend)
            return params
        except ValueError as error:
            raise bad_value(error, names) from None

    def _check_queue(self, count: int) -> None:
        queue = self.args.max_queued_requests
        if queue is None:
            return
        if self.manager.num_sequences + count > self.engine.max_running_requests + queue:
            message = f"the queue is full (--max-queued-requests {queue}): try again later"
            raise ApiError(message, status=503, headers={"Retry-After": "1"})

    def generate(
        self,
        rid: str,
        prompts: list[tuple[list[int], SamplingParams]],
        *,
        n: int = 1,
        stream: bool,
        names: dict[str, str],
        logprobs: LogprobsWanted | list[LogprobsWanted] = NO_LOGPROBS,
        pooling: Pooling | None = None,
        rids: list[str] | None = None,
    ) -> Generation:
        """n sequences of each prompt, in order: those of prompt i have indices i*n ... i*n + n-1.
        logprobs, rids: lists are of each prompt.

        Samples of one prompt with a seed have seeds that follow each other.
        """
        if self.draining:
            raise ApiError("the server is shutting down", status=503, headers={"Retry-After": "5"})
        if n < 1 or len(prompts) * n > MAX_SEQUENCES:
            raise ApiError(f"n must be at least 1, and prompts x n at most {MAX_SEQUENCES}", "n")
        self._check_queue(len(prompts) * n)
        if self.tokenizer is None and any(params.stop for _, params in prompts):
            raise ApiError(
                "stop needs a tokenizer (--skip-tokenizer-init); see stop_token_ids", "stop"
            )
        sequences = [(ids, params.of_sample(i)) for ids, params in prompts for i in range(n)]
        each = logprobs if isinstance(logprobs, list) else [logprobs] * len(prompts)
        wanted = [one for one in each for _ in range(n)]
        own = rids and [one for one in rids for _ in range(n)]
        try:
            generation = self.manager.generate(rid, sequences, stream, wanted, pooling, own)
        except ValueError as error:
            raise bad_value(error, names) from None
        if self.args.request_timeout is not None:
            generation.expire_after(self.args.request_timeout)
        if self.request_log is not None:
            self.request_log.received(rid, sequences)
            generation.on_close = self.request_log.ended
        return generation


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"
