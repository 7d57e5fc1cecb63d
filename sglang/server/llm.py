"""Offline inference, on the same router and model workers as the server."""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections.abc import Iterator
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar

import zmq
from tqdm import tqdm

from sglang.addresses import bind_inbox, connect, connect_outbox
from sglang.messages import (
    AbortRequest,
    Decoder,
    EngineReady,
    FlushCache,
    FlushCacheReply,
    GenerateRequest,
    GetStats,
    Message,
    Stats,
    StreamDelta,
    StreamEnd,
    TokenBatch,
    ToTokenizerManager,
    encode,
    unpack,
)
from sglang.model_config import ModelConfig
from sglang.processes import Death, EngineProcesses
from sglang.router.grammar import check_grammar, grammar_kind
from sglang.sampling_params import SamplingParams
from sglang.server.detokenizer import Detokenizer
from sglang.server.limits import Limits
from sglang.server_args import ServerArgs
from sglang.spans import Profile

M = TypeVar("M", bound=Message)
Prompts = str | list[str] | list[int] | list[list[int]]
Sampling = SamplingParams | dict[str, Any] | None
_Wanted = tuple[str, list[int], SamplingParams]
"""(prompt's name in errors, its ids, and of one sample)."""
_POLL_MS = 100
"""How soon a dead process is noticed."""
_SEND_SECONDS = 2e-3
"""Prompts are made ready for so long, then sent together: the router takes them in while the next
ones are made ready, and its first step has more than one."""


