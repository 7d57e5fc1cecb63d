"""Arrays on their way to the GPU and back, the GPU left out."""

import numpy as np
import torch

from sglang.worker.staging import Berths, Field, Heads, lay_out


def ints(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 1000, shape).astype(np.int32)


def test_fields_lie_one_after_the_other_each_line_padded():
    one, lines, none = ints(3), ints(2, 4), np.empty((2, 0), dtype=np.int32)
    fields = [Field(one, 5, -1), Field(lines, 4), Field(none, 2, 7)]
    out = np.full(20, 99, dtype=np.int32)
    assert lay_out(fields, out) == sum(field.size for field in fields) == 17
    assert out.tolist() == [*one, -1, -1, *lines[0], *lines[1], 7, 7, 7, 7, 99, 99, 99]


def test_what_is_sent_arrives_whatever_its_length():
    device, berth = Heads(torch.zeros(50, dtype=torch.int32)), Berths(8, pinned=False).take()
    for count in (1, 50, 7, 7, 30, 50, 2):
        values = ints(count)
        berth.send([Field(values, count)], device)
        assert device[count].tolist() == values.tolist()


def test_tokens_are_read_in_any_order():
    berths = Berths(8, pinned=False)
    sent = [torch.from_numpy(ints(8)[:count] + count) for count in (8, 3, 1, 5)]
    reads = [berths.take().fetch(tokens) for tokens in sent]
    for tokens, read in reversed(list(zip(sent, reads, strict=True))):
        assert read().tolist() == tokens.tolist()


def test_a_berth_is_taken_again_once_it_has_been_read_and_never_before():
    berths, old = Berths(4, pinned=False), torch.tensor([1, 2, 3], dtype=torch.int32)
    taken = [berths.take()]
    unread = taken[0].fetch(old)
    read = []
    for i in range(5):
        taken.append(berths.take())
        read.append(taken[-1].fetch(old + i)())
    assert len(set(map(id, taken))) == 2
    assert [tokens.tolist() for tokens in read] == [[1 + i, 2 + i, 3 + i] for i in range(5)]
    assert unread().tolist() == [1, 2, 3]


def test_tokens_are_read_once_the_device_has_sent_them():
    class Event:
        """In the place of CUDA's: says what is asked of it, and copies late."""

        def __init__(self) -> None:
            self.calls: list[str] = []

        def record(self) -> None:
            self.calls.append("record")

        def synchronize(self) -> None:
            self.calls.append("synchronize")
            berth._tokens.array[:2] = [8, 9]

    berth = Berths(4, pinned=False).take()
    berth._event = event = Event()  # type: ignore[assignment]
    read = berth.fetch(torch.tensor([1, 2], dtype=torch.int32))
    assert event.calls == ["record"]
    assert read().tolist() == [8, 9] and event.calls == ["record", "synchronize"]
