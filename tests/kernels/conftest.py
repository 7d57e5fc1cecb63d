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
