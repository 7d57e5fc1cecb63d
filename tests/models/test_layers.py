"""Linear layers by themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sglang.layers.linear import RowParallelLinear
from sglang.quantization.unquantized import Unquantized
from sglang.worker.parallel import TensorParallel
from tests.kernels.common import DEVICE, assert_close, randn


class InMemory:
    """A checkpoint."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        self._tensors = tensors

    def load(self, to: torch.Tensor, name: str, dim: int = 0, shard: object = None) -> None:
        to.copy_(self._tensors[name.rpartition(".")[2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 50])
def test_a_layer_may_add_its_output_to_the_residual(
    tokens: int, bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    checkpoint = InMemory(weight=randn(96, 64, dtype=dtype) / 8, bias=randn(96, dtype=dtype))
    layer = RowParallelLinear(
        "down_proj", 64, 96, Unquantized(), TensorParallel(), dtype, torch.device(DEVICE), bias
    )
    layer.load(checkpoint)  # type: ignore[arg-type]
    x, residual = randn(tokens, 64, dtype=dtype), randn(tokens, 96, dtype=dtype)
    weight, b = checkpoint._tensors["weight"], checkpoint._tensors["bias"]
    expected = residual + F.linear(x, weight, b if bias else None)
    one, other = layer.added(x, residual)
    assert_close(one if other is None else one + other, expected)
