"""Starts a server: the engine's processes, then HTTP in this one; and ends it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator

import zmq

from sglang.model_config import ModelConfig
from sglang.processes import Death, EngineProcesses
from sglang.server.request_log import add_request_id
from sglang.server_args import ServerArgs

logger = logging.getLogger("sglang")


def serve(args: ServerArgs) -> int:
    """Runs a server to its end; returns the exit code. A process that dies ends this one at once,
    with code 1."""
    started = time.monotonic()
    _log_to_stderr(args.log_level)
    signal.signal(signal.SIGTERM, _leave)  # until the engine starts
    _allow_many_connections()
    try:
        with _listen(args.host, args.port) as listener:
            engine = Engine(args)
            ending = Ending(engine.processes.stop)
            with engine:
                return _run(engine, listener, ending, started)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, zmq.ZMQError) as error:  # the last: no descriptors are left, say
        if args.log_level == "debug":
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def _log_to_stderr(level: str) -> None:
    """A line that is logged while a request is handled names it."""
    handler = logging.StreamHandler()
    handler.addFilter(add_request_id)
    form = "[%(asctime)s server%(request)s] %(message)s"
    logging.basicConfig(level=level.upper(), format=form, datefmt="%H:%M:%S", handlers=[handler])


def _allow_many_connections() -> None:
    """Each takes a file descriptor, of which shells often allow 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _leave(signum: int, frame: object) -> None:
    sys.exit(0)


@contextlib.contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that is bound, before any weight is loaded, and does not listen yet.

    Raises OSError naming the address where it is taken.
    """
    host = host.removeprefix("[").removesuffix("]")  # as in a URL
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with _naming(host, port):
            listener.bind((host, port))
        yield listener


@contextlib.contextmanager
def _naming(host: str, port: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}") from None


class Engine:
    """A model and its processes."""

    def __init__(self, args: ServerArgs) -> None:
        self.args = args
        self.model = ModelConfig.load(args)
        self.is_ready = False
        self.processes = EngineProcesses(args, self.model, self._on_death)

    def __enter__(self) -> Engine:
        logger.info("starting %s (%s, %s)", self.model.name, self.model.dtype, self.model.device)
        self.processes.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.processes.stop()

    def _on_death(self, death: Death) -> None:
        """On the supervisor's thread. The other processes have been killed, so there is nothing to
        wait for, and a reply that was under way cannot be completed."""
        self.processes.stop()
        death.print_traceback(self.is_ready, self.args.log_level)
        print(f"error: {death.message}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)


def _run(engine: Engine, listener: socket.socket, ending: Ending, started: float) -> int:
    # These take half a second, which the other processes need anyway.
    import uvloop

    loop = uvloop.new_event_loop()
    try:
        return loop.run_until_complete(_serve(engine, listener, ending, started))
    finally:
        loop.close()


_ABORT_SECONDS = 5
"""Requests that are ended get their answers when the steps in flight are done, and a step of a long
prompt takes its time."""


async def _serve(
    engine: Engine, listener: socket.socket, ending: Ending, started: float
) -> int:  # fmt: skip
    from sglang.server.app import HTTPServer, build_app
    from sglang.server.service import Service
    from sglang.server.tokenizer_manager import TokenizerManager

    args, model = engine.args, engine.model
    manager = TokenizerManager(engine.processes.addresses, model.vocab_size, model.name)
    asked = ending.asked()
    tokenizer = None
    if not args.skip_tokenizer_init:
        from sglang.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(model, args)
    ready = asyncio.ensure_future(manager.ready())
    await asyncio.wait((ready, asked), return_when=asyncio.FIRST_COMPLETED)
    if not ready.done():
        ready.cancel()
        return ending.exit_code
    engine.is_ready = True
    service = Service(args, model, tokenizer, manager, ready.result())
    server = HTTPServer(build_app(service), args.shutdown_timeout + _ABORT_SECONDS)
    with _naming(*listener.getsockname()[:2]):
        listener.listen()
    serving = asyncio.ensure_future(server.serve([listener]))
    await server.wait_started(serving)
    _announce(engine, listener, time.monotonic() - started)
    await asyncio.wait((serving, asked), return_when=asyncio.FIRST_COMPLETED)
    service.draining = True
    server.should_exit = True
    if manager.num_generations:
        logger.info(
            "finishing %d requests, for %g s at most",
            manager.num_generations,
            args.shutdown_timeout,
        )
    grace = asyncio.get_running_loop().call_later(args.shutdown_timeout, manager.abort_all)
    await serving
    grace.cancel()
    manager.close()
    return ending.exit_code


class Ending:
    """SIGTERM, SIGHUP (a terminal closes) and Ctrl-C. The first asks for an end; a second Ctrl-C is
    one. They are noted, from before the event loop runs: as exceptions, amid an import, they might
    get lost."""

    def __init__(self, end_at_once: Callable[[], None]) -> None:
        self._end_at_once = end_at_once
        self.exit_code = 0
        self._is_asked = False
        self._future: asyncio.Future[None] | None = None
        under_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        for signum in (signal.SIGTERM, signal.SIGINT, *([] if under_nohup else [signal.SIGHUP])):
            signal.signal(signum, self._on_signal)

    def asked(self) -> asyncio.Future[None]:
        """Of the running event loop; done when an end is asked for."""
        self._future = asyncio.get_running_loop().create_future()
        if self._is_asked:
            self._tell(self._future)
        return self._future

    def _on_signal(self, signum: int, frame: object) -> None:
        if not self._is_asked:
            self._is_asked = True
            self.exit_code = 130 if signum == signal.SIGINT else 0
            if self._future is not None:
                self._future.get_loop().call_soon_threadsafe(self._tell, self._future)
        elif signum == signal.SIGINT:
            with contextlib.suppress(RuntimeError):  # there is nothing to end yet
                self._end_at_once()
            os._exit(130)

    def _tell(self, future: asyncio.Future[None]) -> None:
        if not future.done():
            future.set_result(None)
            logger.info("ending; Ctrl-C again to end at once")


def _announce(engine: Engine, listener: socket.socket, seconds: float) -> None:
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "localhost"}.get(host, host)
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    logger.info("ready after %.1f s", seconds)
    print(f"\n{engine.model.name} is served at {url}. Try:\n")
    if engine.args.skip_tokenizer_init:
        path, body = "/generate", '{"input_ids": [1, 2, 3]}'
    else:
        path = "/v1/chat/completions"
        question = '{"role": "user", "content": "What is the capital of France?"}'
        body = f'{{"messages": [{question}], "temperature": 0}}'
    key = " -H 'Authorization: Bearer <key>'" if engine.args.api_key else ""  # logs keep no secrets
    header = f"-H 'Content-Type: application/json'{key}"
    print(f"curl {url}{path} {header} \\\n  -d '{body}'\n", flush=True)
