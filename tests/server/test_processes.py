"""Supervision, with real processes."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from sglang.processes import PREFIX, Child, Death, Supervisor, _make_folder

pytestmark = pytest.mark.alone
CHILDREN = "tests.server.children"
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def supervise():
    """Starts children; returns (supervisor, queue of deaths)."""
    started = []

    def start(*children: tuple) -> tuple[Supervisor, queue.Queue[Death]]:
        deaths: queue.Queue[Death] = queue.Queue()
        specs = [Child(f"child {i}", f"{CHILDREN}:{c[0]}", c[1:]) for i, c in enumerate(children)]
        supervisor = Supervisor(specs, deaths.put)
        supervisor.start()
        started.append(supervisor)
        return supervisor, deaths

    yield start
    for supervisor in started:
        supervisor.stop()


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_killed_child_takes_the_others_along_and_is_named_with_its_signal(supervise):
    supervisor, deaths = supervise(("sleep_for_ever",), ("sleep_for_ever",))
    pids = supervisor.pids()
    os.kill(pids["child 1"], signal.SIGKILL)
    assert deaths.get(timeout=5).message == "child 1 was killed by signal 9 (SIGKILL)"
    assert not any(is_running(pid) for pid in pids.values())
    assert deaths.empty(), "only the first death is the cause"


def test_of_deaths_at_about_the_same_time_the_cause_is_the_one_that_was_killed(
    supervise, monkeypatch
):
    monkeypatch.setattr("sglang.processes.CAUSE_SECONDS", 2.0)
    fails_at = time.monotonic() + 1.0
    supervisor, deaths = supervise(
        ("fail_at", fails_at, "the other rank is gone"), ("sleep_for_ever",)
    )
    time.sleep(max(fails_at + 0.3 - time.monotonic(), 0.0))
    os.kill(supervisor.pids()["child 1"], signal.SIGKILL)
    assert deaths.get(timeout=10).message == "child 1 was killed by signal 9 (SIGKILL)"
    assert deaths.empty()


def test_an_exception_is_reported_in_one_line_with_its_traceback(supervise):
    supervisor, deaths = supervise(("fail", "the file\nis empty"), ("sleep_for_ever",))
    death = deaths.get(timeout=10)
    assert death.message == "child 0: the file is empty" and death.plain
    assert "in fail" in death.traceback
    assert not any(is_running(pid) for pid in supervisor.pids().values())


def test_a_bug_is_reported_with_its_type(supervise):
    _, deaths = supervise(("fail_by_mistake",))
    death = deaths.get(timeout=10)
    assert death.message == "child 0: IndexError: list index out of range" and not death.plain


def test_an_exit_is_a_death_too(supervise):
    _, deaths = supervise(("leave",))
    assert deaths.get(timeout=10).message.startswith("child 0: SystemExit: 3")


def test_a_module_that_cannot_be_imported_is_a_death():
    supervisor = Supervisor(
        [Child("child", "sglang.no_such_module:run", ())], (q := queue.Queue()).put
    )
    supervisor.start()
    assert "no_such_module" in q.get(timeout=10).message


def test_a_death_is_noticed_though_a_grandchild_lives_on(supervise):
    _, deaths = supervise(("keep_the_pipe_and_fail",))
    assert deaths.get(timeout=5).message == "child 0: gone"


def test_stop_ends_even_a_child_that_ignores_sigterm_and_is_no_death(supervise, tmp_path):
    supervisor, deaths = supervise(("ignore_sigterm", str(tmp_path / "pid")), ("sleep_for_ever",))
    while not (tmp_path / "pid").exists():
        time.sleep(0.01)
    start = time.monotonic()
    supervisor.stop()
    assert time.monotonic() - start < 4
    assert not any(is_running(pid) for pid in supervisor.pids().values())
    assert deaths.empty()


def test_children_die_with_a_killed_parent(tmp_path):
    script = f"""
from sglang.processes import Child, Supervisor
import time
s = Supervisor([Child("child", "{CHILDREN}:sleep_for_ever", ())], print)
s.start()
print(*s.pids().values(), flush=True)
time.sleep(1000)
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=env)
    pid = int(parent.stdout.readline())
    time.sleep(1.0)  # past its first lines, where it asks the kernel for this
    assert is_running(pid)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 3
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)


def test_a_child_that_hangs_is_noticed_and_named(supervise, monkeypatch):
    monkeypatch.setattr("sglang.processes.SILENCE_SECONDS", 3.0)
    supervisor, deaths = supervise(("live",), ("live",))
    with pytest.raises(queue.Empty):
        deaths.get(timeout=3)  # long enough for both to have shown life
    pids = supervisor.pids()
    os.kill(pids["child 1"], signal.SIGSTOP)
    assert deaths.get(timeout=10).message == "child 1 hangs: no sign of life"
    assert not any(is_running(pid) for pid in pids.values())


def test_a_child_that_computes_without_a_beat_is_given_longer(supervise, monkeypatch):
    monkeypatch.setattr("sglang.processes.SILENCE_SECONDS", 2.5)
    _, deaths = supervise(("hold_the_interpreter_lock", 4.0))
    assert deaths.get(timeout=15).message == "child 0: done"
    monkeypatch.setattr("sglang.processes.BUSY_SECONDS", 2.5)
    _, deaths = supervise(("hold_the_interpreter_lock", 10.0))
    assert deaths.get(timeout=15).message == "child 0 hangs: no sign of life"


def test_folders_of_killed_servers_are_removed_and_no_others(monkeypatch):
    with tempfile.TemporaryDirectory(dir="/tmp") as root:
        monkeypatch.setattr("tempfile.tempdir", root)
        first, lock = _make_folder()
        os.mkdir(os.path.join(root, f"{PREFIX}{os.getpid()}-deadbeef"))  # whoever has that number
        others = [os.path.join(root, name) for name in ("other", f"{PREFIX}models", f"{PREFIX}1")]
        for folder in others:
            os.mkdir(folder)
        second, second_lock = _make_folder()
        assert {os.path.join(root, n) for n in os.listdir(root)} == {first, second, *others}
        os.close(lock)
        os.close(second_lock)
