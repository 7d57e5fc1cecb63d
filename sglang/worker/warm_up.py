"""Steps before the first request: kernels are compiled, and too little memory shows, early."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sglang.messages import RowSpec, StepPlan, pack

if TYPE_CHECKING:
    from sglang.worker.runner import ModelRunner

_PROMPT_LENGTHS = (512, 32, 16)
"""Besides the longest: attention has other tiles, and so other kernels, for each."""
_MIDDLING = 640
"""Tokens of a prompt too long for what graphs launch, and too short for the kernels of many."""


def warm_up(runner: ModelRunner) -> None:
    """The largest prefills that may come, of short prompts and of long ones (on a CPU, one short
    prompt), one of a middling prompt alone, then a step that decodes, prefills and draws at random.
    They write to slots that are free and to rows that are not open."""
    rows = runner.rows
    budget = min(
        runner.chunk_size if runner.device.type == "cuda" else 16, runner.kv_cache.num_slots
    )
    longest = min(budget, rows.max_len - 1)
    if longest < 1:
        return
    for length in (*(n for n in _PROMPT_LENGTHS if n < longest), longest):
        num_prompts = min(budget // length, rows.num_rows)
        _run(runner, num_decode=0, prompts=[length] * num_prompts, temperature=0.0)
    if longest > _MIDDLING:
        _run(runner, num_decode=0, prompts=[_MIDDLING], temperature=0.0)
    if num_prompts < rows.num_rows:
        _run(runner, num_decode=num_prompts, prompts=[longest], temperature=1.0)


def _run(runner: ModelRunner, num_decode: int, prompts: list[int], temperature: float) -> None:
    num_rows, num_new = num_decode + len(prompts), sum(prompts)
    opened = [row_spec(row, temperature) for row in range(num_decode, num_rows)]
    slots = np.arange(num_decode + num_new) % runner.kv_cache.num_slots
    parts = (np.arange(num_rows), prompts, [1] * len(prompts), slots, [0] * num_new)
    plan = StepPlan(0, opened, num_rows, num_decode, num_new)
    runner.launch(plan, pack(np.concatenate(parts))).wait()


def row_spec(row: int, temperature: float, cached_len: int = 0) -> RowSpec:
    """Of a request that asks for nothing in particular."""
    return RowSpec(
        row=row,
        cached_len=cached_len,
        seed=0,
        temperature=temperature,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        frequency_penalty=0.0,
        presence_penalty=0.0,
        repetition_penalty=1.0,
        logit_bias={},
        suppress_until=0,
        suppress=[],
        top_logprobs=-1,
        prompt_len=0,
        history=b"",
    )