class LLM:
    """A model, loaded.

    >>> with LLM(model_path="...") as llm:
    ...     llm.generate(["Once upon a time"], {"temperature": 0, "max_new_tokens": 32})

    Other arguments are those of ServerArgs, the launch flags. Raises ValueError where an argument
    or the model is wrong, RuntimeError where the engine fails. `generate` may be called from
    several threads; the calls take turns.
    """

    def __init__(self, model_path: str | Path = "", **server_args: Any) -> None:
        server_args.setdefault("log_level", "warning")
        args = ServerArgs(model_path=str(model_path), **server_args)
        self.model = ModelConfig.load(args)
        self._grammar_backend = args.grammar_backend
        self._failure = _Failure(args.log_level)
        processes = EngineProcesses(args, self.model, self._failure, detokenizer=False)
        context = zmq.Context()
        self._pids = processes.pids
        self._stop = weakref.finalize(self, _stop, processes, context)
        self._num_workers = args.tp_size
        try:
            addresses = processes.addresses
            self._profile = Profile(addresses.folder)
            self._router = connect_outbox(context, addresses.router)
            self._answers = bind_inbox(context, addresses.tokenizer_manager)
            self._answers.rcvtimeo = _POLL_MS
            self._decode_tokens = Decoder(TokenBatch).decode
            self._decode_answer = Decoder(ToTokenizerManager).decode
            processes.start()
            self.tokenizer = None
            if not args.skip_tokenizer_init:
                from sglang.tokenizer import Tokenizer

                self.tokenizer = Tokenizer.load(self.model, args)
            self._detokenizer = Detokenizer(self.tokenizer, lazy=True)
            self._handles = itertools.count(1)
            self._lock = threading.Lock()
            self.engine = self._answer(EngineReady)
            self._tokens = connect(addresses.detokenizer)
            self._tokens.spins = self.model.device == "cuda"
        except BaseException:
            self._stop()
            raise
        self._limits = Limits(
            self.model.vocab_size, self.engine.context_len, self.engine.max_total_tokens
        )
        self._failure.is_ready = True

    def generate(
        self,
        prompts: Prompts,
        sampling_params: Sampling | list[Sampling] = None,
        use_tqdm: bool = True,
    ) -> list[dict[str, Any]]:
        """One reply a prompt, in their order; n of them next to each other, where a dict of
        sampling_params holds "n":

            {"text": str, "output_ids": list[int], "meta_info": {"prompt_tokens": int,
             "completion_tokens": int, "cached_tokens": int, "finish_reason": {"type": ..., ...}}}

        There is no text with skip_tokenizer_init. sampling_params: one for all, or one for each.
        Raises ValueError naming the prompt and the field at fault; the other prompts are aborted.
        """
        all_ids = self._encode(prompts)
        samples = self._sampling(sampling_params, len(all_ids))
        wanted = [
            (f"prompts[{i}]", ids, params) for i, ids in enumerate(all_ids) for params in samples[i]
        ]
        with self._lock:
            self._check_alive()
            return self._run(wanted, use_tqdm)

    def _run(self, wanted: list[_Wanted], use_tqdm: bool) -> list[dict[str, Any]]:
        replies: dict[int, _Reply] = {}
        waiting = len(wanted)
        bar = tqdm(total=waiting, desc="generate", unit="req") if use_tqdm else None
        try:
            frames: list[bytes] = []
            end = time.perf_counter() + _SEND_SECONDS
            for request in self._requests(wanted):
                replies[request.handle] = _Reply()
                frames.append(encode(request))
                if time.perf_counter() > end:
                    self._send(frames)
                    end = time.perf_counter() + _SEND_SECONDS
            self._send(frames)
            while waiting:
                ended = 0
                for delta in self._deltas():
                    reply = replies.get(delta.handle)
                    if reply is not None:  # else of a call that was interrupted
                        reply.add(delta)
                        ended += delta.end is not None
                if ended:
                    waiting -= ended
                    if bar is not None:
                        bar.update(ended)
        except BaseException:
            if replies:
                self._router.send(encode(AbortRequest(list(replies))))
            raise
        finally:
            if bar is not None:
                bar.close()
        return [reply.result(self.tokenizer is not None) for reply in replies.values()]

    def flush_cache(self) -> None:
        """Forgets every cached prefix."""
        with self._lock:
            self._check_alive()
            while True:  # the last requests may keep their seats for a step or two more
                self._router.send(encode(FlushCache()))
                if self._answer(FlushCacheReply).ok:
                    return
                time.sleep(0.005)

    def stats(self) -> Stats:
        with self._lock:
            self._check_alive()
            self._router.send(encode(GetStats()))
            return self._answer(Stats)

    def start_profile(self) -> None:
        """Raises ValueError if one is being taken."""
        with self._lock:
            self._check_alive()
            self._router.send(encode(self._profile.start()))

    def stop_profile(self, path: str = ".") -> str:
        """Writes what was done since `start_profile`, for https://ui.perfetto.dev, into this file,
        or into a new one in this folder; returns its path. Raises OSError if it cannot be."""
        with self._lock:
            self._check_alive()
            self._router.send(encode(self._profile.stop()))
            while not self._profile.is_written(self._num_workers):
                self._failure.check()
                time.sleep(0.02)
            return str(self._profile.join(Path(path)))

    def pids(self) -> dict[str, int]:
        """Of the engine's processes, by name."""
        return self._pids()

    def shutdown(self) -> None:
        """Ends the processes. So does the end of the script, or of the last reference to this."""
        self._stop()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()

    # --- requests ----------------------------------------------------------------------------

    def _encode(self, prompts: Prompts) -> list[list[int]]:
        prompts = _as_list(prompts)
        if isinstance(prompts, str) or _may_be_ids(prompts):
            return [self._encode_one("prompts", prompts)]
        if isinstance(prompts, bytes | dict):
            raise ValueError(_NO_PROMPT.format("prompts"))
        return [self._encode_one(f"prompts[{i}]", prompt) for i, prompt in enumerate(prompts)]

    def _encode_one(self, name: str, prompt: Any) -> list[int]:
        prompt = _as_list(prompt)
        if not isinstance(prompt, str):
            if prompt != [] and not _may_be_ids(prompt):
                raise ValueError(_NO_PROMPT.format(name))
            return prompt
        if self.tokenizer is None:
            raise ValueError(f"{name} must be token ids: there is no tokenizer")
        return self.tokenizer.encode(prompt)

    def _sampling(self, given: Sampling | list[Sampling], count: int) -> list[list[SamplingParams]]:
        """Of each prompt those of its samples."""
        if not isinstance(given, list | tuple):
            return [self._samples(given)] * count
        if len(given) != count:
            raise ValueError(f"sampling_params has {len(given)} entries for {count} prompts")
        return [self._samples(one) for one in given]

    def _samples(self, given: Sampling) -> list[SamplingParams]:
        n = None
        if isinstance(given, dict):
            given = dict(given)
            n = given.pop("n", None)
        n = 1 if n is None else n
        if not isinstance(n, int) or n < 1:
            raise ValueError(f"n must be an integer >= 1, got {n!r}")
        params = self._one_sampling(given)
        return [params.of_sample(i) for i in range(n)]

    def _one_sampling(self, given: Sampling) -> SamplingParams:
        if not isinstance(given, SamplingParams):
            given = SamplingParams.from_dict(given or {}, self.model.default_sampling)
        if given.stop and self.tokenizer is None:
            raise ValueError("stop needs a tokenizer; see stop_token_ids")
        check_grammar(given, self._grammar_backend)
        if grammar_kind(given) is not None and self.tokenizer is None:
            raise ValueError(f"{grammar_kind(given)} needs a tokenizer")
        return given

    def _send(self, frames: list[bytes]) -> None:
        for frame in frames:
            self._router.send(frame)
        frames.clear()

    def _requests(self, wanted: list[_Wanted]) -> Iterator[GenerateRequest]:
        for name, ids, params in wanted:
            try:
                yield self._limits.request(next(self._handles) & 0x7FFFFFFF, ids, params)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None

    # --- replies -----------------------------------------------------------------------------

    def _deltas(self) -> list[StreamDelta]:
        """What one step brought. With no reader of single tokens, mostly the ends of requests."""
        deltas, stopped = self._detokenizer.step(self._decode_tokens(self._receive()))
        if stopped:
            self._router.send(encode(AbortRequest(stopped, silent=True)))
        return deltas

    def _answer(self, kind: type[M]) -> M:
        while True:
            try:
                answer = self._decode_answer(self._answers.recv())
            except zmq.Again:
                self._failure.check()
            else:
                assert isinstance(answer, kind)
                return answer

    def _receive(self) -> bytes:
        while True:
            self._check_alive()
            try:
                if self._tokens.poll(_POLL_MS / 1e3):
                    return self._tokens.recv_bytes()
            except EOFError:  # the supervisor is about to say why
                time.sleep(0.01)

    def _check_alive(self) -> None:
        if not self._stop.alive:
            raise RuntimeError("this LLM has been shut down")
        self._failure.check()


