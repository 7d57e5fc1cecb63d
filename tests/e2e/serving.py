"""A real server, as a user starts it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import psutil
import requests

T = TypeVar("T")


def at_once(calls: Iterable[Callable[[], T]]) -> list[T]:
    """What they return. A batch of requests takes little longer than one."""
    with ThreadPoolExecutor(32) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


class Server:
    """`python -m sglang.launch_server` with the demo model on the CPU, on a free port."""

    def __init__(self, *flags: str) -> None:
        self.stderr_file = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as this
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "sglang.launch_server",
                "--port",
                "0",
                "--device",
                "cpu",
                *flags,
            ],
            stdout=subprocess.PIPE,
            stderr=self.stderr_file,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        self.url = ""

    def wait_ready(self) -> Server:
        """Until it has printed its URL."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if match := re.search(r"served at (http://\S+)\.", line):
                self.url = match.group(1)
                self.seconds_to_ready = time.monotonic() - self.started
                return self
        raise AssertionError(f"the server did not start:\n{self.stderr()}")

    def stderr(self) -> str:
        self.stderr_file.seek(0)
        return self.stderr_file.read()

    def children(self) -> dict[str, psutil.Process]:
        """By name: "router", "detokenizer", "model worker 0"."""
        children = psutil.Process(self.process.pid).children()
        return {(p.cmdline() or [""])[-1]: p for p in children}

    def stop(self, signum: int = signal.SIGTERM) -> int:
        """Returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signum)
        return self.process.wait(timeout=20)

    # --- requests ----------------------------------------------------------------------------

    def post(self, path: str, body: Any, **kwargs: Any) -> requests.Response:
        return requests.post(self.url + path, json=body, timeout=120, **kwargs)

    def get(self, path: str) -> requests.Response:
        return requests.get(self.url + path, timeout=60)

    def generate(self, **body: Any) -> Any:
        response = self.post("/generate", body)
        assert response.status_code == 200, response.text
        return response.json()

    def stats(self) -> dict[str, int]:
        return self.get("/get_server_info").json()["stats"]

    def wait_idle(self, seconds: float) -> bool:
        """Whether, within that time, no request is left and every slot is free or evictable."""
        deadline = time.monotonic() + seconds
        while True:
            stats = self.stats()
            if stats["running"] == stats["queued"] == stats["used_tokens"] == 0:
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
