"""Arrays on their way to the GPU and back, the GPU left out."""

import numpy as np
import pytest
import torch

from sglang.worker import staging
from sglang.worker.staging import Field, Heads, Landing, Staging, lay_out


class Unpinned:
    """In the place of pinned memory, and of its event."""

    def __init__(self, size: int) -> None:
        memory = torch.zeros(size, dtype=torch.int32)
        self.array, self.heads, self.copied = memory.numpy(), Heads(memory), self
        self.waits = 0

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        self.waits += 1


@pytest.fixture(autouse=True)
def unpinned(monkeypatch):
    monkeypatch.setattr(staging, "_Pinned", Unpinned)


def ints(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 1000, shape).astype(np.int32)


def test_fields_lie_one_after_the_other_each_line_padded():
    one, lines, none = ints(3), ints(2, 4), np.empty((2, 0), dtype=np.int32)
    fields = [Field(one, 5, -1), Field(lines, 4), Field(none, 2, 7)]
    out = np.full(20, 99, dtype=np.int32)
    assert lay_out(fields, out) == sum(field.size for field in fields) == 17
    assert out.tolist() == [*one, -1, -1, *lines[0], *lines[1], 7, 7, 7, 7, 99, 99, 99]


def test_what_is_staged_arrives_whatever_its_length():
    device = torch.zeros(50, dtype=torch.int32)
    stage = Staging(device)
    for count in (1, 50, 7, 7, 30, 50, 2):
        values = ints(count)
        stage.copy([Field(values, count)])
        assert device[:count].tolist() == values.tolist()


def test_tokens_are_read_in_any_order():
    landing = Landing(8)
    sent = [torch.from_numpy(ints(8)[:count] + count) for count in (8, 3, 1, 5)]
    reads = [landing.fetch(tokens) for tokens in sent]
    for tokens, read in reversed(list(zip(sent, reads, strict=True))):
        assert read().tolist() == tokens.tolist()


def test_a_buffer_is_used_again_once_it_has_been_read_and_never_before(monkeypatch):
    made = []
    monkeypatch.setattr(staging, "_Pinned", lambda size: made.append(Unpinned(size)) or made[-1])
    landing, old = Landing(4), torch.tensor([1, 2, 3], dtype=torch.int32)
    unread = landing.fetch(old)
    first = landing.fetch(old + 1)()
    for _ in range(5):
        assert landing.fetch(old + 2)().tolist() == [3, 4, 5]
    assert len(made) == 2 and all(buffer.waits for buffer in made[1:])
    assert first.tolist() == [2, 3, 4], "what was read changes with the buffer"
    assert unread().tolist() == [1, 2, 3]
