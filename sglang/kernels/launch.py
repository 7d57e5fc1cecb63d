"""What kernels share when they are launched.

Programmatic dependent launch: a kernel begins while the one before it in the stream ends.
Between two small kernels of a CUDA graph lies a microsecond or more. A kernel launched with
`**pdl(device)` may begin once all programs of its predecessor have called `launch_next`, or ended;
before it reads what the predecessor wrote, and before it writes anything, it must call
`wait_for_previous`, in every program: that waits for all earlier kernels to have ended.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

FLOAT32 = tl.constexpr("tf32x3")
"""`input_precision` of attention's matrix products in float32: three products of 11-bit parts are
as exact as one of floats, and run on tensor cores. It means nothing to 16-bit floats."""

try:  # Triton 3.4 and later
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:
    gdc_launch_dependents = gdc_wait = None


@cache
def pdl(device: torch.device) -> dict[str, bool]:
    """Launch arguments of a kernel that has a constexpr PDL, which says whether it may be used."""
    able = gdc_wait is not None and device.type == "cuda"
    if able and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@cache
def multiprocessors(device: torch.device) -> int:
    """Few on the interpreter, whose programs then have several tiles, too."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def padded_rows(num_rows: int, *sizes: int) -> int:
    """The first of these sizes that holds them, or a power of two: each size costs compiling a
    kernel anew."""
    return next((s for s in sizes if num_rows <= s), triton.next_power_of_2(num_rows))


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    if PDL:
        gdc_wait()


@triton.jit
def launch_next(PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()


def counters(device: torch.device, count: int) -> torch.Tensor:
    """int32 zeros, at least `count`, for programs to count how many of them have ended. Every
    launch leaves them as zeros, and the launches of one stream share them."""
    return _zeros(device, max(1 << 15, triton.next_power_of_2(count)))


@cache
def _zeros(device: torch.device, count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)
