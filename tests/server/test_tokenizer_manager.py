"""The tokenizer manager, over real sockets: the tests are the router and the detokenizer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
import zmq

from sglang.addresses import Addresses, bind_inbox, connect_outbox
from sglang.messages import (
    AbortRequest,
    Decoder,
    EngineReady,
    GenerateRequest,
    StreamDelta,
    StreamEnd,
    TextBatch,
    ToRouter,
    encode,
    pack,
    unpack,
)
from sglang.sampling_params import SamplingParams
from sglang.server.limits import Limits
from sglang.server.tokenizer_manager import GenerationClosed, TokenizerManager

END = StreamEnd("length", None, 2, 3, 0)


class Engine:
    """The other side."""

    def __init__(self, addresses: Addresses) -> None:
        self.context = zmq.Context()
        self.inbox = bind_inbox(self.context, addresses.router)
        self.outbox = connect_outbox(self.context, addresses.tokenizer_manager)
        self.decoder = Decoder(ToRouter)

    def receive(self) -> object:
        assert self.inbox.poll(2000), "no message came"
        return self.decoder.decode(self.inbox.recv())

    def say(self, *deltas: tuple[int, str, bool]) -> None:
        batch = [StreamDelta(h, text, pack([1]), END if ends else None) for h, text, ends in deltas]
        self.outbox.send(encode(TextBatch(batch)))


@pytest.fixture
def with_manager(tmp_path):
    """Runs an async function with a ready TokenizerManager and its Engine."""

    def run(body: Callable[[TokenizerManager, Engine], Awaitable[None]]) -> None:
        async def main() -> None:
            addresses = Addresses(str(tmp_path))
            engine = Engine(addresses)
            manager = TokenizerManager(addresses, vocab_size=100)
            engine.outbox.send(encode(EngineReady(50, 8, 40)))
            assert (await asyncio.wait_for(manager.ready(), 5)).context_len == 40
            try:
                await asyncio.wait_for(body(manager, engine), 20)
            finally:
                manager.close()
                engine.context.destroy(linger=0)

        asyncio.run(main())

    return run


def prompts(count: int) -> list[tuple[list[int], SamplingParams]]:
    return [([1, 2], SamplingParams(max_new_tokens=3)) for _ in range(count)]


async def settle() -> None:
    await asyncio.sleep(0.1)


def test_a_slow_reader_finds_all_that_was_said_in_one_piece(with_manager):
    async def body(manager: TokenizerManager, engine: Engine) -> None:
        generation = manager.generate("r", prompts(2), wants_deltas=True)
        first, second = (engine.receive(), engine.receive())
        assert isinstance(first, GenerateRequest) and unpack(first.input_ids).tolist() == [1, 2]
        engine.say((first.handle, "a", False), (second.handle, "x", False))
        engine.say((first.handle, "b", False))
        engine.say((first.handle, "c", True))
        await settle()
        news = await generation.news()
        assert [(s.index, s.take_text(), len(s.ids) // 4) for s in news] == [
            (0, "abc", 3),
            (1, "x", 1),
        ]
        assert generation.is_open, "the second goes on"
        engine.say((second.handle, "y", True))
        news = await generation.news()
        assert [s.take_text() for s in news] == ["y"] and not generation.is_open

    with_manager(body)


def test_a_reader_of_whole_replies_is_woken_once_at_the_end(with_manager):
    async def body(manager: TokenizerManager, engine: Engine) -> None:
        generation = manager.generate("r", prompts(2), wants_deltas=False)
        handles = [engine.receive().handle for _ in range(2)]
        waiting = asyncio.ensure_future(generation.finished())
        engine.say((handles[0], "a", True), (handles[1], "b", False))
        await settle()
        assert not waiting.done()
        engine.say((handles[1], "c", True))
        await waiting
        assert [s.text for s in generation.sequences] == ["a", "bc"]

    with_manager(body)


def test_closing_aborts_what_still_runs_and_wakes_the_reader(with_manager):
    async def body(manager: TokenizerManager, engine: Engine) -> None:
        generation = manager.generate("r", prompts(3), wants_deltas=False)
        handles = [engine.receive().handle for _ in range(3)]
        waiting = asyncio.ensure_future(generation.finished())
        engine.say((handles[1], "done", True))
        await settle()
        generation.close()
        with pytest.raises(GenerationClosed):
            await waiting
        abort = engine.receive()
        assert isinstance(abort, AbortRequest)
        assert abort.handles == [handles[0], handles[2]] and not abort.silent
        engine.say((handles[0], "late", True))  # nobody is there for it
        await settle()
        generation.close()
        assert not engine.inbox.poll(50), "it is aborted once"
        assert manager.num_generations == 0

    with_manager(body)


def test_nothing_is_sent_of_a_request_of_which_one_prompt_is_wrong(with_manager):
    async def body(manager: TokenizerManager, engine: Engine) -> None:
        for wrong, part in (
            (([], SamplingParams()), "prompt must not be empty"),
            (([100], SamplingParams()), r"\[0, 100\), got 100"),
            (([1], SamplingParams(max_new_tokens=40)), "maximum context length is 40 tokens"),
            (([1], SamplingParams(top_p=0)), "top_p"),
        ):
            with pytest.raises(ValueError, match=part):
                manager.generate("r", [*prompts(1), wrong], wants_deltas=True)
        assert not engine.inbox.poll(50)
        assert manager.num_generations == 0

    with_manager(body)


def test_a_limit_that_is_not_given_is_what_fits_and_the_callers_parameters_stay(with_manager):
    async def body(manager: TokenizerManager, engine: Engine) -> None:
        params = SamplingParams(max_new_tokens=None)
        manager.generate("r", [([1] * 5, params), ([1] * 39, params)], wants_deltas=True)
        assert [engine.receive().params.max_new_tokens for _ in range(2)] == [35, 1]
        assert params.max_new_tokens is None

    with_manager(body)


def test_a_limit_that_is_left_out_is_sglangs_or_what_fits():
    limits = Limits(vocab_size=100, context_len=400, max_total_tokens=1000)

    def limit(length: int, **params: object) -> int:
        request = limits.request(1, [1] * length, SamplingParams.from_dict(params))
        return request.params.max_new_tokens

    assert limit(5) == 128 and limit(390) == 10
    assert limit(5, min_new_tokens=200) == 200
    assert limit(5, max_new_tokens=None) == 395
    with pytest.raises(ValueError, match="leaves no room"):
        limit(400)
    with pytest.raises(ValueError, match="max_new_tokens is 128"):
        limit(390, max_new_tokens=128)


def test_a_burst_larger_than_any_buffer_is_read_to_its_end(with_manager):
    """ZeroMQ's descriptor signals once for many messages."""

    async def body(manager: TokenizerManager, engine: Engine) -> None:
        generation = manager.generate("r", prompts(1), wants_deltas=False)
        handle = engine.receive().handle
        for i in range(20_000):
            engine.say((handle, "x", i == 19_999))
        await generation.finished()
        assert len(generation.sequences[0].text) == 20_000

    with_manager(body)
