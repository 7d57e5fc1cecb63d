"""The attention backends, as a model calls them, against the naive kernels."""

import functools
import importlib.util

import numpy as np
import pytest
import torch

from sglang.attention import AttentionShape, create_attention_backend
from sglang.attention.base import AttentionBackend
from sglang.attention.triton import TritonAttention
from sglang.kernels.decode_attention import decode_attention_naive
from sglang.kernels.extend_attention import extend_attention_naive
from sglang.worker.batch import Batch

from .common import DEVICE, GPU, assert_close, int32, randn, seeds

HAS_FLASHINFER = GPU and importlib.util.find_spec("flashinfer") is not None
FLASHINFER = pytest.param(
    "flashinfer",
    marks=pytest.mark.skipif(not HAS_FLASHINFER, reason="needs a GPU and flashinfer-python"),
)
ON_GPU = pytest.mark.skipif(not GPU, reason="needs a GPU")
MAX_ROWS, MAX_LEN, KV_HEADS = 8, 128, 2


@functools.cache
def make_backend(
    name: str, group: int, window: int, dtype: torch.dtype, kv_dtype: torch.dtype
) -> AttentionBackend:
    if name == "triton":  # where there is no GPU, its kernels' twins
        return TritonAttention()
    shape = AttentionShape(
        KV_HEADS * group, KV_HEADS, 64, dtype, kv_dtype, frozenset([window]), MAX_ROWS, MAX_LEN
    )
    device = torch.device("cpu") if name == "torch_native" else DEVICE
    return create_attention_backend(name, device, shape)


