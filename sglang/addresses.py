"""Where the processes of one server meet: sockets in a private folder.

Each inbox is a ZeroMQ PULL socket that its owner binds; whoever has something to say connects a
PUSH socket to it. Router and model workers, who wait for each other at every step, have a plain
Unix socket: there a message wakes one thread, where ZeroMQ's wakes three, its I/O threads among
them. Two servers on one host never collide, since each has a folder of its own.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass

import zmq


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
        """In: TokenBatch from the router."""
        return self._ipc("detokenizer")


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
        self._readable = select.poll()
        self._readable.register(end, select.POLLIN)
        self._read = bytearray()
        """What is not handed out yet."""

    def send_bytes(self, *frames: bytes) -> None:
        parts = [part for frame in frames for part in (len(frame).to_bytes(4, "little"), frame)]
        self._socket.sendall(b"".join(parts))

    def poll(self, seconds: float = 0.0) -> bool:
        """Whether there is something to receive, or will be within that time."""
        return bool(self._read or self._readable.poll(1e3 * seconds))

    def recv_bytes(self) -> bytes:
        """The next frame. Raises EOFError if the other end is gone."""
        read = self._read
        while len(read) < 4 or len(read) < (end := 4 + int.from_bytes(read[:4], "little")):
            some = self._socket.recv(1 << 16)
            if not some:
                raise EOFError
            read += some
        frame = bytes(read[4:end])
        del read[:end]
        return frame


def listen(path: str) -> Iterator[Link]:
    """To whoever connects, one after the other. Listens from the first `next` on."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        while True:
            yield Link(listener.accept()[0])


def connect(path: str) -> Link:
    """Waits for the other side to listen."""
    end = socket.socket(socket.AF_UNIX)
    while True:
        try:
            end.connect(path)
            return Link(end)
        except (FileNotFoundError, ConnectionRefusedError):
            time.sleep(0.01)
