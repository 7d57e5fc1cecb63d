"""Frames over a plain Unix socket."""

from __future__ import annotations

import os
import random
import signal
import threading
import time

import pytest

from sglang.addresses import Link, connect, listen


@pytest.fixture
def ends(tmp_path) -> tuple[Link, Link]:
    path = str(tmp_path / "link")
    arriving = listen(path)
    return connect(path), next(arriving)


def test_frames_of_any_size_arrive_whole_and_in_order(ends):
    near, far = ends
    frames = [os.urandom(size) for size in (0, 1, 3, 4, 5, 65_532, 0, 65_536, 3 << 20, 7)]
    sender = threading.Thread(target=near.send_bytes, args=frames)
    sender.start()
    assert [far.recv_bytes() for _ in frames] == frames
    sender.join()
    assert not far.poll()


@pytest.mark.parametrize("spins", [False, True])
@pytest.mark.parametrize("pause", [0.0, 0.01, 0.05])
def test_who_waits_awake_or_asleep_gets_what_comes(ends, spins: bool, pause: float):
    near, far = ends
    far.spins = spins
    near.send_bytes(b"zeroth")
    assert far.recv_bytes() == b"zeroth"
    threading.Timer(pause, near.send_bytes, (b"first", b"second")).start()
    assert far.recv_bytes() == b"first"
    assert far.poll() and far.recv_bytes() == b"second"
    assert not far.poll(0.03)


def test_who_is_awake_falls_asleep_when_nothing_comes(ends):
    _, far = ends
    far.spins = True
    far.send_bytes(b"a question")
    before = time.process_time()
    for _ in range(20):
        assert not far.poll(0.03)
    assert time.process_time() - before < 0.2


def test_an_end_that_is_gone_is_noticed_after_what_it_said(tmp_path):
    arriving = listen(str(tmp_path / "link"))
    near, far = connect(str(tmp_path / "link")), next(arriving)
    near.send_bytes(b"last")
    del near
    assert far.recv_bytes() == b"last"
    with pytest.raises(EOFError):
        far.recv_bytes()


def test_posting_waits_for_no_reader_and_loses_nothing(ends):
    near, far = ends
    frames = [bytes([i]) * 100_000 for i in range(20)]
    for frame in frames:
        near.post(frame)
    assert near.is_behind
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.extend(far.recv_bytes() for _ in frames))
    reader.start()
    while near.is_behind:
        near.flush()
    reader.join()
    assert read == frames


def test_an_interrupted_reader_goes_on_between_frames(ends):
    """Python raises KeyboardInterrupt, here of another signal, between any two of its calls."""
    near, far = ends
    rng = random.Random(0)

    def write() -> None:
        for i in range(20_000):
            near.send_bytes(bytes([i % 251]) * rng.randrange(200))
        near.send_bytes(*[b"end"] * 100)  # a frame or two may be lost

    class Interrupt(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    writer = threading.Thread(target=write)
    writer.start()
    deadline, frame, interrupts = time.monotonic() + 30, b"", 0
    while frame != b"end":
        assert time.monotonic() < deadline
        try:
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(5e-5, 2e-4))
            while frame != b"end":
                frame = far.recv_bytes()
                assert frame == b"end" or len(set(frame)) <= 1
        except Interrupt:
            interrupts += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    writer.join()
    assert interrupts > 100
