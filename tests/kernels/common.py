"""What the kernel tests share: the device, and how many and how large the random cases are."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
import torch

from sglang.kernels.int4_weight import Int4Weight, pack_int4, pack_scales

if TYPE_CHECKING:
    from sglang.kernels.hopper_split_k import Tile

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
# The interpreter does bfloat16 arithmetic wrongly, and float32 is where it is quick.
DTYPES = [torch.float16, torch.bfloat16] if GPU else [torch.float32, torch.float16]

try:
    from sglang.kernels import hopper
    from sglang.kernels.hopper_split_k import Split

    ON_HOPPER = hopper.multiprocessors(DEVICE) > 0
except ImportError:  # Triton without Gluon, or with an older one
    ON_HOPPER = False
on_hopper = pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU and Gluon")


def seeds(on_interpreter: int, on_gpu: int) -> range:
    """On a GPU cases are larger, and fewer: almost each compiles a kernel of its own."""
    return range(on_gpu if GPU else on_interpreter)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float32, device=DEVICE).to(dtype)


def random_int4(n: int, k: int, group: int, scale_dtype: torch.dtype = torch.float32) -> Int4Weight:
    groups = -(-k // group)
    q = torch.randint(0, 16, (n, k), device=DEVICE)
    scales = torch.rand(groups, n, device=DEVICE) * 0.1 + 0.05
    zeros = torch.randint(0, 17, (groups, n), device=DEVICE)
    return Int4Weight(pack_int4(q), pack_scales(scales.to(scale_dtype), zeros), k, group)


def int32(values: object) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.int32, device=DEVICE)


def any_split(rng: random.Random, tile: Tile, tokens: int, n: int, k: int) -> Split:
    """Any number of parts that the GPU has room for."""
    shape = (tokens, n, k, hopper.multiprocessors(DEVICE))
    splits = (Split(tile, s) for s in range(1, k // 128 + 1))
    return rng.choice([split for split in splits if split.is_legal(*shape)])
