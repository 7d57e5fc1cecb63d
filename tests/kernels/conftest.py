"""Where the kernels run: on the GPU if there is one, else on Triton's interpreter.

The interpreter is chosen by what the environment says when triton is imported. It changes nothing
for the engine's tests in this process: on CPU tensors every public function takes the torch twin.
"""

import os
import sys

import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:
        raise pytest.UsageError(
            "triton was imported before tests/kernels could choose its interpreter: "
            "set TRITON_INTERPRET=1, or run tests/kernels by itself"
        )
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def parts_are_left_empty():
    """Behind products on Hopper: where parts of sums meet, no number is left."""
    yield
    from .common import ON_HOPPER

    if ON_HOPPER:
        from sglang.kernels.hopper_split_k import empty_sums

        sums = empty_sums(torch.device("cuda", torch.cuda.current_device()))
        assert (sums.view(torch.int32) == -1).all()
