"""The 4-bit kernels in Triton are for GPUs before Hopper, too, which know fewer instructions. They
are compiled without one, in a process that does not interpret them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from sglang.kernels import int4, int4_gemv

t, arch = sys.argv[1], int(sys.argv[2])
pointers = dict.fromkeys(("x_ptr", "residual_ptr", "norm_ptr", "out_ptr", "sum_ptr"), f"*{t}")
types = {"words_ptr": "*i32", "scales_ptr": "*i32", "eps": "fp32", **pointers}
none = dict.fromkeys(("bias_ptr", "partial_ptr", "arrived_ptr"))

def build(kernel, constants, **more):
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    signature = {
        name: "constexpr" if name in constants else (types | more).get(name, "i32")
        for name in kernel.arg_names
    }
    compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", arch, 32))

for group in (32, 128):
    common = none | {"GROUP": group, "BIAS": False, "ASM": True, "PDL": False}
    block_k = 128 if group == 128 else 64
    dot = {"SPLITS": 1, "BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": block_k, "NUM_STAGES": 3}
    build(int4._dot_kernel, common | dot, x=f"tensordesc<{t}[16, {block_k}]>")
    gemv = {"N": 512, "K": 4096, "ADD": True, "NORM": True, "GATED": True, "TENSOR": True}
    cut = {"R": 2, "TILES": 64, "PROGRAMS": 64, "C": 128, "PARTS": 1}
    build(int4_gemv._int4_gemv_kernel, common | gemv | cut)
build(int4._dequantize_kernel, common | {"BLOCK_N": 16, "BLOCKS": 16})
"""


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_kernels_compile_for_gpus_before_hopper(dtype, tmp_path):
    pytest.importorskip("triton.backends.nvidia")
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, dtype, "80"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
