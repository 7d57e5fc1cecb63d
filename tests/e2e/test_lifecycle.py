"""How servers start, end and fail."""

from __future__ import annotations

import glob
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import psutil
import pytest

from tests.e2e.serving import Server

LONG = {"max_new_tokens": 4000, "ignore_eos": True, "temperature": 0}


def folders(pid: int) -> list[str]:
    return glob.glob(os.path.join(tempfile.gettempdir(), f"nano-sglang-{pid}-*"))


def launch(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sglang.launch_server", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("child", ["model worker 0", "router", "detokenizer"])
def test_a_killed_process_ends_the_server_with_its_cause(child):
    server = Server().wait_ready()
    children = server.children()
    assert set(children) == {"model worker 0", "router", "detokenizer"}
    assert len(folders(server.process.pid)) == 1
    killed_at = time.monotonic()
    children[child].send_signal(signal.SIGKILL)
    assert server.process.wait(timeout=5) == 1
    assert time.monotonic() - killed_at < 5
    assert not any(process.is_running() for process in children.values())
    last = server.stderr().strip().splitlines()[-1]
    assert last == f"error: {child} was killed by signal 9 (SIGKILL)"
    assert folders(server.process.pid) == []


def test_two_servers_live_side_by_side_and_sigterm_ends_one_cleanly(server: Server):
    other = Server("--served-model-name", "another").wait_ready()
    assert other.url != server.url
    assert other.seconds_to_ready < 15
    children = other.children()
    body = {"text": "The capital of France is", "sampling_params": {"max_new_tokens": 8}}
    assert other.get("/v1/models").json()["data"][0]["id"] == "another"

    short, long = [], []
    generate = {"text": "1, 2, 3,", "sampling_params": {**LONG, "max_new_tokens": 40}}
    threads = [
        threading.Thread(target=lambda: short.append(other.generate(**generate))),
        threading.Thread(
            target=lambda: long.append(other.generate(text="1, 2,", sampling_params=LONG))
        ),
    ]
    for thread in threads:
        thread.start()
    while other.stats()["running"] < 2:
        time.sleep(0.01)
    asked = time.monotonic()
    assert other.stop(signal.SIGTERM) == 0
    assert time.monotonic() - asked < 12
    for thread in threads:
        thread.join(5)
    reason = short[0]["meta_info"]["finish_reason"]
    assert reason == {"type": "length", "length": 40}, "what can be finished is"
    assert long[0]["meta_info"]["finish_reason"]["type"] == "abort", "what takes long is not"
    assert not any(process.is_running() for process in children.values())
    assert folders(other.process.pid) == []
    assert "Traceback" not in other.stderr()

    assert server.generate(**body)["meta_info"]["completion_tokens"] == 8, "the other goes on"


def test_ctrl_c_ends_an_idle_server_at_once():
    server = Server().wait_ready()
    children = server.children()
    asked = time.monotonic()
    for process in (server.process, *children.values()):  # a terminal sends it to all of them
        process.send_signal(signal.SIGINT)
    assert server.process.wait(timeout=10) == 130
    assert time.monotonic() - asked < 4
    assert not any(process.is_running() for process in children.values())
    assert "Traceback" not in server.stderr()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_server_can_be_ended_while_it_starts(signum):
    server = Server()
    parent = psutil.Process(server.process.pid)
    while len(parent.children()) < 3:
        time.sleep(0.01)
    children = parent.children()
    server.stop(signum)
    assert server.process.returncode == (0 if signum == signal.SIGTERM else 130)
    assert not any(process.is_running() for process in children)
    assert "Traceback" not in server.stderr()


def test_a_port_in_use_is_said_before_any_weight_is_loaded():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        run = launch("--port", str(port))
    assert run.returncode == 1
    assert run.stderr == f"error: cannot listen on 127.0.0.1:{port}: Address already in use\n"


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--model-path", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--context-length", "9000"], "--context-length 9000 is more than the model's 8192"),
        (["--host", "192.0.2.1"], "192.0.2.1"),
    ],
)
def test_a_start_that_fails_prints_one_clear_line(flags, part):
    run = launch("--port", "0", "--device", "cpu", *flags)
    assert run.returncode == 1
    lines = [line for line in run.stderr.splitlines() if "[" not in line[:1]]
    assert len(lines) == 1 and lines[0].startswith("error: ") and part in lines[0], run.stderr


def test_a_checkpoint_that_lacks_a_tensor_is_named(tmp_path):
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"model.norm.weight": np.ones(16, np.float32)}, tmp_path / "model.safetensors")
    run = launch("--model-path", str(tmp_path), "--port", "0", "--skip-tokenizer-init")
    assert run.returncode == 1
    assert "model.embed_tokens.weight" in run.stderr.strip().splitlines()[-1]
    assert "Traceback" not in run.stderr


def test_a_wrong_flag_is_explained():
    run = launch("--prot", "30000")
    assert run.returncode == 2 and "did you mean --port?" in run.stderr
