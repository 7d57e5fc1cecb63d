"""Servers of several ranks: they say what one rank says; one that dies or hangs ends its server,
with its name and within ten seconds, and no other one."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import requests

import sglang
from sglang.worker.parallel import TensorParallel
from tests.e2e.serving import Server
from tests.engine.ranks import outputs_of, params_of
from tests.models import tiny

PROMPTS = [[(7 * i + j * j) % 99 for j in range(5 + 4 * i)] for i in range(12)]
POOL = ("--max-total-tokens", "180", "--chunked-prefill-size", "16", "--max-running-requests", "16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.make("Qwen3").save_pretrained(path)
    return path


def start(folder: Path) -> Server:
    flags = ("--model-path", str(folder), "--skip-tokenizer-init", "--check-ranks", *POOL)
    return Server("--tp", "2", "--schedule-conservativeness", "0", *flags).wait_ready()


@pytest.fixture(scope="module")
def server(folder) -> Iterator[Server]:
    server = start(folder)
    yield server
    server.stop()


def answers(server: Server) -> list[list[int]]:
    """To all prompts at once."""

    def ask(i: int) -> list[int]:
        p = params_of(i)
        fields = ("max_new_tokens", "ignore_eos", "temperature", "seed", "top_k", "top_p")
        params = {name: getattr(p, name) for name in (*fields, "frequency_penalty")}
        return server.generate(input_ids=PROMPTS[i], sampling_params=params)["output_ids"]

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(ask, range(len(PROMPTS))))


def test_two_ranks_behind_http_say_what_one_says(server, folder):
    assert answers(server) == outputs_of(str(folder), PROMPTS, TensorParallel())


@pytest.mark.alone
@pytest.mark.parametrize(
    ("signum", "cause"),
    [
        (signal.SIGKILL, "was killed by signal 9 (SIGKILL)"),
        (signal.SIGSTOP, "hangs: no sign of life"),
    ],
)
def test_a_lost_rank_ends_its_server_and_no_other(signum, cause, server, folder):
    expected = answers(server)
    doomed = start(folder)
    assert doomed.url != server.url
    children = doomed.children()
    assert {"model worker 0", "model worker 1"} < set(children)
    ended = threading.Event()

    def load() -> None:
        while not ended.is_set():
            try:
                answers(doomed)
            except requests.RequestException:
                return

    loading = threading.Thread(target=load)
    loading.start()
    while doomed.stats()["running"] == 0:
        time.sleep(0.01)
    children["model worker 1"].send_signal(signum)
    lost_at = time.monotonic()
    assert doomed.process.wait(timeout=10) == 1
    seconds = time.monotonic() - lost_at
    ended.set()
    loading.join(5)
    print(f"model worker 1 {cause}: the server ended {seconds:.2f} s later")
    assert doomed.stderr().strip().splitlines()[-1] == f"error: model worker 1 {cause}"
    _, alive = psutil.wait_procs(children.values(), timeout=1)
    assert not alive
    assert answers(server) == expected


def test_a_number_of_ranks_that_does_not_divide_the_heads_is_refused():
    with pytest.raises(ValueError, match="--tp-size 2 does not divide the model: 9 attention"):
        sglang.LLM(device="cpu", tp_size=2)
