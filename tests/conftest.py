"""Where there is no GPU, Triton kernels run on Triton's interpreter. It must be asked for before
triton is first imported; what the engine runs on a CPU does not change by it."""

import fcntl
import os

import pytest

# Threads that spin while they wait are quick alone, and many times slower beside others.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    """Two workers run the tests of two files at a time, but those marked `alone`, which measure
    seconds, by themselves. The locked files are just two that are there."""
    with open(__file__) as next_in_line, open(item.config.rootpath / "pyproject.toml") as turn:
        fcntl.flock(next_in_line, fcntl.LOCK_EX)  # or those that share would come again and again
        fcntl.flock(turn, fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH)
        fcntl.flock(next_in_line, fcntl.LOCK_UN)
        return (yield)
