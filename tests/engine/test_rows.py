"""RowState against the simulation's worker, which reads the same plans one number at a time."""

import numpy as np
import pytest
import torch

from sglang.worker.rows import RowState
from tests.router.simulation import HashingWorker, Simulation


class Twin(HashingWorker):
    """Runs each plan and has RowState read it too."""

    def __init__(self, num_slots: int, num_rows: int, max_len: int) -> None:
        super().__init__(num_slots, num_rows, max_len)
        self.state = RowState(num_rows, max_len, torch.device("cpu"))

    def run(self, plan, payload):
        result = super().run(plan, payload)
        step = self.state.advance(plan, payload)
        table = self.state.slot_table.view(-1)
        for at, slots in ((step.cached_at, step.cached_slots), (step.grown_at, step.slots)):
            table.index_copy_(0, torch.from_numpy(at).long(), torch.tensor(slots))

        assert len(step.rows) == plan.num_rows
        assert (step.kv_lens == self.seq_len[step.rows]).all()
        ends = np.cumsum(step.q_lens)
        for row, q_len, kv_len, end in zip(step.rows, step.q_lens, step.kv_lens, ends, strict=True):
            known = self.slot_table[row, :kv_len]
            assert (self.state.slot_table[row, :kv_len].numpy() == known).all()
            tokens = slice(end - q_len, end)
            assert step.positions[tokens].tolist() == list(range(kv_len - q_len, kv_len))
            assert step.slots[tokens].tolist() == known[kv_len - q_len :].tolist()
        assert (ends[step.sample_of] - 1 == step.sample_at).all()
        assert len(step.sample_at) == len(result.tokens) // 4
        return result


@pytest.mark.parametrize("seed", range(40))
def test_plans_mean_the_same_to_rows_and_to_a_naive_reader(seed):
    simulation = Simulation(seed, depth=2)
    worker = simulation.worker
    simulation.worker = Twin(len(worker.memory), *worker.slot_table.shape)
    simulation.run()
