"""The processes of one engine: started together, watched, and taken down together.

    launcher (tokenizer manager + HTTP server, or an offline LLM)
      └─ supervisor thread ── detokenizer, router, model worker 0..N-1

A child's standard input brings it what to run; through a pipe it reports the exception that ended
it. That pipe closes with the child however it ends, so the supervisor waits for nothing else. Once
it is ready, a child sends a heartbeat through it too: one that is stopped, or never lets go of
Python's lock, is noticed. A child does not import the caller's script (multiprocessing's spawn
would), so an LLM works in scripts without a `__main__` guard, in notebooks and on a pipe.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import importlib
import logging
import math
import os
import pickle
import re
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sglang.addresses import Addresses

if TYPE_CHECKING:
    from sglang.model_config import ModelConfig
    from sglang.server_args import ServerArgs

HEARTBEAT_SECONDS = 1.0
SILENCE_SECONDS = 7.0
"""A process that has begun to beat, and then neither beats nor computes for so long, hangs..."""
BUSY_SECONDS = 60.0
"""...and so does one that computes, without a beat, for so long."""
CAUSE_SECONDS = 0.2
"""One rank's death soon fails the others, which wait for it: the cause is sought among all that end
within this time."""
_SPIN_COUNT = "5000"
"""How often a thread of OpenMP looks whether there is work before it sleeps: some 0.1 ms, enough
from one product to the next. By default it spins for milliseconds, which takes the core from the
thread that it waits for: beside another busy process a step then takes twice as long."""
_PRIMITIVES = "64"
"""Products that oneDNN keeps code for, on a CPU. Each number of tokens has its own: prompts of 177
lengths made a worker 730 MB larger with 1024, the default; now it is 360 MB, at the same speed."""
_BOOT = "from sglang.processes import child_main; child_main()"
_BEAT = b"."  # a pickled report begins with another byte
_report_fd = -1  # in a child: its pipe
_PLAIN_ERRORS = (ValueError, OSError, MemoryError)
"""What a wrong flag, file or machine raises while an engine starts: the message alone is clear."""


@dataclass(frozen=True)
class Child:
    name: str
    """As people read it: "model worker 0"."""
    target: str
    """"package.module:function", imported in the child only."""
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Death:
    """How a child ended that should have gone on."""

    message: str
    """One line: who and why."""
    traceback: str = ""
    plain: bool = True
    """The message says it all, if this happened while the engine started."""

    def print_traceback(self, is_ready: bool, log_level: str) -> None:
        """On stderr, where it helps. is_ready: the engine had started."""
        if self.traceback and (is_ready or not self.plain or log_level == "debug"):
            print(self.traceback, file=sys.stderr)


class Supervisor:
    """Starts the children and calls `on_death`, on its own thread, when one of them ends before
    `stop()`; by then the others have been killed."""

    def __init__(
        self, children: list[Child], on_death: Callable[[Death], None], log_level: str = "info"
    ) -> None:
        self._children = children
        self._on_death = on_death
        self._log_level = log_level
        self._processes: list[subprocess.Popen] = []
        self._stopping = threading.Event()
        self._started = threading.Event()
        self._start_error: Exception | None = None
        # Children are started on this thread too: Linux kills them when the *thread* that started
        # them ends (PR_SET_PDEATHSIG), and a caller's thread may well end before the engine.
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    def start(self) -> None:
        """Returns when all children run; raises what kept one from being started."""
        self._thread.start()
        self._started.wait()
        if self._start_error is not None:
            raise self._start_error

    def pids(self) -> dict[str, int]:
        named = zip(self._children, self._processes, strict=False)
        return {child.name: process.pid for child, process in named}

    def stop(self) -> None:
        """Ends every child; returns when they are gone. May be called twice."""
        self.kill()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=1.0)

    def kill(self) -> None:
        """At once."""
        self._stopping.set()
        for process in self._processes:
            if process.poll() is None:
                process.kill()
        for process in self._processes:
            process.wait()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            try:
                for child in self._children:
                    process, report = self._spawn(child)
                    self._processes.append(process)
                    selector.register(report, selectors.EVENT_READ, _Watched(child, process))
            except Exception as error:
                self._start_error = error
                self.kill()
                return
            finally:
                self._started.set()
            last_turn = time.monotonic()
            while selector.get_map():
                events = selector.select(HEARTBEAT_SECONDS)
                # Stopped itself (Ctrl-Z), the supervisor was the one who did not listen.
                was_away = time.monotonic() - last_turn > SILENCE_SECONDS / 2
                last_turn = time.monotonic()
                ended = _ended(selector, events)
                if ended and not self._stopping.is_set():
                    deadline = time.monotonic() + CAUSE_SECONDS
                    while (left := deadline - time.monotonic()) > 0:
                        ended += _ended(selector, selector.select(left))
                    self._died(min(ended, key=_Watched.precedence).death())
                for key in list(selector.get_map().values()):
                    if was_away:
                        key.data.excuse()
                    elif key.data.hangs():
                        self._died(Death(f"{key.data.child.name} hangs: no sign of life"))

    def _died(self, death: Death) -> None:
        if not self._stopping.is_set():
            self.kill()
            self._on_death(death)

    def _spawn(self, child: Child) -> tuple[subprocess.Popen, int]:
        read_end, write_end = os.pipe()
        env = dict(os.environ)
        env["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        env["PYTHONSAFEPATH"] = "1"  # sglang is where it is here, not where the user stands
        if "OMP_WAIT_POLICY" not in env:
            env.setdefault("GOMP_SPINCOUNT", _SPIN_COUNT)
        env.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _PRIMITIVES)
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, child.name],
                stdin=subprocess.PIPE,
                pass_fds=(write_end,),
                env=env,
            )
        finally:
            os.close(write_end)
        job = (os.getpid(), write_end, child, self._log_level)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead already: the report will say so
            process.stdin.write(pickle.dumps(job))
            process.stdin.close()
        return process, read_end


def _ended(selector: selectors.BaseSelector, events: list) -> list[_Watched]:
    """Reads what has come; returns the children whose pipes are closed."""
    ended = []
    for key, _ in events:
        watched = key.data
        if not watched.read(key.fd):
            selector.unregister(key.fileobj)
            os.close(key.fd)
            watched.process.wait()
            ended.append(watched)
    return ended


class _Watched:
    """A child, and what came through its pipe."""

    def __init__(self, child: Child, process: subprocess.Popen) -> None:
        self.child = child
        self.process = process
        self.report = b""
        self._last_beat = math.inf  # not before the first
        self._cpu_seconds = self._last_ran = 0.0

    def read(self, pipe: int) -> bool:
        """False: the pipe is closed."""
        data = os.read(pipe, 1 << 16)
        self.report += data.lstrip(_BEAT) if not self.report else data
        self._last_beat = time.monotonic()
        return bool(data)

    def excuse(self) -> None:
        """Silence counts from now."""
        if self._last_beat < math.inf:
            self._last_beat = time.monotonic()

    def hangs(self) -> bool:
        """To be asked often. On a machine that is too busy, or in a long call into a library, a
        process may not get to beat: but its CPU time grows."""
        now, cpu_seconds = time.monotonic(), _cpu_seconds(self.process.pid)
        if cpu_seconds > self._cpu_seconds:
            self._cpu_seconds, self._last_ran = cpu_seconds, now
        limit = SILENCE_SECONDS if now - self._last_ran > SILENCE_SECONDS / 2 else BUSY_SECONDS
        return now - self._last_beat > limit

    # Once it has ended:

    def precedence(self) -> float:
        """Of several that have ended, the cause is that with the least: one that could not say why
        comes before those that could, the first of these before the others."""
        return pickle.loads(self.report)[0] if self.report else 0.0

    def death(self) -> Death:
        name, code = self.child.name, self.process.returncode
        if self.report:
            _, cause, trace, plain = pickle.loads(self.report)
            return Death(f"{name}: {cause}", trace, plain)
        if code < 0:
            return Death(f"{name} was killed by signal {-code} ({signal.Signals(-code).name})")
        return Death(f"{name} ended unexpectedly with exit code {code}")


def _cpu_seconds(pid: int) -> float:
    """What a process has used; 0.0: it is gone."""
    try:
        return time.clock_gettime(~pid << 3 | 2)  # as clock_getcpuclockid(3) makes it
    except OSError:
        return 0.0


# --- in the child --------------------------------------------------------------------------------


def child_main() -> None:
    """Reads its job from standard input and does it."""
    # A terminal's Ctrl-C, and what ends a whole group or service, are the launcher's to handle: it
    # has requests to finish first.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    global _report_fd
    parent, report_fd, child, log_level = pickle.load(sys.stdin.buffer)
    _report_fd = report_fd
    os.set_inheritable(report_fd, False)  # or the pipe would outlive this process in its children
    end_with(parent)
    _name_process(child.name)
    logging.basicConfig(
        level=log_level.upper(),
        format=f"[%(asctime)s {child.name}] %(message)s",
        datefmt="%H:%M:%S",
    )
    try:
        module, function = child.target.split(":")
        getattr(importlib.import_module(module), function)(*child.args)
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            return
        report = (time.monotonic(), *_describe(error))
        with open(report_fd, "wb") as pipe:
            pickle.dump(report, pipe)
        os._exit(1)  # not waiting for threads or sockets that a failure may have left stuck


def start_heartbeat() -> None:
    """Called in a child once it is ready: from then on it must show signs of life. What it has made
    so far stays, so the garbage collector need not look at it again: in the midst of requests that
    would take 0.03 s in a router and 0.2 s in a worker."""

    def beat() -> None:
        while True:
            os.write(_report_fd, _BEAT)
            time.sleep(HEARTBEAT_SECONDS)

    gc.collect()
    gc.freeze()
    if _report_fd >= 0:
        threading.Thread(target=beat, name="heartbeat", daemon=True).start()


def _describe(error: BaseException) -> tuple[str, str, bool]:
    """(cause in one line, traceback, whether the line says it all)."""
    cause = " ".join(str(error).split())
    plain = isinstance(error, _PLAIN_ERRORS) and bool(cause)
    if "OutOfMemory" in type(error).__name__:  # torch's, which is not imported here
        plain, cause = True, f"out of memory: {cause}"
    if not plain:
        cause = f"{type(error).__name__}: {cause}"
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return cause, trace, plain


def _prctl(option: int, argument: Any) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, argument, 0, 0, 0)


def end_with(parent: int, signum: int = signal.SIGKILL) -> None:
    """The kernel sends this process a signal when its parent ends, however that ends."""
    PR_SET_PDEATHSIG = 1
    _prctl(PR_SET_PDEATHSIG, signum)
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)


def _name_process(name: str) -> None:
    PR_SET_NAME = 15  # 15 bytes at most
    _prctl(PR_SET_NAME, name.replace("model ", "").encode()[:15])


# --- the engine ----------------------------------------------------------------------------------


class EngineProcesses:
    """Router and model workers, with a detokenizer if asked, in a private folder of sockets."""

    def __init__(
        self,
        args: ServerArgs,
        model: ModelConfig,
        on_death: Callable[[Death], None],
        detokenizer: bool = True,
    ) -> None:
        folder, self._folder_lock = _make_folder()
        self.addresses = Addresses(folder)
        shared = (args, model, self.addresses)
        children = [  # the slowest to get ready first
            Child(f"model worker {rank}", "sglang.worker.worker:run_worker", (*shared, rank))
            for rank in range(args.tp_size)
        ]
        children.append(Child("router", "sglang.router.router:run_router", shared))
        if detokenizer:
            target = "sglang.server.detokenizer:run_detokenizer"
            children.append(Child("detokenizer", target, shared))
        self._supervisor = Supervisor(children, on_death, args.log_level)
        self._remove_folder = _Once(self._leave_folder)

    def start(self) -> None:
        try:
            self._supervisor.start()
        except BaseException:
            self.stop()
            raise

    def pids(self) -> dict[str, int]:
        return self._supervisor.pids()

    def stop(self) -> None:
        """Ends the processes and removes their folder. May be called twice, from any thread."""
        self._supervisor.stop()
        self._remove_folder()

    def _leave_folder(self) -> None:
        shutil.rmtree(self.addresses.folder, ignore_errors=True)
        os.close(self._folder_lock)


class _Once:
    def __init__(self, action: Callable[[], None]) -> None:
        self._action: Callable[[], None] | None = action

    def __call__(self) -> None:
        action, self._action = self._action, None
        if action is not None:
            action()


PREFIX = "nano-sglang-"


def _make_folder() -> tuple[str, int]:
    """(a folder readable by this user alone, the descriptor that locks it). Folders that nobody
    locks are what killed servers left behind, and are removed here. (A process number would not
    tell: containers that share /tmp have numbers of their own.)"""
    root = tempfile.gettempdir()
    if len(root) > 60:  # a socket's path must fit 107 bytes
        root = "/tmp"
    for name in os.listdir(root):
        if re.fullmatch(rf"{PREFIX}\d+-\w{{8}}", name) is None:  # others may begin alike
            continue
        if (lock := _lock(os.path.join(root, name))) is not None:
            shutil.rmtree(os.path.join(root, name), ignore_errors=True)
            os.close(lock)
    while True:
        folder = tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=root)
        if (lock := _lock(folder)) is not None:  # else another server has just removed it
            return folder, lock


def _lock(folder: str) -> int | None:
    """The descriptor that holds the lock as long as it is open; None if it cannot be had."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