class Case:
    """Rows of which some decode (lengths of KV, 0: padding) and some prefill (new tokens, tokens of
    KV with them), with what they see."""

    def __init__(
        self,
        name: str,
        decode: list[int],
        prefill: list[tuple[int, int]],
        group: int,
        window: int = 0,
        seed: int = 0,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        device = torch.device("cpu") if name == "torch_native" else DEVICE
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.window, self.scale = window, 64**-0.5
        # Some rows lie in a row in the cache, others are scattered.
        table = rng.permutation(MAX_ROWS * MAX_LEN).astype(np.int32).reshape(MAX_ROWS, MAX_LEN)
        table[::2].sort(axis=1)
        if rng.random() < 0.5:
            table = np.arange(table.size, dtype=np.int32).reshape(table.shape)
        self.k, self.v = (
            randn(table.size, KV_HEADS, 64, dtype=dtype).to(device, kv_dtype or dtype)
            for _ in range(2)
        )
        q_lens = np.array([1] * len(decode) + [q for q, _ in prefill], dtype=np.int32)
        kv_lens = np.array(decode + [kv for _, kv in prefill], dtype=np.int32)
        starts = np.concatenate(([0], np.cumsum(q_lens[len(decode) :])))
        heads = (KV_HEADS * group, KV_HEADS, KV_HEADS)
        new = randn(int(q_lens.sum()), sum(heads), 64, dtype=dtype).to(device)
        self.q, self.new_k, self.new_v = new.split(heads, 1)
        none = torch.zeros(len(self.q), dtype=torch.int32, device=device)
        rows = torch.from_numpy(rng.permutation(MAX_ROWS)[: len(kv_lens)].astype(np.int32))
        self.batch = Batch(
            num_decode=len(decode),
            input_ids=none,
            positions=none,
            slots=none,
            rows=rows.to(device),
            kv_lens=torch.from_numpy(kv_lens).to(device),
            slot_table=torch.from_numpy(table).to(device),
            q_starts=torch.from_numpy(starts.astype(np.int32)).to(device),
            max_kv_len=MAX_LEN,
            attention=make_backend(name, group, window, dtype, kv_dtype or dtype),
            kv_cache=None,  # type: ignore[arg-type]
            max_q_len=int(q_lens.max()),
            q_lens_host=q_lens,
            kv_lens_host=kv_lens,
        )
        # The new tokens' K and V are in the cache too.
        for i, token in enumerate(range(len(decode), len(kv_lens))):
            begin, end = starts[i] + len(decode), starts[i + 1] + len(decode)
            kv_len = int(kv_lens[token])
            slots = self.batch.slot_table[self.batch.rows[token], kv_len - (end - begin) : kv_len]
            self.k[slots.long()] = self.new_k[begin:end].to(self.k.dtype)
            self.v[slots.long()] = self.new_v[begin:end].to(self.v.dtype)

    def run(self) -> torch.Tensor:
        self.batch.attention.begin(self.batch)
        return self.forward()

    def forward(self) -> torch.Tensor:
        return self.batch.attention.forward(
            self.q, self.new_k, self.new_v, self.k, self.v, self.batch, self.scale, self.window
        )

    def check(self, out: torch.Tensor) -> None:
        batch, d = self.batch, self.batch.num_decode
        cache = (self.k, self.v, batch.slot_table)
        how = (self.scale, self.window)
        decoded = decode_attention_naive(
            self.q[:d], *cache, batch.rows[:d], batch.kv_lens[:d], *how
        )
        new = (self.q[d:], self.new_k[d:], self.new_v[d:])
        extended = extend_attention_naive(
            *new, *cache, batch.rows[d:], batch.q_starts, batch.kv_lens[d:], *how, MAX_LEN
        )
        expected = torch.cat((decoded, extended)).flatten(1)
        seen = torch.ones(len(out), dtype=torch.bool, device=out.device)
        seen[:d] = batch.kv_lens[:d] > 0
        assert_close(out[seen], expected[seen])


@pytest.mark.parametrize("name", ["torch_native", "triton", FLASHINFER])
@pytest.mark.parametrize("seed", seeds(40, 20))
def test_every_mix_of_rows_agrees_with_the_naive_kernels(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    decode = [int(rng.choice([0, 1, 2, 9, 60, 70])) for _ in range(rng.integers(0, 6))]
    prefill = []
    for _ in range(rng.integers(0 if decode else 1, 4)):
        new = int(rng.choice([1, 2, 17, 40]))
        prefill.append((new, new + int(rng.choice([0, 1, 30]))))
    if not prefill and max(decode) == 0:
        prefill = [(3, 3)]
    group, window = (1, 2, 3, 7)[seed % 4], (0, 1, 8, 33, 0)[seed % 5]
    case = Case(name, decode, prefill, group, window, seed)
    case.check(case.run())


@ON_GPU
@pytest.mark.parametrize("name", ["triton", FLASHINFER])
@pytest.mark.parametrize("group", [2, 7])
def test_a_captured_decode_step_follows_the_lengths_that_are_planned(name: str, group: int) -> None:
    """The GPU is kept busy meanwhile, so that the plans of all replays wait for it together."""
    case = Case(name, [1] * 6, [], group)
    batch, backend = case.batch, case.batch.attention
    batch.q_lens_host = batch.kv_lens_host = None
    backend.plan_decode(np.empty(0, dtype=np.int32), 6)
    case.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.run()
    rng, outputs = np.random.default_rng(0), []
    torch.cuda._sleep(200_000_000)
    for num_rows in (6, 1, 4, 6, 5, 6, 2):
        lens = rng.integers(1, MAX_LEN, num_rows).astype(np.int32)
        padded = np.pad(lens, (0, 6 - num_rows))
        backend.plan_decode(lens, 6)
        batch.kv_lens.copy_(torch.from_numpy(padded).pin_memory(), non_blocking=True)
        graph.replay()
        outputs.append((padded, out.clone()))
    for padded, got in outputs:
        batch.kv_lens.copy_(int32(padded))
        case.check(got)


@ON_GPU
@pytest.mark.parametrize("name", ["triton", FLASHINFER])
def test_a_cache_of_8_bit_floats_is_read_as_what_it_holds(name: str) -> None:
    case = Case(name, [70, 3], [(20, 50), (5, 5)], 2, kv_dtype=torch.float8_e4m3fn)
    case.check(case.run())


def test_a_backend_that_cannot_run_says_why() -> None:
    shape = AttentionShape(
        2, 1, 64, torch.float32, torch.float32, frozenset([0]), MAX_ROWS, MAX_LEN
    )
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="flashinfer attention backend needs a GPU, not cpu"):
        create_attention_backend("flashinfer", cpu, shape)
    with pytest.raises(ValueError, match="known: auto, triton, flashinfer, torch_native"):
        create_attention_backend("flash", cpu, shape)
    message = "is for float16 or bfloat16" if HAS_FLASHINFER else r"nano-sglang\[flashinfer\]"
    if importlib.util.find_spec("flashinfer") is None or HAS_FLASHINFER:
        from sglang.attention.flashinfer import FlashInferAttention

        with pytest.raises(ValueError, match=message):
            FlashInferAttention(shape, cpu)
