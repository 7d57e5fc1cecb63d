"""Kernels compiled before they are launched, for a GPU that need not be there."""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from sglang.worker.compile_ahead import compile_ahead

pytestmark = pytest.mark.skipif(
    not hasattr(triton, "AsyncCompileMode"), reason="Triton before 3.5 compiles on one thread"
)


class Hopper:
    """A driver that can do all but launch."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def _use_hopper(cache: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = cache
    triton.runtime.driver._active = Hopper()


@pytest.fixture(scope="module")
def on_hopper(tmp_path_factory):
    """Calls a function in a process of its own: Triton's interpreter, which other tests use, leaves
    the language changed."""
    cache = str(tmp_path_factory.mktemp("triton"))
    spawn = get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=_use_hopper, initargs=(cache,)) as pool:
        yield lambda check: pool.submit(check).result()


def _fill(out_ptr, value, N: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, N), tl.full([N], value, tl.float32))


def _fail(out_ptr, N: tl.constexpr):
    tl.static_assert(N < 0)


def asked_for(launch: Callable[[], object]) -> list[str]:
    """What a launch would have compiled."""
    asked = []
    triton.knobs.runtime.jit_cache_hook = lambda *, key, **_: asked.append(key) or True
    try:
        launch()
    finally:
        triton.knobs.runtime.jit_cache_hook = None
    return asked


def _rehearse_and_look() -> None:
    fill, out = JITFunction(_fill), torch.zeros(16)

    def rehearse():
        for n in (4, 8, 4, 16):  # a launch would fail: there is no GPU
            fill[(1,)](out, 2.0, N=n)

    compile_ahead(rehearse)
    assert triton.knobs.runtime.jit_cache_hook is None
    kernels, *_ = fill.device_caches[0]
    assert len(kernels) == 3 and all(kernel.asm["cubin"] for kernel in kernels.values())
    assert len(asked_for(lambda: fill[(1,)](out, 2.0, N=32))) == 1


def _compile_what_cannot_be() -> None:
    fail, out = JITFunction(_fail), torch.zeros(16)
    compile_ahead(lambda: fail[(1,)](out, N=4))
    with pytest.raises(triton.CompilationError):
        fail[(1,)](out, N=4)


def test_what_is_rehearsed_is_not_launched_and_is_there_afterwards(on_hopper):
    on_hopper(_rehearse_and_look)


def test_what_cannot_be_compiled_fails_at_its_launch(on_hopper):
    on_hopper(_compile_what_cannot_be)


def test_a_rehearsal_that_fails_leaves_nothing_behind():
    with pytest.raises(ZeroDivisionError):
        compile_ahead(lambda: 1 // 0)
    assert triton.knobs.runtime.jit_cache_hook is None