_NO_PROMPT = "{} must be a text or a list of token ids"


def _as_list(prompt: Any) -> Any:
    """numpy's and torch's ids, too."""
    return prompt.tolist() if hasattr(prompt, "tolist") else prompt


def _may_be_ids(prompt: Any) -> bool:
    """By the first; `Limits` looks at all."""
    if not isinstance(prompt, list | tuple) or not prompt:
        return False
    return isinstance(prompt[0], Integral) and not isinstance(prompt[0], bool)


class _Reply:
    """One sequence's deltas."""

    def __init__(self) -> None:
        self.text = ""
        self.ids = b""
        self.end: StreamEnd | None = None

    def add(self, delta: StreamDelta) -> None:
        self.text += delta.text
        self.ids += delta.token_ids
        self.end = delta.end

    def result(self, has_text: bool) -> dict[str, Any]:
        end = self.end
        assert end is not None
        meta = {
            "prompt_tokens": end.prompt_tokens,
            "completion_tokens": end.completion_tokens,
            "cached_tokens": end.cached_tokens,
            "finish_reason": end.finish_reason(),
        }
        text = {"text": self.text} if has_text else {}
        return {**text, "output_ids": unpack(self.ids).tolist(), "meta_info": meta}


class _Failure:
    """Called, on the supervisor's thread, when a process has died."""

    def __init__(self, log_level: str) -> None:
        self.is_ready = False
        self._log_level = log_level
        self._death: Death | None = None

    def __call__(self, death: Death) -> None:
        death.print_traceback(self.is_ready, self._log_level)
        self._death = death

    def check(self) -> None:
        if self._death is not None:
            raise RuntimeError(self._death.message)


def _stop(processes: EngineProcesses, context: zmq.Context) -> None:
    processes.stop()
    context.destroy(linger=0)
