"""Where the processes of one server meet: ZeroMQ ipc:// sockets in a private folder.

Each inbox is a PULL socket that its owner binds; whoever has something to say connects a PUSH
socket to it. Two servers on one host never collide, since each has a folder of its own.
"""

from __future__ import annotations

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
    def results(self) -> str:
        """In: WorkerReady, StepResult from the worker of rank 0, bound by the router."""
        return self._ipc("results")

    @property
    def detokenizer(self) -> str:
        """In: TokenBatch from the router."""
        return self._ipc("detokenizer")

    def worker(self, rank: int) -> str:
        """In: StepPlan (two frames) from the router."""
        return self._ipc(f"worker{rank}")


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
