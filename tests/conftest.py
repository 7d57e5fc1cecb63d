"""Where there is no GPU, Triton kernels run on Triton's interpreter. It must be asked for before
triton is first imported; what the engine runs on a CPU does not change by it."""

import os

# Threads that spin while they wait are quick alone, and many times slower beside others.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
