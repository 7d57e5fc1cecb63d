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
import requests

from tests.e2e.serving import Server

CHILDREN = ["model worker 0", "router", "detokenizer"]
LONG = {"max_new_tokens": 4000, "ignore_eos": True, "temperature": 0}


def folders(pid: int) -> list[str]:
    return glob.glob(os.path.join(tempfile.gettempdir(), f"nano-sglang-{pid}-*"))


def launch(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sglang.launch_server", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.alone
@pytest.mark.parametrize("child", CHILDREN)
@pytest.mark.parametrize("when", ["starting", "under load"])
def test_a_killed_process_ends_the_server_with_its_cause(child, when):
    server = Server()
    streams = []
    if when == "starting":
        while set(server.children()) != set(CHILDREN):
            time.sleep(0.01)
    else:
        server.wait_ready()
        body = {"text": ["1, 2,", "a, b,"] * 4, "sampling_params": LONG, "stream": True}
        streams.append(server.post("/generate", body, stream=True).iter_content(None))
        next(streams[0])
    children = server.children()
    assert len(folders(server.process.pid)) == 1
    killed_at = time.monotonic()
    children[child].send_signal(signal.SIGKILL)
    assert server.process.wait(timeout=5) == 1
    assert time.monotonic() - killed_at < 5
    assert not any(process.is_running() for process in children.values())
    last = server.stderr().strip().splitlines()[-1]
    assert last == f"error: {child} was killed by signal 9 (SIGKILL)"
    assert folders(server.process.pid) == []
    for stream in streams:
        with pytest.raises(requests.exceptions.ChunkedEncodingError):
            list(stream)


@pytest.mark.alone
def test_a_detokenizer_that_hangs_ends_the_server_with_its_cause():
    server = Server().wait_ready()
    server.children()["detokenizer"].send_signal(signal.SIGSTOP)
    assert server.process.wait(timeout=20) == 1
    last = server.stderr().strip().splitlines()[-1]
    assert last == "error: detokenizer hangs: no sign of life"
    assert folders(server.process.pid) == []


@pytest.mark.alone
@pytest.mark.skipif(
    signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, reason="nohup: it is to be ignored"
)
def test_a_terminal_that_closes_ends_the_server_cleanly():
    server = Server().wait_ready()
    children = server.children()
    for process in children.values():
        process.send_signal(signal.SIGHUP)
    assert server.stop(signal.SIGHUP) == 0
    assert not any(process.is_running() for process in children.values())
    assert folders(server.process.pid) == []


@pytest.mark.alone
def test_a_body_that_does_not_come_gets_an_answer_when_the_server_ends():
    server = Server("--shutdown-timeout", "0.1").wait_ready()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        head = f"POST /generate HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        time.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        client.settimeout(15)
        reply = b"".join(iter(lambda: client.recv(4096), b"")).decode()
    assert reply.startswith("HTTP/1.1 503 ") and "the server is shutting down" in reply
    assert server.process.wait(timeout=5) == 0
    assert "Traceback" not in server.stderr()


@pytest.mark.alone
def test_a_killed_launcher_leaves_no_process():
    server = Server().wait_ready()
    children = server.children()
    server.process.kill()
    server.process.wait(timeout=5)
    _, alive = psutil.wait_procs(children.values(), timeout=5)
    assert not alive


@pytest.mark.alone
def test_two_servers_live_side_by_side_and_sigterm_ends_one_cleanly(server: Server):
    other = Server("--served-model-name", "another", "--grammar-backend", "none").wait_ready()
    assert other.url != server.url
    children = other.children()
    body = {
        "text": "The capital of France is",
        "sampling_params": {"max_new_tokens": 8, "ignore_eos": True},
    }
    assert other.get("/v1/models").json()["data"][0]["id"] == "another"
    refused = other.post("/generate", {"text": "hi", "sampling_params": {"regex": "a"}})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "regex"

    short, long = [], []
    generate = {"text": "1, 2, 3,", "sampling_params": {**LONG, "max_new_tokens": 100}}
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
    for process in children.values():  # a service manager sends it to all of them
        process.send_signal(signal.SIGTERM)
    assert other.stop(signal.SIGTERM) == 0
    assert time.monotonic() - asked < 12
    for thread in threads:
        thread.join(5)
    reason = short[0]["meta_info"]["finish_reason"]
    assert reason == {"type": "length", "length": 100}, "what can be finished is"
    assert long[0]["meta_info"]["finish_reason"]["type"] == "abort", "what takes long is not"
    assert not any(process.is_running() for process in children.values())
    assert folders(other.process.pid) == []
    assert "Traceback" not in other.stderr()

    assert server.generate(**body)["meta_info"]["completion_tokens"] == 8, "the other goes on"
    assert other.seconds_to_ready < 15, "a model in the cache is ready soon"


@pytest.mark.alone
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


@pytest.mark.alone
def test_a_second_ctrl_c_does_not_wait_for_running_requests():
    server = Server().wait_ready()
    children = server.children()
    body = {"text": "1, 2,", "sampling_params": LONG, "stream": True}
    with server.post("/generate", body, stream=True):
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert server.process.poll() is None, "it finishes its request"
        with pytest.raises(requests.ConnectionError):
            server.get("/health")
        asked = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(timeout=5) == 130
        assert time.monotonic() - asked < 1
    for process in children.values():
        process.wait(timeout=2)
    assert folders(server.process.pid) == []


@pytest.mark.parametrize("seconds", [0.0, 0.2, 0.4])  # the launcher imports meanwhile
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_server_can_be_ended_while_it_starts(signum, seconds):
    server = Server()
    parent = psutil.Process(server.process.pid)
    while len(parent.children()) < 3:
        time.sleep(0.01)
    children = parent.children()
    time.sleep(seconds)
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


def test_of_two_servers_that_start_on_one_port_one_says_that_it_is_in_use():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    servers = [Server("--port", port) for _ in range(2)]  # both bind, before either listens
    while all(server.process.poll() is None for server in servers):
        time.sleep(0.05)
    loser, winner = sorted(servers, key=lambda server: server.process.poll() is None)
    assert loser.process.returncode == 1
    last = loser.stderr().strip().splitlines()[-1]
    assert last == f"error: cannot listen on 127.0.0.1:{port}: Address already in use"
    assert winner.wait_ready().get("/health").ok
    assert winner.stop() == 0


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


def test_without_a_tokenizer_and_with_a_small_pool_there_are_ids_and_their_limits():
    server = Server("--skip-tokenizer-init", "--max-total-tokens", "100").wait_ready()
    assert "model worker 0] KV cache: 100 tokens" in server.stderr()
    params = {"temperature": 0, "max_new_tokens": 4}
    ids = [504, 3575, 282, 4649, 314]
    reply = server.generate(input_ids=ids, sampling_params=params)
    assert reply["output_ids"] == [7042, 30, 198, 198] and "text" not in reply

    def error(path: str, body: dict) -> dict:
        response = server.post(path, body)
        assert response.status_code == 400, response.text
        return response.json()["error"]

    assert "no tokenizer" in error("/generate", {"text": "hi"})["message"]
    assert "no tokenizer" in error("/v1/completions", {"prompt": ids})["message"]
    stop = {"input_ids": ids, "sampling_params": {**params, "stop": "x"}}
    assert error("/generate", stop)["param"] == "stop"
    too_long = error("/generate", {"input_ids": ids, "sampling_params": {"max_new_tokens": 96}})
    assert too_long["param"] == "max_new_tokens"
    assert "the KV pool (--max-total-tokens) holds 100 tokens" in too_long["message"]
    too_long = error("/generate", {"input_ids": [5] * 101, "sampling_params": params})
    assert too_long["param"] == "input_ids" and "holds 100 tokens" in too_long["message"]
    fits = server.generate(
        input_ids=ids, sampling_params={"max_new_tokens": 95, "ignore_eos": True}
    )
    assert fits["meta_info"]["completion_tokens"] == 95
    assert server.stop() == 0


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--prot", "30000"], ["unknown argument --prot", "did you mean --port?", "--host"]),
        (["--enable-metrics"], ["--enable-metrics (leave it out: /metrics is always there)"]),
        (["--schedule-policy", "lmp"], ["--schedule-policy", "'lmp'", "lpm", "weight", "fcfs"]),
        (["--grammar-backend", "outlines"], ["--grammar-backend", "llguidance", "none"]),
        (["--max-total-tokens", "many"], ["--max-total-tokens", "invalid int value: 'many'"]),
        (["--overlap-depth", "0"], ["--overlap-depth must be at least 1"]),
        (["--port", "70000"], ["--port must be at most 65535"]),
    ],
)
def test_a_wrong_flag_is_explained_in_one_line_that_names_what_is_valid(flags, parts):
    run = launch(*flags)
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert line.startswith("error: ") and all(part in line for part in parts)


def test_without_a_network_and_a_cache_the_demo_model_is_one_clear_line_away(tmp_path, monkeypatch):
    monkeypatch.setenv("SGLANG_CACHE_DIR", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
        monkeypatch.setenv(name.upper(), "http://127.0.0.1:9")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    run = launch("--port", "0")
    assert run.returncode == 1
    line = run.stderr.splitlines()[-1]
    assert line.startswith("error: cannot fetch the demo model") and "--model-path" in line
    assert "Traceback" not in run.stderr and len(run.stderr.splitlines()) == 2, run.stderr
