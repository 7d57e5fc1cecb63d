"""Where there is no GPU, Triton kernels run on Triton's interpreter. It must be asked for before
triton is first imported; what the engine runs on a CPU does not change by it."""

import fcntl
import os
from typing import TextIO

import pytest

# Threads that spin while they wait are quick alone, and many times slower beside others.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # one of two, which share the cores
    torch.set_num_threads(max(torch.get_num_threads() // 2, 1))

TURN = pytest.StashKey[TextIO | None]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None):
    """Two workers run the tests of two files at a time, but those marked `alone`, which measure
    seconds, by themselves. Of these, tests that follow each other have one turn together: tests of
    the other worker between them would each run by itself too."""
    turn = item.config.stash.get(TURN, None) or wait_for_turn(item)
    more = nextitem is not None and is_alone(nextitem) and is_alone(item)
    item.config.stash[TURN] = turn if more else None
    try:
        return (yield)
    finally:
        if not more:
            turn.close()


def is_alone(item: pytest.Item) -> bool:
    return item.get_closest_marker("alone") is not None


def wait_for_turn(item: pytest.Item) -> TextIO:
    """The turn lasts until the file is closed. The locked files are just two that are there."""
    turn = open(item.config.rootpath / "pyproject.toml")  # noqa: SIM115
    with open(__file__) as next_in_line:
        fcntl.flock(next_in_line, fcntl.LOCK_EX)  # or those that share would come again and again
        fcntl.flock(turn, fcntl.LOCK_EX if is_alone(item) else fcntl.LOCK_SH)
    return turn
