"""Where the processes of one server meet: sockets in a private folder.

Each inbox is a ZeroMQ PULL socket that its owner binds; whoever has something to say connects a
PUSH socket to it. What the router says and hears at every step, to and from the model workers and
to the detokenizer, goes through plain Unix sockets: there a message wakes one thread, where
ZeroMQ's wakes three, its I/O threads among them. Two servers on one host never collide, since each
has a folder of its own.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import zmq

SPIN_SECONDS = 0.02
"""So long router, LLM and workers stay awake as they wait for a GPU or its next request. Who sleeps
wakes late, with a core that is slow and a cache that others have used: in all, a step of a lone
request took half a millisecond longer."""


@dataclass(frozen=True)
class Addresses:
    folder: str
    """Made by the launcher, readable by its user alone, removed when the server ends."""

    def _ipc(self, name: str) -> str:
        return f"ipc://{self.folder}/{name}"

    @property
    def tokenizer_manager(self) -> str:
        """In: EngineReady, replies and Stats from the router; TextBatch from the detokenizer."""
        return self._ipc("tokenizer_manager")

    @property
    def router(self) -> str:
        """In: requests from the tokenizer manager, stops from the detokenizer."""
        return self._ipc("router")

    @property
    def workers(self) -> str:
        """Of a Unix socket. In: WorkerReady, and StepResult from rank 0; out: StepPlan and its
        payload. The router listens."""
        return f"{self.folder}/workers"

    @property
    def detokenizer(self) -> str:
        """Of a Unix socket. Out: TokenBatch. The router listens."""
        return f"{self.folder}/detokenizer"


def bind_inbox(context: zmq.Context, address: str) -> zmq.Socket:
    socket = context.socket(zmq.PULL)
    socket.set_hwm(0)
    socket.bind(address)
    return socket


def connect_outbox(context: zmq.Context, address: str) -> zmq.Socket:
    """Does not wait for the other side to be there: messages queue until it is."""
    socket = context.socket(zmq.PUSH)
    socket.set_hwm(0)
    socket.linger = 0
    socket.connect(address)
    return socket


class Link:
    """One end of a Unix socket that carries frames, each behind its length. Several are sent, and
    what has come is read, in one system call: they are what a message costs."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self.spins = False
        """Whoever waits here stays awake until SPIN_SECONDS after the last message."""
        self._awake_until = 0.0
        self._readable = select.poll()
        self._readable.register(end, select.POLLIN)
        self._read = bytearray()
        """What is not handed out yet."""
        self._unsent = bytearray()

    def send_bytes(self, *frames: bytes) -> None:
        self._socket.sendall(_join(frames))
        self._awake_until = time.perf_counter() + SPIN_SECONDS

    def post(self, frame: bytes) -> None:
        """Without waiting: what the other end has no room for is for `flush` to send."""
        self._unsent += _join((frame,))
        self.flush()

    def flush(self) -> None:
        if self._unsent:
            with contextlib.suppress(BlockingIOError):
                del self._unsent[: self._socket.send(self._unsent, socket.MSG_DONTWAIT)]

    @property
    def is_behind(self) -> bool:
        """Something that was posted is not sent yet."""
        return bool(self._unsent)

    def poll(self, seconds: float = 0.0) -> bool:
        """Whether there is something to receive, or will be within that time. Only this method can
        tell, and not the socket, from which it may have been read already."""
        return bool(self._read or self._spin(seconds) or self._readable.poll(1e3 * seconds))

    def _spin(self, seconds: float) -> bool:
        """Whether there is something to read after so much time at most, all of it awake."""
        end = min(time.perf_counter() + seconds, self._awake_until)
        return self.spins and stay_awake(lambda: self._readable.poll(0), end)

    def recv_bytes(self) -> bytes:
        """The next frame. Raises EOFError if the other end is gone."""
        read = self._read
        while len(read) < 4 or len(read) < (end := 4 + int.from_bytes(read[:4], "little")):
            size = len(read)
            self._spin(SPIN_SECONDS)
            # In C from there to here: a Ctrl-C comes before or after, and nothing is lost by it.
            any(map(read.extend, map(self._socket.recv, (1 << 16,))))
            if len(read) == size:
                raise EOFError
        self._awake_until = time.perf_counter() + SPIN_SECONDS
        frame = bytes(read[4:end])
        del read[:end]
        return frame


def stay_awake(is_there: Callable[[], object], end: float) -> bool:
    """Looks for something, without sleep, until time.perf_counter() is there; whether it came."""
    while time.perf_counter() < end:
        if is_there():
            return True
    return False


def _join(frames: Sequence[bytes]) -> bytes:
    return b"".join(part for frame in frames for part in (len(frame).to_bytes(4, "little"), frame))


def listen(path: str) -> Iterator[Link]:
    """From now on; the links of those who connect, one after the other."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    return (Link(end) for end, _ in iter(listener.accept, None))


def connect(path: str) -> Link:
    """Waits for the other side to listen."""
    end = socket.socket(socket.AF_UNIX)
    while True:
        try:
            end.connect(path)
            return Link(end)
        except (FileNotFoundError, ConnectionRefusedError):
            time.sleep(0.01)
