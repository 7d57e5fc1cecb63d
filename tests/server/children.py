"""What the children of test_processes.py do."""

from __future__ import annotations

import os
import subprocess
import sys
import time


def sleep_for_ever() -> None:
    time.sleep(1000)


def fail(message: str) -> None:
    raise ValueError(message)


def fail_by_mistake() -> None:
    _ = [][0]


def fail_at(when: float, message: str) -> None:
    time.sleep(max(when - time.monotonic(), 0.0))
    raise ValueError(message)


def leave() -> None:
    sys.exit(3)


def keep_the_pipe_and_fail() -> None:
    """Leaves a process behind that has inherited all it could."""
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(8)"], close_fds=False)
    raise ValueError("gone")


def ignore_sigterm(path: str) -> None:
    import signal

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(1000)


def live() -> None:
    from sglang.processes import start_heartbeat

    start_heartbeat()
    time.sleep(1000)


def hold_the_interpreter_lock(seconds: float) -> None:
    """Lives, but for a while nothing else in it can run."""
    from sglang.processes import start_heartbeat

    start_heartbeat()
    time.sleep(0.5)
    end = time.monotonic() + seconds
    sys.setswitchinterval(1000)
    while time.monotonic() < end:
        pass
    raise ValueError("done")
