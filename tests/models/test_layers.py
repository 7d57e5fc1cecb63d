"""Linear layers by themselves."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sglang.kernels.activation import silu_and_mul_naive
from sglang.layers.linear import GateUpLinear, QKVLinear, RowParallelLinear
from sglang.layers.norm import RMSNorm
from sglang.quantization.unquantized import Unquantized
from sglang.worker.parallel import TensorParallel
from tests.kernels.common import DEVICE, GPU, assert_close, randn


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


@pytest.mark.parametrize("tokens", [1, 4, 16, 17, 200, 600, 2100])
def test_a_norm_may_come_after_the_product(tokens: int) -> None:
    torch.manual_seed(0)
    dtype, eps = torch.bfloat16 if GPU else torch.float32, 1e-5
    norm = RMSNorm("norm", 128, eps, dtype, DEVICE)
    norm.weight.copy_(torch.rand(128) + 0.5)
    where = (Unquantized(), TensorParallel(), dtype, DEVICE)
    qkv, mlp = QKVLinear("attention", 128, 4, 2, 32, *where), GateUpLinear("mlp", 128, 256, *where)
    x = randn(tokens, 128, dtype=dtype) * 3
    normed = F.rms_norm(x.float(), (128,), norm.weight.float(), eps)
    expected = []
    for layer, outputs in ((qkv, 256), (mlp, 512)):
        weight = randn(outputs, 128, dtype=dtype) / 16
        expected.append(F.linear(normed, weight.float()))
        layer.weight, layer.packed = nn.Parameter(weight, requires_grad=False), None
    moved = copy.deepcopy(norm)
    moved.move_weight_into(qkv.weight)
    out, same, scale = qkv.unscaled(x, None, moved)
    assert same is x
    # Few have a kernel for all of it, and for many it is not worth it.
    assert (scale is None) == ((GPU and tokens <= 16) or tokens > 512)
    assert_close(out if scale is None else scale.times(out), expected[0].to(dtype))
    norm.move_weight_into(mlp.weight)
    out, same = mlp.normed(x, None, norm, gated=True)
    assert same is x
    assert_close(out, silu_and_mul_naive(expected[1]).to(dtype))
