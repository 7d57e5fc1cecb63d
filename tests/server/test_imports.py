"""Which process imports what: torch takes 1.5 s, transformers 5 s, and a server starts in few."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "modules",
    [
        "sglang, sglang.launch_server",
        "sglang.server.launch, sglang.server.app, sglang.tokenizer",
        "sglang.server.detokenizer, sglang.tokenizer",
        "sglang.server.llm, sglang.tokenizer",
    ],
)
def test_only_the_model_workers_import_torch(modules):
    script = f"import sys, {modules}; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout == "[]\n", run.stderr
