"""Triton's kernels, compiled before they are first wanted, and many at a time.

Triton compiles a kernel when it is first launched: seconds, of one core, for each of dozens. So the
steps to come are rehearsed: what they would launch is noted instead, and then compiled by threads
side by side. Four fifths of the compiler's time do not hold Python's lock.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)

_MOST_THREADS = 16


def compile_ahead(rehearse: Callable[[], None], show_progress: bool = True) -> None:
    """Compiles all that `rehearse` would launch. Its kernels do not run: their outputs hold
    anything. Before Triton 3.5, whose compiler was not made for threads, nothing happens.

    What cannot be compiled so is compiled at its first launch, where an error is told too.
    Constexpr arguments must be data types, or what JSON holds.
    """
    import triton

    if not hasattr(triton, "AsyncCompileMode"):
        return
    wanted: dict[tuple[Any, str], str] = {}

    def note(*, fn: Any, key: str, compile: dict[str, Any], **_: Any) -> bool:
        wanted[fn.jit_function, key] = compile["specialization_data"]
        return True  # which says that it need not be compiled, and so not launched

    triton.knobs.runtime.jit_cache_hook = note
    try:
        rehearse()
    finally:
        triton.knobs.runtime.jit_cache_hook = None
    threads = min(len(os.sched_getaffinity(0)), _MOST_THREADS)
    with (
        ThreadPoolExecutor(threads) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True) as mode,
    ):
        for (function, _), data in wanted.items():
            try:
                function.preload(data)
            except Exception as error:
                logger.debug("not compiled ahead: %s: %s", function, error)
        for _ in tqdm(
            as_completed(mode.raw_futures),
            total=len(mode.raw_futures),
            desc="Compiling kernels",
            unit="kernel",
            disable=None if show_progress else True,
        ):
            pass
