"""Where the processes of one server meet: sockets in a private folder.

Each inbox is a ZeroMQ PULL socket that its owner binds; whoever has something to say connects a
PUSH socket to it. Router and model workers, who wait for each other at every step, have a plain
Unix socket: there a message wakes one thread, where ZeroMQ's wakes three, its I/O threads among
them. Two servers on one host never collide, since each has a folder of its own.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection

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


def connect(path: str) -> Connection:
    """Waits for the other side to listen."""
    while True:
        try:
            return Client(path, "AF_UNIX")
        except (FileNotFoundError, ConnectionRefusedError):
            time.sleep(0.01)
